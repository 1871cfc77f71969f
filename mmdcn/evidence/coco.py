"""Results on COCO that others published, beside our configs that train the same detectors.

Most figures are read from the metafiles of the installed mmdet, which wrote them down with its
released checkpoints; those of the authors of arXiv 1703.06211 stand in the README of their code.
None of them was measured here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mmengine

from mmdcn.markdown import table

#: Our configs, each with the name of mmdet's; pairs of plain and deformable ones of one detector.
ROWS = {
    "Faster R-CNN R-50": (
        "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
        "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
        "dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py",
        "dcnv2/faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco.py",
    ),
    "Faster R-CNN R-101": (
        "faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py",
        "dcn/faster-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py",
    ),
    "Faster R-CNN X-101-32x4d": (
        "faster_rcnn/faster-rcnn_x101-32x4d_fpn_1x_coco.py",
        "dcn/faster-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco.py",
    ),
    "Mask R-CNN R-50": (
        "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
        "dcn/mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
        "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py",
    ),
    "Mask R-CNN R-101": (
        "mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py",
        "dcn/mask-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py",
    ),
    "Cascade R-CNN R-50": (
        "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
        "dcn/cascade-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
    ),
    "Cascade R-CNN R-101": (
        "cascade_rcnn/cascade-rcnn_r101_fpn_1x_coco.py",
        "dcn/cascade-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py",
    ),
    "Cascade Mask R-CNN R-50": (
        "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
        "dcn/cascade-mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
    ),
    "Cascade Mask R-CNN R-101": (
        "cascade_rcnn/cascade-mask-rcnn_r101_fpn_1x_coco.py",
        "dcn/cascade-mask-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py",
    ),
}
_LAYERS = {"dcn": "DCN", "dcnv2": "DCNv2"}
CONFIGS = Path(__file__).parents[1] / ".mim" / "configs"
SOURCE = "https://github.com/open-mmlab/mmdetection/blob/v3.3.0/configs"

AUTHORS = "https://github.com/msracver/Deformable-ConvNets"
#: What the authors published with their code: AP, AP50, AP75, and AP of small, medium and large
#: objects, plain and deformable (convolution and RoI pooling), all with ResNet-101.
BY_THE_AUTHORS = {
    ("R-FCN", "test-dev"): (
        (32.1, 54.3, 33.8, 12.8, 34.9, 46.1),
        (35.7, 56.8, 38.3, 15.2, 38.8, 51.5),
    ),
    ("Faster R-CNN, two layers in its head", "test-dev"): (
        (30.3, 52.1, 31.4, 9.9, 32.2, 47.4),
        (35.0, 55.0, 38.3, 14.3, 37.7, 52.0),
    ),
    ("FPN with hard example mining", "minival"): (
        (37.8, 60.8, 41.0, 22.0, 41.5, 49.8),
        (41.2, 63.5, 45.5, 24.3, 44.9, 54.4),
    ),
}


@dataclass(frozen=True)
class Published:
    """What mmdet published of one of its configs.

    Args:
        box_ap: in percent.
        mask_ap: in percent, where there are masks.
        memory: in training, GB for each GPU.
        milliseconds: of one image at inference.
    """

    box_ap: float
    mask_ap: float | None
    memory: float | None
    milliseconds: float | None


def published(config: str) -> Published:
    """What mmdet's metafile says of a config.

    Args:
        config: such as ``dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py``.

    Raises:
        KeyError: the metafile does not know it.
        ImportError: mmdet is not installed.
    """
    from mmdcn.zoo import FOLDER

    metafile = (FOLDER / config).with_name("metafile.yml")
    models = mmengine.load(metafile)["Models"]
    entry = {model["Config"]: model for model in models}[f"configs/{config}"]
    metrics = {name: ap for found in entry["Results"] for name, ap in found["Metrics"].items()}
    metadata = entry["Metadata"]
    times = metadata.get("inference time (ms/im)", [{}])
    return Published(
        metrics["box AP"],
        metrics.get("mask AP"),
        metadata.get("Training Memory (GB)"),
        times[0].get("value"),
    )


def section() -> list[str]:
    """The part of the page, as lines; none without mmdet."""
    try:
        rows = list(_rows())
    except ImportError:
        return []
    header = ["detector", "layers", "box AP", "mask AP", "memory, GB", "images/s", "source"]
    return [
        "## On COCO, as published by others",
        "",
        "**Nothing in this table was measured here.** It is what mmdet's metafiles say of its "
        "released models: COCO val2017, 12 epochs, 8 V100 GPUs for training and one for the speed; "
        "deformable layers in c3 to c5, by mmcv's operator. What was checked here is that our "
        "configs build the same models: keys and shapes of the weights equal those of mmdet's own "
        "configs with mmcv's layers. The checkpoints were not at hand.",
        "",
        *table([*header, "to train it"], rows, left=2),
        "",
        "Each command is `tools/dist_train.sh CONFIG 8`; configs without a link are mmdet's own, "
        "by `mmdet::`.",
        "",
        *_by_the_authors(),
    ]


def _by_the_authors() -> list[str]:
    rows = [
        [detector, images, layers, *(f"{ap:.1f}" for ap in figures)]
        for (detector, images), pair in BY_THE_AUTHORS.items()
        for layers, figures in zip(("plain", "deformable"), pair)
    ]
    header = ["detector, ResNet-101", "images", "layers", "AP", "AP50", "AP75", "APs", "APm", "APl"]
    return [
        "The authors of deformable convolution (arXiv 1703.06211) publish these with "
        f"[their code]({AUTHORS}), for MXNet; deformable there is RoI pooling too:",
        "",
        *table(header, rows, left=3),
        "",
    ]


def _rows() -> Iterator[list[str]]:
    for detector, configs in ROWS.items():
        plain = published(configs[0])
        for config in configs:
            found = published(config)
            folder = config.partition("/")[0]
            layers = _LAYERS.get(folder, "plain") + ", 4 offset groups" * ("group4" in config)
            gain = "" if config == configs[0] else f" ({found.box_ap - plain.box_ap:+.1f})"
            speed = "" if found.milliseconds is None else f"{1000 / found.milliseconds:.1f}"
            ours = (CONFIGS / config).is_file()
            yield [
                detector,
                layers,
                f"{found.box_ap:.1f}{gain}",
                "" if found.mask_ap is None else f"{found.mask_ap:.1f}",
                "" if found.memory is None else f"{found.memory:.1f}",
                speed,
                f"[metafile]({SOURCE}/{folder}/metafile.yml)",
                f"`configs/{config}`" if ours else f"`mmdet::{config}`",
            ]
