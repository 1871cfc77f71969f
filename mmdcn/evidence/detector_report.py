"""The part of the page about detectors on warped shapes: tables, a plot, and what is concluded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib.figure import Figure

from mmdcn.markdown import table

from .conclusions import compared
from .detector_grid import (
    ARMS,
    IMAGE_SIZE,
    OFFSET_LEARNING_RATE,
    STRENGTHS,
    TRAIN_IMAGES,
    TRAINED_STRENGTH,
    TRAININGS,
    VAL_IMAGES,
)
from .plots import COLOURS, draw_estimates
from .results import Finished
from .spread import Estimate, paired

BASELINES = {"detectors": "plain-size", "detectors-long": "plain-size", "detectors-frozen": "norm"}
PICTURE = "detectors.png"
_TEXT = {
    "detectors": "Every parameter is trained on shapes warped at strength 1, from scratch.",
    "detectors-long": "The same for twice as many iterations, to see whether the plain detectors "
    "had learned all they can, and what is left of the differences.",
    "detectors-frozen": "A plain detector learns shapes that are not warped. Then all of it is "
    "frozen, offset branches are added, and these are trained alone on warped shapes. Statistics "
    "of normalisations follow the new images in every arm: what that gives by itself is an arm.",
}


@dataclass
class DetectorResults(Finished):
    """What is known of detectors: results as :func:`~.detectors.train` gives them."""

    def all(self) -> list[dict]:
        """Every result."""
        return [result for seeds in self.by_arm.values() for _, result in sorted(seeds.items())]

    def arms(self, training: str) -> list[str]:
        """The arms of a training that have results, in the grid's order."""
        return [arm for arm in ARMS if (training, arm) in self.by_arm]

    def ap(self, training: str, arm: str, strength: float) -> dict[int, float]:
        """AP of each seed, in percent; empty where there is none."""
        seeds = self.by_arm.get((training, arm), {})
        return {seed: result["ap"][str(strength)] for seed, result in seeds.items()}

    def difference(
        self, training: str, arm: str, baseline: str, strength: float
    ) -> Estimate | None:
        """AP of an arm less that of another of the same training, seed by seed."""
        return paired(*(self.ap(training, one, strength) for one in (arm, baseline)))


def section(results: DetectorResults, name: str) -> list[str]:
    """The part of the page, as lines; none without results.

    Args:
        results: of the detectors.
        name: of the folder of pictures.
    """
    if not results.by_arm:
        return []
    lines = [
        "## Detectors on warped shapes",
        "",
        "A small Faster R-CNN (three stages of a ResNet-50 of a quarter of the channels, FPN) on "
        f"images of {IMAGE_SIZE}×{IMAGE_SIZE} pixels with two to five warped shapes, with "
        "deformable layers at strides 8 and 16, whose offsets learn at "
        f"{OFFSET_LEARNING_RATE:g} of the rate. Trained on {TRAIN_IMAGES} images, other ones for "
        "each seed, in batches of eight. Tested on the same scenes at increasing strengths of the "
        f"warp ({VAL_IMAGES} images each; 0 is upright, {TRAINED_STRENGTH:g} what was trained on). "
        "COCO's AP in %.",
        "",
    ]
    for training in BASELINES:
        if results.arms(training):
            lines += _training(results, training)
    lines += [f"![AP against the strength of the warp]({name}/{PICTURE})", ""]
    return lines + _offsets(results)


def _training(results: DetectorResults, training: str) -> list[str]:
    arms, baseline = results.arms(training), BASELINES[training]
    title = TRAININGS[training]
    iterations = next(iter(results.by_arm[training, arms[0]].values()))["run"]["iterations"]
    text = f"{_TEXT[training]} {iterations:,} iterations." + _convergence(results, training)
    lines = [f"### {title[0].upper()}{title[1:]}", "", text, ""]
    header = ["arm", "parameters", "seeds", *(f"{strength:g}" for strength in STRENGTHS)]
    rows = []
    upright = ("detectors-upright", "plain")
    if training == "detectors-frozen" and upright in results.by_arm:
        rows.append(_row(results, *upright, "plain, before"))
    rows += [_row(results, training, arm, ARMS[arm].title) for arm in arms]
    lines += [*table(header, rows), ""]
    compared_arms = [arm for arm in arms if arm != baseline]
    if baseline in arms and compared_arms:
        rows = []
        for arm in compared_arms:
            found = [results.difference(training, arm, baseline, s) for s in STRENGTHS]
            if found[0] is not None:
                cells = [each.text(signed=True) for each in found]
                rows.append([ARMS[arm].title, found[0].count, *cells])
        lines += [f"Differences from *{ARMS[baseline].title}*, seed by seed, in points:", ""]
        lines += [*table(["arm", *header[2:]], rows), ""]
    return lines


def _convergence(results: DetectorResults, training: str) -> str:
    """What a longer training changes for the plain detector: whether it had learned all it can."""
    if training != "detectors":
        return ""
    baseline = BASELINES[training]
    longer, shorter = (
        results.ap(kind, baseline, TRAINED_STRENGTH) for kind in ("detectors-long", training)
    )
    change = paired(longer, shorter)
    if change is None:
        return ""
    return (
        f" In twice as many iterations, the AP of *{ARMS[baseline].title}* at strength "
        f"{TRAINED_STRENGTH:g} changes by {compared(change)}."
    )


def _row(results: DetectorResults, training: str, arm: str, title: str) -> list:
    seeds = results.by_arm[training, arm]
    cells = [Estimate.of(list(results.ap(training, arm, s).values())) for s in STRENGTHS]
    return [title, f"{next(iter(seeds.values()))['parameters']:,}", len(seeds), *cells]


def _offsets(results: DetectorResults) -> list[str]:
    """Where the points went, layer by layer."""
    rows = []
    for training, arm in results.by_arm:
        seeds = list(results.by_arm[training, arm].values())
        for layer in seeds[0]["offsets"]:
            values = [seed["offsets"][layer] for seed in seeds]
            mean, _, outside = (sum(column) / len(values) for column in zip(*values))
            largest = max(value[1] for value in values)
            row = [training, ARMS[arm].title, layer, f"{mean:.2f}", f"{largest:.1f}"]
            rows.append([*row, f"{100 * outside:.1f}"])
    if not rows:
        return []
    header = ["training", "arm", "layer", "mean offset", "largest", "outside, %"]
    return [
        "Where the points went, in pixels of each layer's input: the mean and the largest offset "
        "of a coordinate, and the samples that offsets take out of the image.",
        "",
        *table(header, rows, left=3),
        "",
    ]


def figure(results: DetectorResults) -> Figure | None:
    """AP against the strength of the warp; None without results."""
    trainings = [training for training in BASELINES if results.arms(training)]
    if not trainings:
        return None
    drawn = Figure(figsize=(5.2 * len(trainings), 3.9), layout="constrained")
    panels = drawn.subplots(1, len(trainings), squeeze=False)[0]
    for ax, training in zip(panels, trainings):
        for arm in results.arms(training):
            found = [
                Estimate.of(list(results.ap(training, arm, strength).values()))
                for strength in STRENGTHS
            ]
            draw_estimates(ax, STRENGTHS, found, COLOURS[arm], ARMS[arm].title, "-")
        ax.axvspan(TRAINED_STRENGTH, max(STRENGTHS), color="0.95", zorder=0)
        ax.set_title(training.replace("-", ", "), fontsize=11)
        ax.set(xlabel="strength of the warp", ylabel="AP, %")
        ax.grid(color="0.9", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    return drawn


def sentences(results: DetectorResults) -> Iterator[str]:
    """What is concluded, as far as there are results."""
    for training, baseline in BASELINES.items():
        for arm in ("dcn", "dcnv2"):
            for strength in (TRAINED_STRENGTH, max(STRENGTHS)):
                difference = results.difference(training, arm, baseline, strength)
                if difference is None:
                    continue
                ours, theirs = (
                    Estimate.of(list(results.ap(training, one, strength).values())).mean
                    for one in (arm, baseline)
                )
                yield (
                    f"**Detectors {TRAININGS[training]}**, at strength {strength:g}: "
                    f"{ARMS[arm].title} has an AP of {ours:.1f} %, "
                    f"*{ARMS[baseline].title}* {theirs:.1f} %: {compared(difference)}."
                )
