"""Heads, data sets, class lists and checkpoints that do not speak of the same classes."""

import re
import warnings
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmdcn.engine import preflight
from mmdcn.engine.preflight import nodes
from mmdcn.engine.preflight.dataset import data_of
from mmdcn.engine.preflight.model import class_counts

from .checked import dataset_of, message_of, write_annotations

TOOLBOX = Path(mmdet.__file__).parent / ".mim" / "configs"


@pytest.mark.parametrize("number", [1, 7])
def test_a_head_with_another_number_of_classes(config, number):
    config.model.roi_head.bbox_head.num_classes = number
    message = message_of(config)
    assert f"{number} classes, but train_dataloader.dataset has 2: set num_classes=2" in message
    assert "(model.roi_head.bbox_head.num_classes)" in message
    config.preflight = dict(class_counts=False)
    preflight.check(config, ("train",))


def test_a_head_that_leaves_its_number_to_its_type(config):
    del config.model.roi_head.bbox_head.num_classes
    assert "80 classes, but train_dataloader.dataset has 2" in message_of(config)


def test_each_head_of_a_cascade(config):
    heads = [dict(type="Shared2FCBBoxHead", num_classes=n) for n in (2, 3, 2)]
    config.model.roi_head.bbox_head = heads
    assert "3 classes, but" in message_of(config)
    assert "(model.roi_head.bbox_head[1].num_classes)" in message_of(config)


# One of each kind of head; `test_all_configs_of_the_toolbox` has them all.
KINDS = [
    "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
    "cityscapes/mask-rcnn_r50_fpn_1x_cityscapes.py",
    "crowddet/crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman.py",
    "detr/detr_r50_8xb2-150e_coco.py",
    "htc/htc_r50_fpn_1x_coco.py",
    "lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py",
    "mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py",
    "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py",
    "ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco.py",
    "panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py",
    "pascal_voc/ssd300_voc0712.py",
    "point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py",
    "scnet/scnet_r50_fpn_1x_coco.py",
    "soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py",
    "wider_face/retinanet_r50_fpn_1x_widerface.py",
    "yolox/yolox_s_8xb8-300e_coco.py",
]


def check_config_of_the_toolbox(path):
    """Its heads and data agree; they do not if the data has two classes."""
    config = Config.fromfile(path)
    with DefaultScope.overwrite_default_scope("mmdet"):
        assert list(disagreements(config)) == [], path
        for data in data_sets(config):
            two = dict(classes=("a", "b"), thing_classes=("a", "b"), stuff_classes=("c",) * 999)
            data.node["metainfo"] = dict(data.node.get("metainfo") or {}) | two
        counted = [place for place, *_ in class_counts(config.model, "model")]
        assert {place for place, _ in disagreements(config)} == set(counted), path
    return counted


def data_sets(config):
    for stage in ("train", "val", "test"):
        loader = config.get(f"{stage}_dataloader")
        if loader:
            yield from data_of(loader.dataset, f"{stage}_dataloader.dataset")


def disagreements(config):
    return preflight._disagreements(config.model, list(data_sets(config)), [])


@pytest.mark.parametrize("name", KINDS)
def test_heads_of_every_kind(name):
    preflight.register_toolbox()
    assert check_config_of_the_toolbox(TOOLBOX / name)


# Detectors without such a number (of proposals, of another project's, which read class names), and
# data whose classes are not known before it is built.
LEFT_OUT = (
    *("dsdl", "glip", "grounding_dino", "mm_grounding_dino", "misc", "openimages", "reid", "rpn"),
    *("bytetrack", "deepsort", "masktrack_rcnn", "mask2former_vis", "ocsort", "qdtrack", "sort"),
    *("strongsort", "v3det", "_base_", "common"),
)


@pytest.mark.slow
def test_all_configs_of_the_toolbox():
    preflight.register_toolbox()
    checked = 0
    for path in sorted(TOOLBOX.glob("*/*.py")):
        if path.parent.name in LEFT_OUT or "rpn_r50" in path.name or "-rpn_" in path.name:
            continue
        try:
            if "model" not in Config.fromfile(path):
                continue
        except (ImportError, OSError):
            continue  # needs a package that is not there
        checked += bool(check_config_of_the_toolbox(path))
    assert checked > 300


def test_data_sets_of_a_run_have_the_same_classes(config, data):
    write_annotations(data / "val.json", ["a.png"], categories=("cat", "cow"))
    config.val_dataloader = dict(dataset=dict(dataset_of(config), ann_file="val.json"))
    config.val_dataloader.dataset.metainfo = dict(classes=("cat", "cow"))
    config.val_cfg = dict()
    expected = "'cow' not among the classes of train_dataloader.dataset, which are 'cat', 'dog'"
    assert expected in message_of(config, ("train", "val"))


def test_labels_count_in_one_order(config, data):
    # Of the same names, so that nothing else shows it: labels of one file mean other classes.
    write_annotations(data / "val.json", ["a.png"], categories=("dog", "cat"))
    config.val_dataloader = dict(dataset=dict(dataset_of(config), ann_file="val.json"))
    config.val_cfg = dict()
    message = message_of(config, ("train", "val"))
    assert "wrong names" in nodes.said[0]
    assert "come in another order than those of" in message
    assert "(val_dataloader.dataset.ann_file)" in message
    config.val_dataloader.dataset.ann_file = "train.json"
    config.val_evaluator = [dict(type="CocoMetric", ann_file=str(data / "val.json"))]
    message = message_of(config, ("train", "val"))
    assert "'dog', 'cat', and 'cat', 'dog' (val_evaluator.0.ann_file)" in message


# ------------------------------------------------------------------------------ checkpoints


@pytest.fixture
def small(config):
    """The config with a model that can be built, and a function that writes its checkpoint."""
    config.model = dict(
        type="RetinaNet",
        backbone=dict(
            type="ResNet",
            depth=18,
            base_channels=8,
            dcn=dict(type="DCN"),
            stage_with_dcn=(False, False, False, True),
        ),
        neck=dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
        bbox_head=dict(
            type="RetinaHead",
            num_classes=2,
            in_channels=8,
            feat_channels=8,
            stacked_convs=1,
            anchor_generator=dict(
                type="AnchorGenerator",
                octave_base_scale=4,
                scales_per_octave=1,
                ratios=[1.0],
                strides=[4, 8, 16, 32, 64],
            ),
        ),
        test_cfg=dict(),
    )
    return config


def save(config, path, classes=("cat", "dog"), without="nothing"):
    from mmdet.registry import MODELS

    preflight.register_toolbox()
    head = dict(config.model.bbox_head, num_classes=len(classes))
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(dict(config.model, bbox_head=head))
    weights = {k: v for k, v in model.state_dict().items() if without not in k}
    torch.save(dict(state_dict=weights, meta=dict(dataset_meta=dict(classes=classes))), path)
    config.load_from = str(path)


def test_a_model_that_computes_while_it_is_built(small, tmp_path):
    small.model.backbone = dict(
        type="SwinTransformer", embed_dims=8, num_heads=[1, 2, 4, 8], depths=[1, 1, 1, 1]
    )
    save(small, tmp_path / "a.pth")
    silently(small, "test")
    save(small, tmp_path / "a.pth", classes=("cat", "dog", "cow"))
    assert "2 weights of" in message_of(small, ("test",))


def silently(config, *stages):
    assert preflight.check(config, stages) == []


@pytest.mark.parametrize("without", ["nothing", "conv_offset", "running_mean"])
def test_a_checkpoint_that_fits(small, tmp_path, without):
    save(small, tmp_path / "a.pth", without=without)
    silently(small, "test")


def test_a_checkpoint_of_another_number_of_classes(small, tmp_path):
    save(small, tmp_path / "a.pth", classes=("cat", "dog", "cow"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as torch's, for every weight
        message = message_of(small, ("test",))
    assert "was trained on 3 classes, 'cat', 'dog', 'cow', and the data has 2" in message
    assert "2 weights of" in message and "do not fit the model, such as" in message
    assert "bbox_head.retina_cls.weight: (3, 8, 3, 3) for (2, 8, 3, 3)" in message
    assert "(load_from)" in message
    small.resume = True
    message = message_of(small, ("train",))
    assert "holds weights, but not how far the training was" in message and "(resume)" in message
    checkpoint = torch.load(tmp_path / "a.pth")
    checkpoint["meta"].update(epoch=1, iter=2)
    torch.save(checkpoint, tmp_path / "a.pth")
    message = message_of(small, ("train",))
    assert "do not fit the model" in message and "(resume)" in message
    small.preflight = dict(checkpoint=False)
    silently(small, "test")


def test_training_may_begin_with_other_classes(small, tmp_path):
    save(small, tmp_path / "a.pth", classes=("cat", "dog", "cow"))
    (warned,) = preflight.check(small, ("train",))
    assert re.search(r"2 weights of .* start anew, as for other classes: bbox", warned)


def test_a_checkpoint_of_as_many_other_classes(small, tmp_path):
    save(small, tmp_path / "a.pth", classes=("car", "bus"))
    message = message_of(small, ("test",))
    assert "was trained on 2 classes, 'car', 'bus', and the data has 2, 'cat', 'dog'" in message
    small.preflight = dict(class_counts=False)
    silently(small, "test")


def test_a_checkpoint_of_another_model(small, tmp_path):
    save(small, tmp_path / "a.pth", without="layer4.1.conv")
    message = message_of(small, ("test",))
    assert "lacks 2 weights of the model, such as 'backbone.layer4.1.conv1.weight'" in message


@pytest.mark.parametrize(
    "name", ["conv2.conv_offset", "conv2.conv_offset_mask", "conv2_offset"], ids=str
)
def test_a_deformable_checkpoint_of_a_plain_model(small, tmp_path, name):
    save(small, tmp_path / "a.pth")
    checkpoint = torch.load(tmp_path / "a.pth")
    weights = checkpoint["state_dict"]
    checkpoint["state_dict"] = {k.replace("conv2.conv_offset", name): v for k, v in weights.items()}
    torch.save(checkpoint, tmp_path / "a.pth")
    small.model.backbone.dcn = None
    message = message_of(small, ("test",))
    assert "is of a deformable model, and 2 of its layers are plain in this one" in message
    assert "'backbone.layer4.0.conv2'" in message
    (warned,) = preflight.check(small, ("train",))
    assert warned.startswith("load_from: ") and "their offsets are left out" in warned


def test_a_checkpoint_that_holds_no_weights(small, tmp_path):
    torch.save([1], tmp_path / "a.pth")
    small.load_from = str(tmp_path / "a.pth")
    assert "holds no weights but a list" in message_of(small, ("test",))
