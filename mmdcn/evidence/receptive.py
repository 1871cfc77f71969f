"""Effective receptive fields: where on the canvas one output of the last stage gets its value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from mmdcn.markdown import table

from .nets import ARMS, DigitNet
from .spread import Estimate, paired
from .transforms import similarity

FACTORS = (1 / 1.6, 1.0, 1.6)
# Turned and enlarged by these, for the picture.
MOVES = {"×⅝": (0.0, 1 / 1.6), "as it is": (0.0, 1.0), "×1.6": (0.0, 1.6), "60°": (60.0, 1.0)}


def fields(network: DigitNet, images: Tensor) -> Tensor:
    """The gradients of the middle output of the last stage (arXiv 1701.04128, section 2).

    Args:
        network: in inference mode.
        images: (N, 1, S, S).

    Returns:
        (N, S, S), the magnitude of what each pixel would change, over all channels together; the
        sum of each image's is 1.
    """
    images = images.clone().requires_grad_()
    last = network.features(images)[-1]
    middle = last.shape[-1] // 2
    (gradient,) = torch.autograd.grad(last[:, :, middle, middle].sum(), images)
    size = gradient.abs()[:, 0]
    return size / size.sum(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def measure(network: DigitNet, images: Tensor, factor: float) -> dict[str, float]:
    """How large the fields are, and how much of them is on the digit.

    Returns:
        ``radius``, the root of the mean square distance from the field's own middle, in pixels;
        ``on_digit``, the share of the field on the digit and the pixels around it; ``digit``, the
        share of the canvas that these are.
    """
    moved = similarity(images, factor=factor)
    field = fields(network, moved)
    axis = torch.arange(field.shape[-1], dtype=field.dtype)
    rows, columns = field.sum(dim=2), field.sum(dim=1)
    spread = sum(
        (part * axis**2).sum(dim=1) - (part * axis).sum(dim=1) ** 2 for part in (rows, columns)
    )
    on_digit = (F.max_pool2d(moved, 3, 1, 1)[:, 0] > 0.5).float()
    return {
        "radius": spread.sqrt().mean().item(),
        "on_digit": (field * on_digit).sum(dim=(1, 2)).mean().item(),
        "digit": on_digit.mean().item(),
    }


def section(entries: Sequence[Mapping], arms: Sequence[str], picture: str | None) -> list[str]:
    """The part of the page, as lines.

    Args:
        entries: of :func:`~.layers.measure`.
        arms: those that have entries.
        picture: where :func:`figure` is; None where it is not.
    """
    rows = []
    for factor in map("{:.2f}".format, FACTORS):
        for arm in arms:
            own = _by_seed(entries, arm, factor)
            row = [f"×{factor}", ARMS[arm].title, len(own)]
            row.append(f"{Estimate.of([v['radius'] for v in own.values()]).mean:.2f}")
            for what in ("on_digit", "digit"):
                row.append(f"{100 * Estimate.of([v[what] for v in own.values()]).mean:.1f}")
            rows.append(row)
    header = ["size", "arm", "seeds", "radius, pixels", "of it on the digit, %"]
    header.append("the digit, % of the canvas")
    lines = [
        "**What does one output see?** The effective receptive field of the middle output of the "
        "last stage: how much each pixel would change it (arXiv 1701.04128), its radius, and how "
        "much of it lies on the digit and the pixels around it.",
        "",
        *table(header, rows, left=2),
        "",
    ]
    if picture is not None:
        lines += [f"![effective receptive fields]({picture})", ""]
    return lines


def sentence(entries: Sequence[Mapping], arm: str) -> str | None:
    """What is concluded of an arm against the plain network; None with fewer than two seeds."""
    said = []
    for factor in (FACTORS[0], FACTORS[-1]):
        key = f"{factor:.2f}"
        own, plain = (_by_seed(entries, name, key) for name in (arm, "plain"))
        difference = paired(
            *({s: 100 * v["on_digit"] for s, v in one.items()} for one in (own, plain))
        )
        if difference is None or difference.half_width is None:
            return None
        shares = [
            Estimate.of([100 * one[seed]["on_digit"] for seed in one]).mean for one in (own, plain)
        ]
        said.append(
            f"at ×{key} {shares[0]:.0f} % of the field is on the digit, of the plain network's "
            f"{shares[1]:.0f} % ({difference.text(signed=True)} points)"
        )
    growths = [_growth(entries, name) for name in (arm, "plain")]
    return (
        f"**What does one output see?** With {ARMS[arm].title}, {' and '.join(said)}; from the one "
        f"size to the other its radius grows by {growths[0].text()} pixels, the plain network's by "
        f"{growths[1].text()}."
    )


def _growth(entries: Sequence[Mapping], arm: str) -> Estimate:
    """Of the radius, from the smallest size to the largest."""
    small, large = (
        {seed: value["radius"] for seed, value in _by_seed(entries, arm, f"{factor:.2f}").items()}
        for factor in (FACTORS[0], FACTORS[-1])
    )
    return paired(large, small)


def _by_seed(entries: Sequence[Mapping], arm: str, factor: str) -> dict[int, Mapping]:
    return {e["seed"]: e["receptive"][factor] for e in entries if e["arm"] == arm}


def figure(networks: Mapping[str, Sequence[DigitNet]], images: Tensor) -> Figure:
    """The mean fields of each arm over moved digits, with the outline of the mean digit.

    Args:
        networks: for each arm, those of its seeds.
        images: (N, 28, 28).
    """
    shape = (len(networks), len(MOVES))
    drawn = Figure(figsize=(1.75 * shape[1], 1.75 * shape[0] + 0.2), layout="constrained")
    panels = drawn.subplots(*shape, squeeze=False)
    for column, (move, (degrees, factor)) in enumerate(MOVES.items()):
        moved = similarity(images, math.radians(degrees), factor)
        maps = {
            arm: torch.stack([fields(network, moved).mean(dim=0) for network in of_seeds]).mean(0)
            for arm, of_seeds in networks.items()
        }
        # Strides leave a pattern of single pixels, which hides the shape.
        maps = {arm: F.avg_pool2d(m[None, None], 5, 1, 2)[0, 0] for arm, m in maps.items()}
        outline = F.avg_pool2d(moved.mean(dim=0), 5, 1, 2)[0].numpy()
        brightest = max(m.max().item() for m in maps.values())
        for row, (arm, field) in enumerate(maps.items()):
            ax = panels[row, column]
            ax.imshow(field.numpy(), cmap="magma", vmin=0, vmax=brightest)
            ax.contour(outline, [0.2], colors="white", linewidths=0.9)
            ax.set(xticks=[], yticks=[], title=move if row == 0 else "")
            if column == 0:
                ax.set_ylabel(ARMS[arm].title)
    return drawn
