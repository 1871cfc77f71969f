"""Detectors on warped shapes: which are trained how, on which seeds, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

#: Raised with every change after which results do not compare with former ones.
VERSION = 1

CONFIG = "mmdcn::demo/faster-rcnn_r50_fpn_demo.py"
ITERATIONS = 1200
LONG_ITERATIONS = 3 * ITERATIONS
SEEDS = 3
TRAINED_STRENGTH = 1.0
STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
TRAIN_IMAGES, VAL_IMAGES = 2000, 200
# Times the others'. At the whole rate, half of the samples of frozen detectors left the image.
OFFSET_LEARNING_RATE = 0.1
# Layers at strides 8 and 16: the last stage's maps have 6 × 6 positions, of which a kernel covers
# most as it is.
STAGES = (False, True, True, False)


@dataclass(frozen=True)
class Arm:
    """A detector that is compared with others.

    Args:
        title: what tables call it.
        backbone: what its config has beside the plain one's.
        neck: likewise.
        added: what the names of the parameters contain that a frozen detector learns.
    """

    title: str
    backbone: Mapping[str, Any] | None = None
    neck: Mapping[str, Any] | None = None
    added: str | None = None


def _deformable(kind: str, **more: Any) -> dict:
    return {
        "dcn": {"type": kind, "deform_groups": 1, "fallback_on_stride": False, **more},
        "stage_with_dcn": STAGES,
    }


ARMS = {
    "plain": Arm("plain"),
    # A little more than the parameters of DCNv2.
    "plain-size": Arm(
        "plain, parameters of DCNv2", {"base_channels": 17}, {"in_channels": [136, 272, 544]}
    ),
    "dcn": Arm("DCN", _deformable("DCN"), added="conv_offset"),
    "dcnv2": Arm("DCNv2", _deformable("DCNv2"), added="conv_offset"),
    "dcnv4": Arm("DCNv4", _deformable("DCNv4")),
    "norm": Arm("norm statistics only", added="nothing"),
}

TRAININGS = {
    "detectors": "trained on warped shapes from scratch",
    "detectors-upright": "trained on shapes that are not warped",
    "detectors-long": "trained three times as long on warped shapes from scratch",
    "detectors-frozen": "trained on shapes that are not warped, all else frozen, then only what is "
    "added trained on warped shapes",
}


@dataclass(frozen=True)
class DetectorRun:
    """What is trained.

    Args:
        training: one of :data:`TRAININGS`.
        arm: a name of :data:`ARMS`.
        iterations: of eight images.
        seed: of the weights and of the order of images.
        test_images: of each set.
    """

    training: str
    arm: str
    iterations: int
    seed: int
    test_images: int = VAL_IMAGES

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.training}_{self.arm}_{self.iterations}-iterations_seed-{self.seed}"

    @property
    def is_frozen(self) -> bool:
        return self.training == "detectors-frozen"

    @property
    def base(self) -> DetectorRun | None:
        """The run whose weights it starts from, if it does."""
        if not self.is_frozen:
            return None
        return replace(self, training="detectors-upright", arm="plain")

    def settings(self) -> dict:
        """All that its result follows from, apart from versions and machine."""
        return {
            **asdict(self),
            "version": VERSION,
            "stages": [index + 2 for index, is_deformable in enumerate(STAGES) if is_deformable],
            "offset_learning_rate": OFFSET_LEARNING_RATE,
            "train_images": TRAIN_IMAGES,
        }


MAIN = ("plain", "plain-size", "dcn", "dcnv2", "dcnv4")
LONG = ("plain", "plain-size", "dcn", "dcnv2")
FROZEN = ("norm", "dcn", "dcnv2")

# Seconds of one core for one iteration; what another machine takes is known after its first runs.
SECONDS_PER_ITERATION = {
    "plain": 0.45,
    "plain-size": 0.5,
    "dcn": 0.5,
    "dcnv2": 0.5,
    "dcnv4": 0.5,
    "norm": 0.45,
}


def runs(
    arms: Sequence[str] | None = None, seeds: int | None = None, quick: bool = False
) -> list[DetectorRun]:
    """The runs, a seed after the other; each after the one that it starts from.

    Args:
        arms: of these alone; None for all.
        seeds: for every arm; None for the published number.
        quick: one seed, a hundredth of the iterations, few images: a look at whether all works,
            no evidence.
    """
    iterations, images = (ITERATIONS // 100, 8) if quick else (ITERATIONS, VAL_IMAGES)
    found = []
    for seed in range(1 if quick else seeds or SEEDS):
        chosen = [("detectors", arm) for arm in MAIN] + [
            ("detectors-frozen", arm) for arm in FROZEN
        ]
        own = [
            DetectorRun(training, arm, iterations, seed, images)
            for training, arm in chosen
            if arms is None or arm in arms
        ]
        found += [run.base for run in own if run.base is not None][:1] + own
    return sorted(found, key=lambda run: (run.seed, run.is_frozen))


def long_runs(
    arms: Sequence[str] | None = None, seeds: int | None = None, quick: bool = False
) -> list[DetectorRun]:
    """Runs that are three times as long, a seed after the other; two hours of one core for a seed.

    They are no part of the published grid, and show whether its detectors had learned all they can.
    """
    iterations, images = (LONG_ITERATIONS // 100, 8) if quick else (LONG_ITERATIONS, VAL_IMAGES)
    return [
        DetectorRun("detectors-long", arm, iterations, seed, images)
        for seed in range(1 if quick else seeds or SEEDS)
        for arm in LONG
        if arms is None or arm in arms
    ]


def seconds(run: DetectorRun) -> float:
    """What a run takes of one core, about: its iterations, and tests."""
    return SECONDS_PER_ITERATION[run.arm] * run.iterations + 0.4 * run.test_images + 10
