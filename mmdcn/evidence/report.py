"""The page of the documentation, its plots, and the JSON with every run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from matplotlib.figure import Figure

from mmdcn.files import write as write_file
from mmdcn.files import write_figure
from mmdcn.markdown import table
from mmdcn.timing import SCATTER_MARK, scatters

from . import coco, detector_grid, detector_report, layers, plots
from .conclusions import conclusions
from .cost import MMCV
from .detector_report import DetectorResults
from .grid import MAIN, PARTS, SEEDS
from .jobs import DetectorJob, DigitJob
from .nets import ARMS
from .results import COLUMNS, Results
from .training import BATCH, TRAININGS

TITLE = "What deformable layers do under geometric transformation"
BASELINES = {"scratch": "plain-size", "long": "plain-size", "upright": "plain", "frozen": "norm"}

_QUICK = (
    "**This is a quick run: one seed, a tenth of the epochs. It shows that all works, and nothing "
    "else.**"
)

_METHOD = f"""
The question is the one that deformable convolution was made for: kernels stay, sampling points
move; does the network then answer a transformed input as it answers the untransformed one, and at
what cost?

**Data**: 5,000 digits of MNIST, of which 4,000 are trained on and 1,000 tested on, other ones for
each seed, on a canvas of 40×40 pixels. Transformations at strength 1: rotation up to ±60°, scale
by 1/1.6 to 1.6, shear up to 0.8, perspective that brings one side up to 0.4 nearer, smooth
elastic displacements of 1.2 pixels standard deviation, and *all*: these together, and shifts up
to 3 pixels. Every bound grows with the strength; ½ is milder, and 1½ is beyond what was trained
on. Training draws each digit anew, with *all* at strength 1.

**Networks**: five 3×3 convolutions (24, 48, 48, 96, 96 channels, strides 2, 2, 1, 2, 1) with
normalisation and ReLU, a mean over positions, and a linear layer. The last features see 39 of 40
pixels, so that no arm gains by reach alone. Deformable arms have all convolutions but the first
deformable, start from the very weights of the plain network, with offsets zero, and compute at
first what it computes. AdamW, batches of {BATCH}, the same schedule for all; offsets learn at a
tenth of the rate, or, where kernels are frozen and all that learns is new, at the whole.

**Spread**: what is random is the same for all arms of a seed, so differences are taken seed by
seed; ± is half of the 95 % interval of the mean, by Student's t.
""".strip()

_PART_TEXT = {
    "scratch": "Every parameter is trained on transformed digits.",
    "long": "The same for three times as many epochs, to see what is left of the differences.",
    "frozen": "A plain network learns upright digits. Then all its kernels are frozen, something "
    "is added, and what is added is trained alone on transformed digits. Statistics of "
    "normalisations follow the new data in every arm: what that gives by itself is an arm too. "
    "*Plain branch* adds as many parameters as DCNv2's branches have, and moves no points. That "
    "offsets learn here at the whole rate was chosen by one run on seed 0.",
    "upright": "Nothing transformed is seen in training: does a layer that can move its points do "
    "so by itself?",
}


def write(
    jobs: Sequence[DigitJob],
    folder: Path,
    target: Path,
    *,
    detectors: Sequence[DetectorJob] = (),
    cost: dict | None = None,
    looked: dict | None = None,
    pictures: Mapping[str, Figure] = MappingProxyType({}),
    quick: bool = False,
) -> list[Path]:
    """Write the page as ``target.md``, and its plots and JSON into the folder ``target``.

    Args:
        jobs: those of the grid; what is not finished is named on the page.
        folder: of the results.
        target: the page's name without its ending.
        detectors: those of the grid.
        cost: what :func:`~.cost.measure` gave.
        looked: what :func:`~.layers.measure` gave.
        pictures: what :func:`~.layers.figures` gave; earlier ones stay where it gave none.
        quick: whether nothing is to be concluded.

    Returns:
        What was written.
    """
    results = Results.read(jobs, folder)
    detected = DetectorResults.read(detectors, folder)
    drawn = detector_report.figure(detected)
    pictures = {**pictures, **({detector_report.PICTURE: drawn} if drawn is not None else {})}
    written = []
    for name, figure in {**_figures(results), **pictures}.items():
        written.append(target / name)
        write_figure(written[-1], figure, dpi=110)
    written.append(target / "runs.json")
    write_file(written[-1], _json(results, detected, cost, looked))
    written.append(target.with_suffix(".md"))
    write_file(written[-1], _page(results, detected, target, cost, looked, quick))
    return written


def _figures(results: Results) -> dict[str, plots.Figure]:
    found = {}
    for part, definition in PARTS.items():
        arms = results.arms(part)
        if not arms:
            continue
        lines = [(part, arm) for arm in arms]
        if part == "frozen" and ("upright", "plain") in results.by_arm:
            lines.append(("upright", "plain"))
        found[f"{part}.png"] = plots.strengths(results, lines, definition.title)
        baseline = BASELINES[part]
        others = [arm for arm in arms if arm not in (baseline, "plain")]
        if baseline in arms and others:
            found[f"{part}-differences.png"] = plots.differences(
                results,
                part,
                baseline,
                others,
                f"{definition.title}: beyond {ARMS[baseline].title}",
            )
    return found


def _page(
    results: Results,
    detected: DetectorResults,
    target: Path,
    cost: dict | None,
    looked: dict | None,
    quick: bool,
) -> str:
    name = target.name
    lines = [f"# {TITLE}", "", "Written by `make evidence`; every run is in "]
    lines[-1] += f"[runs.json]({name}/runs.json)."
    lines += ["", "## What came out", ""]
    lines += [_QUICK, ""] if quick else _concluded(results, detected, cost, looked)
    lines += ["## How it was measured", "", _METHOD, ""]
    for part in PARTS:
        if results.arms(part):
            lines += _part(results, part, name)
    lines += detector_report.section(detected, name)
    if cost is not None:
        lines += _cost(cost)
    if looked is not None:
        pictures = {path.name: f"{name}/{path.name}" for path in target.glob("*.png")}
        lines += layers.section(looked, pictures)
    lines += coco.section()
    lines += _made(results, detected)
    return "\n".join(lines).rstrip() + "\n"


def _concluded(
    results: Results, detected: DetectorResults, cost: dict | None, looked: dict | None
) -> list[str]:
    found = conclusions(results, cost) + list(detector_report.sentences(detected))
    found += [] if looked is None else layers.sentences(looked)
    lines = [f"- {text}" for text in found] or ["No run is finished yet."]
    few = results.seeds("scratch", MAIN)
    if few < SEEDS:
        seeds = f"{few} of {SEEDS} seeds"
        lines.insert(0, f"**The grid is not finished**: the main arms have {seeds}.\n")
    return [*lines, ""]


def _part(results: Results, part: str, name: str) -> list[str]:
    definition, arms, baseline = PARTS[part], results.arms(part), BASELINES[part]
    epochs = next(iter(results.by_arm[part, arms[0]].values()))["run"]["epochs"]
    title = f"{definition.title[0].upper()}{definition.title[1:]}"
    lines = [f"## {title}", "", f"{_PART_TEXT[part]} {epochs} epochs; accuracy in %.", ""]
    header = ["arm", "parameters", "seeds", *COLUMNS]
    rows = []
    for arm in arms:
        seeds = results.by_arm[part, arm]
        row = [ARMS[arm].title, f"{next(iter(seeds.values()))['parameters']:,}", len(seeds)]
        rows.append([*row, *(results.accuracy(part, arm, test) for test in COLUMNS.values())])
    lines += [*table(header, rows), ""]
    compared = [arm for arm in arms if arm != baseline]
    if baseline in arms and compared:
        rows = []
        for arm in compared:
            found = [
                results.difference((part, arm), (part, baseline), test) for test in COLUMNS.values()
            ]
            if found[0] is not None:
                cells = [each.text(signed=True) for each in found]
                rows.append([ARMS[arm].title, found[0].count, *cells])
        lines += [f"Differences from *{ARMS[baseline].title}*, seed by seed, in points:", ""]
        lines += [*table(["arm", "seeds", *COLUMNS], rows), ""]
        lines += [f"![differences]({name}/{part}-differences.png)", ""]
    return [*lines, f"![accuracy against strength]({name}/{part}.png)", ""]


def _cost(cost: dict) -> list[str]:
    rows = []
    for name, figures in cost["arms"].items():
        row = [ARMS[name].title, f"{figures['parameters']:,}"]
        row.append(f"{figures['multiply_adds'] / 1e6:.1f}")
        row += [
            f"{SCATTER_MARK * scatters(*figures[what])}{figures[what][1]:.2f}"
            for what in ("training_ms", "inference_ms")
        ]
        rows.append(row)
    header = ["arm", "parameters", "multiply-adds, M", "training, ms", "inference, ms"]
    machine = cost["machine"]
    lines = [
        "## What it costs",
        "",
        f"For one image of a batch of {BATCH}, one thread of {machine['cpu']}: medians of calls "
        f"taken in turns. {SCATTER_MARK} marks times of which half spread over more than a fifth "
        "of the median, as beside other work: these do not compare.",
        "",
        *table(header, rows),
        "",
    ]
    if MMCV in cost:
        lines += [
            "With mmcv's operator, the runs of DCNv2 here would take about "
            f"{cost['mmcv_training_ratio']:.0f} times as long (medians, in turns with ours).",
            "",
        ]
    return lines


def _made(results: Results, detected: DetectorResults) -> list[str]:
    """Machine, versions, what is missing, and the commands."""
    lines = ["## How to make it", ""]
    environments = dict.fromkeys(_environment(r) for r in [*results.all(), *detected.all()])
    lines += [*(f"Measured on {environment}." for environment in environments), ""]
    missing = [*results.missing, *detected.missing]
    if missing:
        by_part: dict[str, list[str]] = {}
        for job in missing:
            by_part.setdefault(job.part, []).append(f"{job.run.arm}/{job.run.seed}")
        lines += [
            f"**Not finished: {len(missing)} runs** (arm/seed): "
            + "; ".join(f"{part}: {', '.join(names)}" for part, names in by_part.items())
            + ".",
            "",
        ]
    return [
        *lines,
        "```",
        "make evidence                     # goes on with what is not finished",
        "make evidence ARGS=--dry-run      # the grid, and what it costs",
        'make evidence ARGS="--reuse docs/evidence/runs.json"   # goes on with the published one',
        "make evidence ARGS=--quick        # minutes: one seed, a tenth of the epochs",
        'make evidence ARGS="--seeds 10"   # a larger grid',
        'make evidence ARGS="--parts frozen --arms dcn,dcnv2,norm"',
        "```",
    ]


def _environment(result: dict) -> str:
    machine, versions = result["machine"], result["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "mmdcn", "python"))
    return f"{machine['cpu']}, {machine['cores']} cores, one thread for each run; {named}"


def _json(
    results: Results, detected: DetectorResults, cost: dict | None, looked: dict | None
) -> str:
    """All runs, one on each line; machines and versions are written once."""
    environments: list[dict] = []

    def lines(found: Sequence[dict]) -> str:
        written = []
        for result in found:
            entry = dict(result)
            environment = {key: entry.pop(key) for key in ("machine", "versions")}
            if environment not in environments:
                environments.append(environment)
            entry["environment"] = environments.index(environment)
            written.append(json.dumps(entry))
        return "[\n" + ",\n".join(written) + "\n]"

    runs = {"runs": lines(results.all()), "detectors": lines(detected.all())}
    parts = [f'"trainings": {json.dumps({**TRAININGS, **detector_grid.TRAININGS})}']
    parts.append(f'"environments": {json.dumps(environments)}')
    if cost is not None:
        parts.append(f'"cost": {json.dumps(cost)}')
    if looked is not None:
        parts.append(f'"layers": {json.dumps(looked["layers"])}')
    parts += [f'"{name}": {text}' for name, text in runs.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"
