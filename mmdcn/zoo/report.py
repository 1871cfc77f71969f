"""Report of the checks of mmdet's configs: the page of the documentation."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from mmdcn.markdown import table as markdown_table
from mmdcn.zoo.checking import IMAGE_SIZE, TOLERANCES, Checked, tested_versions
from mmdcn.zoo.finding import Found


def table(results: Sequence[tuple[Found, Checked]], passed_over: Mapping[str, str]) -> str:
    """The page of the documentation, in Markdown.

    Args:
        results: those of :func:`sweep`.
        passed_over: as :func:`find` fills it.
    """
    passed = sum(checked.problem is None for _, checked in results)
    models = len({found.key for found, _ in results})
    lines = [
        "# mmdet's deformable configs",
        "",
        f"**{passed} of {len(results)}** configs that mmdet ships with a deformable operator in "
        f"their model work with ours ({models} distinct models).",
        "",
        "Written by `make zoo`, which finds them by what they build and checks each at full width: "
        "its model loads, strictly, a checkpoint that was saved with mmcv's layers; features and "
        "outputs of the dense heads in float64 differ from mmcv's by at most "
        f"{TOLERANCES[torch.float64]:.0e} of the largest ({TOLERANCES[torch.float32]:.0e} where a "
        "head insists on float32); one training step and one prediction in float32 run on our "
        "operator, with finite loss and gradients. Two images of "
        f"{IMAGE_SIZE[0]}×{IMAGE_SIZE[1]} pixels, random weights and offsets. The last three "
        "columns are the calls of our operator in the training step, forward and backward, and the "
        "largest difference; a dash means that mmcv has no kernel for this on a CPU. Models marked "
        "* do not predict on a CPU, whosever layers they have, as mmcv's MaskedConv2d does not run "
        "there.",
        "",
        f"With {tested_versions()}.",
        "",
        *_outcomes(results),
    ]
    if passed_over:
        lines += [
            "",
            f"Not built here, hence not looked into: {len(passed_over)} configs.",
            "",
            *_reasons(passed_over),
        ]
    return "\n".join(lines) + "\n"


def _outcomes(results: Sequence[tuple[Found, Checked]]) -> list[str]:
    """The table of the configs that were checked."""
    rows = []
    for found, checked in results:
        modules = ", ".join(f"{name} ×{count}" for name, count in found.operators.items())
        difference = "–" if checked.difference is None else f"{checked.difference:.0e}"
        outcome = [checked.forward, checked.backward]
        if checked.problem is not None:
            outcome = [checked.problem, ""]
        mark = "" if checked.predicted else " *"
        rows.append([f"{found.name}{mark}", modules, *outcome, difference])
    header = ["config", "deformable modules", "forward", "backward", "difference"]
    return markdown_table(header, rows, left=2)


def _reasons(passed_over: Mapping[str, str]) -> list[str]:
    """The table of the reasons for which configs were passed over."""
    rows = []
    for reason, count in Counter(passed_over.values()).most_common():
        folders = Counter(
            name.partition("/")[0] for name, why in passed_over.items() if why == reason
        )
        names = ", ".join(f"{folder} ({n})" for folder, n in sorted(folders.items()))
        rows.append([reason, f"{count}: {names}"])
    return markdown_table(["reason", "configs"], rows, left=2)
