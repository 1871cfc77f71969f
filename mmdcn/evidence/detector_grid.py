"""Detectors on warped shapes: which are trained how, on which seeds, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

#: Raised with every change after which results do not compare with former ones.
VERSION = 2

CONFIG = "mmdcn::demo/faster-rcnn_r50_fpn_demo.py"
# So small images and so few of them, other ones for each seed, that a plain detector learns all it
# can: it does not become better in twice as many iterations.
IMAGE_SIZE = 96
TRAIN_IMAGES, VAL_IMAGES = 500, 200
ITERATIONS = 1200
LONG_ITERATIONS = 2 * ITERATIONS
SEEDS = 3
TRAINED_STRENGTH = 1.0
STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
# Times the others'. At the whole rate, half of the samples of frozen detectors left the image.
OFFSET_LEARNING_RATE = 0.1
# Layers at strides 8 and 16.
STAGES = (False, True, True)

#: What the detector has in place of what the config has: half the strides, for images of half the
#: size, and less of what is no part of the backbone.
DETECTOR = {
    "backbone": {
        "num_stages": 3,
        "strides": (1, 2, 2),
        "dilations": (1, 1, 1),
        "out_indices": (0, 1, 2),
    },
    "neck": {"in_channels": [64, 128, 256]},
    "rpn_head": {"anchor_generator": {"strides": [4, 8, 16], "scales": [5]}},
    "roi_head": {
        "bbox_roi_extractor": {
            # RoI Align, but faster on CPUs than mmcv's.
            "roi_layer": {"type": "DeformRoIPool"},
            "featmap_strides": [4, 8, 16],
            "finest_scale": 24,
        },
        "bbox_head": {"num_shared_convs": 0},
    },
    "train_cfg": {"rpn_proposal": {"nms_pre": 150, "max_per_img": 100}},
    "test_cfg": {"rpn": {"nms_pre": 150}},
}


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
        "plain, parameters of DCNv2", {"base_channels": 18}, {"in_channels": [72, 144, 288]}
    ),
    "dcn": Arm("DCN", _deformable("DCN"), added="conv_offset"),
    "dcnv2": Arm("DCNv2", _deformable("DCNv2"), added="conv_offset"),
    "dcnv4": Arm("DCNv4", _deformable("DCNv4")),
    "norm": Arm("norm statistics only", added="nothing"),
}

TRAININGS = {
    "detectors": "trained on warped shapes from scratch",
    "detectors-upright": "trained on shapes that are not warped",
    "detectors-long": "trained twice as long on warped shapes from scratch",
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
            "image_size": IMAGE_SIZE,
            "train_images": TRAIN_IMAGES,
        }


#: The trainings and arms of each part.
PARTS = {
    "detectors": [
        *(("detectors", arm) for arm in ("plain", "plain-size", "dcn", "dcnv2", "dcnv4")),
        *(("detectors-frozen", arm) for arm in ("norm", "dcn", "dcnv2")),
    ],
    "detectors-long": [("detectors-long", arm) for arm in ("plain-size", "dcn", "dcnv2")],
}

# Seconds of one core for one iteration; what another machine takes is known after its first runs.
SECONDS_PER_ITERATION = {
    "plain": 0.28,
    "plain-size": 0.3,
    "dcn": 0.32,
    "dcnv2": 0.33,
    "dcnv4": 0.33,
    "norm": 0.28,
}


def runs(
    parts: Sequence[str] = tuple(PARTS),
    arms: Sequence[str] | None = None,
    seeds: int | None = None,
    quick: bool = False,
) -> list[DetectorRun]:
    """The runs, a seed after the other; each after the one that it starts from.

    Args:
        parts: names of :data:`PARTS`; others are left out.
        arms: of these alone; None for all.
        seeds: for every arm; None for the published number.
        quick: one seed, a hundredth of the iterations, few images: a look at whether all works,
            no evidence.
    """
    images = 8 if quick else VAL_IMAGES
    found = []
    for part, seed in product(PARTS, range(1 if quick else seeds or SEEDS)):
        if part not in parts:
            continue
        iterations = LONG_ITERATIONS if part == "detectors-long" else ITERATIONS
        own = [
            DetectorRun(training, arm, iterations // 100 if quick else iterations, seed, images)
            for training, arm in PARTS[part]
            if arms is None or arm in arms
        ]
        bases = dict.fromkeys(run.base for run in own if run.base is not None)
        found += sorted([*bases, *own], key=lambda run: run.is_frozen)
    return found


def seconds(run: DetectorRun) -> float:
    """What a run takes of one core, about: its iterations, and tests."""
    return SECONDS_PER_ITERATION[run.arm] * run.iterations + 0.4 * run.test_images + 10
