"""Small parts of a run, which the toolbox would build late, or ask when an epoch is over."""

from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope

from mmdcn.engine import preflight
from mmdcn.engine.preflight import parts

from .checked import dataset_of, message_of

MMDET = Path(mmdet.__file__).parent / ".mim" / "configs"
TRAINED = [
    *(dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)),
    dict(type="PackDetInputs"),
]


@pytest.fixture
def evaluated(config):
    """A config that evaluates while it trains."""
    config.val_dataloader, config.val_cfg = config.test_dataloader, dict()
    config.val_evaluator = config.test_evaluator
    dataset_of(config).pipeline = TRAINED
    config.default_hooks = dict(checkpoint=dict(type="CheckpointHook", save_best="auto"))
    config.visualizer = dict(vis_backends=[dict(type="LocalVisBackend")])
    return config


MISTAKES = {
    "nothing that packs": (
        {"train_dataloader.dataset.pipeline": TRAINED[:2]},
        "no transform packs inputs and data_samples: end it with dict(type='PackDetInputs')",
        "train_dataloader.dataset.pipeline",
    ),
    "no such transform": (
        {"train_dataloader.dataset.pipeline.1.type": "LoadAnotations"},
        "no transform named 'LoadAnotations' is registered; did you mean 'LoadAnnotations'",
        "train_dataloader.dataset.pipeline.1.type",
    ),
    "an argument of a transform": (
        {"train_dataloader.dataset.pipeline.0.colour": 1},
        "LoadImageFromFile: got an unexpected keyword argument 'colour'; did you mean 'color",
        "train_dataloader.dataset.pipeline.0",
    ),
    "a value of a transform": (
        {"train_dataloader.dataset.pipeline.0": dict(type="RandomFlip", prob="half")},
        "probs must be float or list of float, but",
        "train_dataloader.dataset.pipeline.0",
    ),
    "no such hook": (
        {"custom_hooks": [dict(type="EMAHok")]},
        "no hook named 'EMAHok' is registered; did you mean 'EMAHook'",
        "custom_hooks.0.type",
    ),
    "an argument of a hook": (
        {"default_hooks.checkpoint.intervall": 1},
        "unexpected keyword argument 'intervall'; did you mean 'interval'",
        "default_hooks.checkpoint",
    ),
    "a value of our hook of pictures": (
        {"custom_hooks": [dict(type="SamplingVisualizationHook", interval=0, priority="LOW")]},
        "interval: expected an int of at least 1, got 0",
        "custom_hooks.0",
    ),
    "a value of our hook of offsets": (
        {"default_hooks.offsets": dict(type="mmdcn.OffsetStatisticsHook", max_outside=50)},
        "max_outside: expected a number from 0 to 1, got 50",
        "default_hooks.offsets",
    ),
    "no such evaluator": (
        {"val_evaluator.type": "CoccoMetric"},
        "no metric named 'CoccoMetric' is registered; did you mean 'CocoMetric'",
        "val_evaluator.type",
    ),
    "an argument of an evaluator": (
        {"val_evaluator.metrics_": "bbox"},
        "unexpected keyword argument 'metrics_'; did you mean 'metric'",
        "val_evaluator",
    ),
    "a value of an evaluator": (
        {"val_evaluator.metric": "boxes"},
        "metric should be one of 'bbox', 'segm', 'proposal', 'proposal_fast', but got boxes.",
        "val_evaluator",
    ),
    "no such backend": (
        {"visualizer.vis_backends.0.type": "TensorBoard"},
        "no vis_backend named 'TensorBoard' is registered; did you mean 'TensorboardVisBackend'",
        "visualizer.vis_backends.0.type",
    ),
    "masks of a detector of boxes": (
        {"val_evaluator.metric": ["bbox", "segm"]},
        "'segm' compares masks, and the model predicts none",
        "val_evaluator.metric",
    ),
    "a result that nobody gives": (
        {"default_hooks.checkpoint.save_best": "coco/bbox_map"},
        "no result of the evaluation is called 'coco/bbox_map'; did you mean 'coco/bbox_mAP'",
        "default_hooks.checkpoint.save_best",
    ),
    "a result to end by": (
        {"custom_hooks": [dict(type="EarlyStoppingHook", monitor="bbox_mAP")]},
        "no result of the evaluation is called 'bbox_mAP'",
        "custom_hooks.0.monitor",
    ),
    "no epoch": ({"train_cfg.max_epochs": 0}, "at least 1, got 0", "train_cfg.max_epochs"),
    "no interval": ({"train_cfg.val_interval": 0}, "at least 1, got 0", "train_cfg.val_interval"),
    "an address of no kind": (
        {"load_from": "htp://a/b.pth"},
        "expected a file, or an address that begins with http://, https://",
        "load_from",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_its_place(evaluated, mistake):
    changes, expected, place = MISTAKES[mistake]
    # An annotation file is for masks, too, only if it has some.
    evaluated.preflight = dict(annotations=False)
    assert preflight.check(evaluated, ("train", "val")) == []
    evaluated.merge_from_dict(changes)
    _first, problem = message_of(evaluated, ("train", "val")).split("\n")
    assert expected in problem
    assert problem.endswith(f"({place})")


@pytest.mark.parametrize(
    ("metric", "result"),
    [
        ({}, "coco/bbox_mAP_s"),
        (dict(classwise=True), "coco/cat_precision"),
        (dict(metric_items=["AR@300"]), "coco/bbox_AR@300"),
        (dict(metric="proposal"), "coco/AR@1000"),
        (dict(metric="proposal_fast", proposal_nums=[7]), "coco/AR@7"),
        (dict(prefix="mine"), "mine/bbox_mAP"),
        (dict(type="CocoPanopticMetric", format_only=False), "whatever"),
    ],
)
def test_results_that_are_given(evaluated, metric, result):
    evaluated.val_evaluator = ConfigDict(evaluated.val_evaluator, **metric)
    hook = ConfigDict(type="CheckpointHook", save_best=[result])
    evaluated.default_hooks.checkpoint = hook
    assert list(parts._monitor_problems(evaluated, [evaluated.val_evaluator])) == []
    if result != "whatever":
        hook.save_best = [result, f"{result}x"]
        (problem,) = parts._monitor_problems(evaluated, [evaluated.val_evaluator])
        assert f"{result}x" in problem[1] or metric.get("classwise")


@pytest.mark.parametrize(
    "name",
    [
        "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
        "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
        "rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py",
        "yolox/yolox_tiny_8xb8-300e_coco.py",  # a data set of several, whose transforms mix images
        "detr/detr_r50_8xb2-150e_coco.py",
        "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py",
        "panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py",
        "lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py",
        "pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py",
        "soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py",
        "bytetrack/bytetrack_yolox_x_8xb4-80e_crowdhuman-mot17halftrain_test-mot17halfval.py",
    ],
)
def test_nothing_is_wrong_with_mmdets_own(name):
    preflight.register_toolbox()
    config = Config.fromfile(MMDET / name)
    stages = ("train", "val", "test")
    with DefaultScope.overwrite_default_scope("mmdet"):
        evaluators = [e for stage in stages for e in preflight._evaluators(config, stage)]
        assert list(parts.part_problems(config, stages, evaluators)) == []


def test_what_building_logs_is_not_seen_twice(evaluated, capsys):
    """Loggers of mmengine, too, whose levels are cached apart from logging's own."""
    from mmengine.logging import MMLogger

    logger = MMLogger.get_instance("of this test")
    logger.info("before")
    evaluated.train_dataloader.dataset = dict(
        type="MultiImageMixDataset",
        dataset=dataset_of(evaluated),
        pipeline=[dict(type="Mosaic", img_scale=(64, 64))],
    )
    assert preflight.check(evaluated, ("train",)) == []
    logger.info("after")
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "image shape" not in said
    assert "before" in said and "after" in said


def test_layers_that_ask_for_the_process_group(config):
    """mmdet's strong baselines have them; the run's own group comes after the checks."""
    config.model.roi_head.bbox_head.update(
        type="Shared4Conv1FCBBoxHead", conv_out_channels=8, norm_cfg=dict(type="MMSyncBN")
    )
    message = message_of(config)
    assert "it is for distributed runs alone (tools/dist_train.sh" in message
    assert "(model.roi_head.bbox_head.norm_cfg)" in message
    config.launcher = "pytorch"
    assert preflight.check(config, ("train",)) == []
    assert not torch.distributed.is_initialized()
