"""The decoders against mmdet's own, in PyTorch."""

import copy

import pytest
import torch

pytest.importorskip("mmdet")

from mmdcn.deploy.comparison import LEAST_MATCHED, Matches, match
from mmdcn.deploy.detector import EndToEnd
from mmdcn.deploy.masks import paste_masks
from mmdcn.deploy.refusals import ExportError

from . import tiny

pytestmark = pytest.mark.usefixtures("plugin_in_mmdet")

# Of two images the second is smaller, and boxes are clipped to it.
SIZES = ((64, 96), (50, 70))


def compare(detector, sizes=SIZES, least=30):
    """Detections of mmdet and of ours, of which there are at least so many in each image."""
    batch, sizes = tiny.images(*sizes)
    expected = tiny.predicted(copy.deepcopy(detector), batch, sizes)
    with torch.no_grad():
        outputs = EndToEnd(detector)(batch, sizes)
    for image, sample in enumerate(expected):
        ours = [output[image] for output in outputs]
        theirs = sample.pred_instances
        used = ours[1] > 0
        assert used.sum() == len(theirs) >= least
        assert (ours[0][~used] == 0).all() and (ours[2][~used] == 0).all()
        assert (ours[1].diff() <= 0).all()
        places = match((theirs.bboxes, theirs.scores, theirs.labels), ours[:3])
        assert (places >= 0).float().mean() >= LEAST_MATCHED
        if "masks" in theirs:
            found = places >= 0
            height, width = sizes[image].tolist()
            pasted = paste_masks(
                ours[3][places[found]].numpy(), ours[0][places[found]].numpy(), height, width
            )
            assert theirs.masks.any()
            assert (torch.from_numpy(pasted) == theirs.masks[found]).float().mean() > 0.999
            assert (ours[3][~used] == 0).all()


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_detections_are_mmdets(name):
    compare(tiny.build(tiny.config(name, "DCNv2")))


def test_fewer_candidates_than_places():
    """Places are left at each level, and among proposals and detections."""
    for name in ("faster-rcnn", "retinanet"):
        options = {"model.test_cfg.nms_pre": 1000, "model.test_cfg.max_per_img": 300}
        if name == "faster-rcnn":
            options = {
                "model.test_cfg.rpn.nms_pre": 1000,
                "model.test_cfg.rpn.max_per_img": 1000,
                "model.test_cfg.rcnn.max_per_img": 300,
            }
        compare(tiny.build(tiny.config(name, **options)), sizes=((32, 32),), least=10)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("retinanet", {"model.test_cfg.nms.class_agnostic": True}),
        ("retinanet", {"model.test_cfg.score_thr": 0.5}),
        ("retinanet", {"model.bbox_head.loss_cls": dict(_delete_=True, type="CrossEntropyLoss")}),
        ("faster-rcnn", {"model.test_cfg.rcnn.nms.class_agnostic": True}),
        ("faster-rcnn", {"model.test_cfg.rpn.nms.class_agnostic": True}),
        ("faster-rcnn", {"model.test_cfg.rpn.min_bbox_size": 8}),
        ("faster-rcnn", {"model.test_cfg.rcnn.score_thr": 0.3}),
        ("faster-rcnn", {"model.roi_head.bbox_head.reg_class_agnostic": True}),
        ("faster-rcnn", {"model.rpn_head.loss_cls.use_sigmoid": False}),
        ("faster-rcnn", {"model.roi_head.bbox_head.bbox_coder.clip_border": False}),
        ("faster-rcnn", tiny.DEFORMABLE_POOLING),
        ("mask-rcnn", {"model.roi_head.mask_head.class_agnostic": True}),
        ("mask-rcnn", {"model.roi_head.mask_roi_extractor": None}),  # shared
        ("tood", {"model.bbox_head.anchor_type": "anchor_based"}),
        ("reppoints", {"model.bbox_head.transform_method": "minmax"}),
    ],
)
def test_settings_are_followed(name, options):
    compare(tiny.build(tiny.config(name, **options)), least=3)


def test_no_detection():
    cfg = tiny.config("mask-rcnn", **{"model.test_cfg.rcnn.score_thr": 1.0})
    with torch.no_grad():
        outputs = EndToEnd(tiny.build(cfg))(*tiny.images(*SIZES))
    assert [tuple(output.shape) for output in outputs] == [
        (2, 40, 4),
        (2, 40),
        (2, 40),
        (2, 40, 28, 28),
    ]
    assert all((output == 0).all() for output in outputs)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (
            "retinanet",
            {"model.test_cfg.nms.type": "soft_nms"},
            "bbox_head.nms: expected .*soft_nms",
        ),
        ("retinanet", {"model.test_cfg.nms.max_num": 3}, "bbox_head.nms: expected .*max_num"),
        ("retinanet", {"model.test_cfg.nms_pre": -1}, "nms_pre: expected a positive .*, got -1"),
        ("retinanet", {"model.test_cfg.min_bbox_size": 4}, "min_bbox_size: expected 0, .*got 4"),
        ("faster-rcnn", {"model.test_cfg.rcnn.max_per_img": -1}, "rcnn.max_per_img: .*got -1"),
        (
            "faster-rcnn",
            {
                "model.roi_head.bbox_roi_extractor": dict(
                    _delete_=True,
                    type="GenericRoIExtractor",
                    roi_layer=dict(type="RoIAlign", output_size=7),
                    out_channels=32,
                    featmap_strides=[4, 8],
                )
            },
            "bbox_roi_extractor: .*, got GenericRoIExtractor",
        ),
        (
            "faster-rcnn",
            {
                "model.roi_head.bbox_roi_extractor.roi_layer": dict(
                    _delete_=True, type="RoIPool", output_size=7
                )
            },
            r"bbox_roi_extractor: RoIPool\(.* has no counterpart among .*deformable RoI pooling",
        ),
        ("faster-rcnn", {"model.roi_head.type": "DoubleHeadRoIHead"}, "got DoubleHeadRoIHead"),
        ("atss", {"model.bbox_head.type": "PAAHead"}, "model.bbox_head: PAAHead decodes in a way"),
    ],
)
def test_what_is_not_followed_is_named(name, options, expected):
    cfg = tiny.config(name, **options)
    if cfg.model.get("roi_head", {}).get("type") == "DoubleHeadRoIHead":
        cfg.model.roi_head.reg_roi_scale_factor = 1.3
    with pytest.raises(ExportError, match=expected):
        EndToEnd(tiny.build(cfg))


def test_too_few_equal_detections_say_what_to_do():
    Matches(matched=99, detections=100).check()
    with pytest.raises(ExportError, match=r"got 98 of 100 det.*equal.*--images.*--no-verify$"):
        Matches(matched=98, detections=100).check()
