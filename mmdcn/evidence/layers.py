"""What the layers do: how features move with the digit, how far apart points are sampled, and what
one output sees."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from mmdcn import files
from mmdcn.engine.sampled_calls import named_calls
from mmdcn.errors import InputError
from mmdcn.markdown import table
from mmdcn.ops._observers import SampledCall

from . import receptive
from .digits import Digits
from .grid import EPOCHS, FEW_SEEDS
from .nets import ARMS, STRIDES, DigitNet
from .spread import Estimate, paired
from .training import Run, trained, weights_file
from .transforms import similarity, warp_features

VERSION = 2
COUNT = 200  # digits
MOVES = {"30°": (math.radians(30), 1.0), "60°": (math.radians(60), 1.0), "×1.6": (0.0, 1.6)}
FACTORS = (1 / 1.6, 1.0, 1.6)
COMPARED = ("plain", "dcn", "dcnv2")
# What was measured, beside the runs.
MEASURED = "layers.json"


def runs(folder: Path) -> list[Run]:
    """The runs from scratch whose weights are there, of the arms that are compared."""
    found = [Run("scratch", arm, EPOCHS, seed) for arm in COMPARED for seed in range(FEW_SEEDS)]
    return [run for run in found if weights_file(run, folder).is_file()]


def measure(folder: Path, digits: Digits) -> dict:
    """Measure the networks that the grid has left, and that were not measured before.

    Args:
        folder: of the runs.
        digits: all of them.

    Raises:
        InputError: what was measured before cannot be read.

    Returns:
        For each run its arm and seed, ``equivariance`` by move (one number for each stage) and, of
        deformable ones, ``dilation`` by factor (one number for each deformable layer), and
        ``receptive`` by factor, see :func:`~.receptive.measure`.
    """
    known = {(entry["arm"], entry["seed"]): entry for entry in remembered(folder)}
    for run in runs(folder):
        if (run.arm, run.seed) not in known:
            known[run.arm, run.seed] = _measure(run, trained(run, folder), _images(run, digits))
    remember(list(known.values()), folder)
    order = sorted(known, key=lambda key: (COMPARED.index(key[0]), key[1]))
    return {"run": {"version": VERSION}, "layers": [known[key] for key in order]}


def _measure(run: Run, network: DigitNet, images: Tensor) -> dict:
    entry: dict = {"arm": run.arm, "seed": run.seed}
    entry["equivariance"] = {
        name: [round(value, 4) for value in equivariance(network, images, *move)]
        for name, move in MOVES.items()
    }
    if run.arm != "plain":
        entry["dilation"] = {
            f"{factor:.2f}": [round(v, 3) for v in effective_dilation(network, images, factor)]
            for factor in FACTORS
        }
    entry["receptive"] = {
        f"{factor:.2f}": {
            name: round(value, 4)
            for name, value in receptive.measure(network, images, factor).items()
        }
        for factor in receptive.FACTORS
    }
    return entry


def remembered(folder: Path) -> list[dict]:
    """What was measured before, in a folder of runs."""
    try:
        return json.loads((folder / MEASURED).read_text())["layers"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        path = folder / MEASURED
        raise InputError(f"{path} cannot be read ({error}): delete it, and run again") from error


def remember(entries: Sequence[dict], folder: Path) -> None:
    """Keep what was measured, as far as it has all that is measured now."""
    kept = {(entry["arm"], entry["seed"]): entry for entry in remembered(folder)}
    kept |= {(entry["arm"], entry["seed"]): entry for entry in entries if "receptive" in entry}
    if kept:
        text = json.dumps({"layers": list(kept.values())}, indent=1)
        files.write(folder / MEASURED, text + "\n")


def figures(folder: Path, digits: Digits) -> dict[str, Figure]:
    """The pictures of the networks that the grid has left, by the names of their files."""
    networks: dict[str, list[DigitNet]] = {}
    for run in runs(folder):
        networks.setdefault(run.arm, []).append(trained(run, folder))
    if not networks:
        return {}
    images = _images(Run("scratch", "plain", EPOCHS, 0), digits)
    return {"receptive.png": receptive.figure(networks, images)}


def _images(run: Run, digits: Digits) -> Tensor:
    """Digits that the run has not seen."""
    return digits.fold(run.seed)[1].images[:: 1000 // COUNT]


@torch.no_grad()
def equivariance(network: DigitNet, images: Tensor, angle: float, factor: float) -> list[float]:
    """How far features of a moved digit are from its moved features, after each stage.

    Returns:
        The norm of the difference, relative to that of the moved features: 0 where features move
        with the digit.
    """
    still = network.features(similarity(images))
    moved = network.features(similarity(images, angle, factor))
    distances = []
    for before, after in zip(still, moved):
        expected = warp_features(before, angle, factor)
        # What comes from outside the canvas is not known.
        known = warp_features(torch.ones_like(before), angle, factor) > 0.99
        difference = ((after - expected) * known).flatten(1).norm(dim=1)
        distances.append((difference / (expected * known).flatten(1).norm(dim=1)).mean().item())
    return distances


@torch.no_grad()
def effective_dilation(network: nn.Module, images: Tensor, factor: float) -> list[float]:
    """The mean distance of neighbouring taps' points on the digit (arXiv 1703.06211, section 3).

    Returns:
        For each deformable layer, in pixels of its input: 1 for a plain convolution.
    """
    moved = similarity(images, factor=factor)
    distances: list[float] = []

    def look(name: str, module: nn.Module, describe: Callable[[], SampledCall]) -> None:
        points = describe().locations  # (N, G, K, 2, Ho, Wo)
        stride = moved.shape[-1] // points.shape[-1]
        on_digit = nn.functional.max_pool2d(moved, stride) > 0.5  # (N, 1, Ho, Wo)
        grid = points.unflatten(2, (3, 3))
        apart = [(grid.diff(dim=dim) ** 2).sum(dim=4).sqrt() for dim in (2, 3)]
        mean = (apart[0].mean(dim=(1, 2, 3)) + apart[1].mean(dim=(1, 2, 3))) / 2
        distances.append(mean[on_digit[:, 0]].mean().item())

    with named_calls(network, look):
        network(moved)
    return distances


def section(found: dict, pictures: Mapping[str, str]) -> list[str]:
    """The part of the page, as lines.

    Args:
        found: what :func:`measure` gave.
        pictures: where those of :func:`figures` are, by their names.
    """
    entries = found["layers"]
    arms = [arm for arm in COMPARED if any(entry["arm"] == arm for entry in entries)]
    if not arms:
        return []
    header = ["move", "arm", "seeds", *(f"stage {n + 1}" for n in range(len(STRIDES)))]
    rows = []
    for move in MOVES:
        values = {arm: _by_stage(entries, arm, "equivariance", move) for arm in arms}
        for arm, stages in values.items():
            rows.append([move, ARMS[arm].title, len(stages[0])])
            rows[-1] += [f"{Estimate.of(list(stage.values())).mean:.3f}" for stage in stages]
        for arm in arms[1:]:
            rows.append([move, f"{ARMS[arm].title} − plain", len(values[arm][0])])
            rows[-1] += [_difference(*pair) for pair in zip(values[arm], values["plain"])]
    lines = [
        "## What the layers do",
        "",
        "**Do features move with the digit?** The distance between the features of a turned or "
        "enlarged digit and its turned or enlarged features, relative to the latter, after each "
        "stage; 0 would be full equivariance. Networks trained on transformed digits from "
        f"scratch, {COUNT} held-out digits each. The first stage has no deformable layer.",
        "",
        *table(header, rows, left=2),
        "",
    ]
    deformable = [arm for arm in arms if arm != "plain"]
    rows = []
    for arm in deformable:
        for factor in FACTORS:
            layers = _by_stage(entries, arm, "dilation", f"{factor:.2f}")
            rows.append([ARMS[arm].title, f"×{factor:.2f}"])
            rows[-1] += [f"{Estimate.of(list(layer.values())).mean:.2f}" for layer in layers]
    if rows:
        lines += [
            "**Do points spread with the size of the digit?** The mean distance between the "
            "sampling points of neighbouring taps, at positions on the digit, in pixels of the "
            "layer's input; a plain convolution has 1.",
            "",
            *table(["arm", "size", *(f"layer {n}" for n in range(2, 6))], rows, left=2),
            "",
        ]
    return lines + receptive.section(entries, arms, pictures.get("receptive.png"))


def sentences(found: dict) -> list[str]:
    """What is concluded, as far as there are networks of three seeds."""
    said = []
    for arm in COMPARED[1:]:
        own = [entry for entry in found["layers"] if entry["arm"] == arm]
        if len(own) < FEW_SEEDS or not any(e["arm"] == "plain" for e in found["layers"]):
            continue
        parts = []
        for move in MOVES:
            difference = paired(
                _by_stage(found["layers"], arm, "equivariance", move)[-1],
                _by_stage(found["layers"], "plain", "equivariance", move)[-1],
            )
            if difference is None or difference.half_width is None:
                continue
            words = {1: "farther", 0: "not told apart", -1: "nearer"}[difference.sign]
            parts.append(f"{move} {words} ({difference.mean:+.3f} ± {difference.half_width:.3f})")
        small, large = (
            _by_stage(found["layers"], arm, "dilation", f"{factor:.2f}")
            for factor in (FACTORS[0], FACTORS[-1])
        )
        spread = [paired(*layer) for layer in zip(large, small)]
        wider = [str(n) for n, each in enumerate(spread, 2) if each is not None and each.sign > 0]
        said.append(
            "**Do features move with the digit?** After the last stage, the features of "
            f"{ARMS[arm].title} are, of the moved features and against plain, {', '.join(parts)}. "
            "**Do points spread with the digit's size**, from ×0.62 to ×1.6? Of layers 2 to 5, "
            f"they do in {', '.join(wider) or 'none'}."
        )
        said.append(receptive.sentence(found["layers"], arm))
    return [text for text in said if text is not None]


def _by_stage(entries: Sequence[dict], arm: str, what: str, key: str) -> list[dict[int, float]]:
    """For each stage, the value of each seed."""
    own = {entry["seed"]: entry[what][key] for entry in entries if entry["arm"] == arm}
    stages = len(next(iter(own.values())))
    return [{seed: values[stage] for seed, values in own.items()} for stage in range(stages)]


def _difference(first: dict[int, float], second: dict[int, float]) -> str:
    found = paired(first, second)
    if found is None:
        return ""
    width = "" if found.half_width is None else f" ± {found.half_width:.3f}"
    return f"{found.mean:+.3f}{width}"
