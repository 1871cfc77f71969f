"""What a model's parts hand to each other: necks and heads of all kinds that do not fit."""

import json
from pathlib import Path

import mmdet
import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmdcn.engine import preflight
from mmdcn.engine.preflight import building, channels

from .checked import message_of

TOOLBOX = Path(mmdet.__file__).parent / ".mim" / "configs"


@pytest.fixture
def single_stage(config):
    """A detector of one stage on a ResNet whose stages have 8 to 64 channels, with DCN in one."""
    config.model.type = "RetinaNet"
    for part in ("roi_head", "train_cfg", "test_cfg"):
        del config.model[part]
    config.model.neck = dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=16, num_outs=5)
    config.model.bbox_head = dict(
        type="RetinaHead",
        **dict(num_classes=2, in_channels=16, feat_channels=16, stacked_convs=1),
        anchor_generator=dict(
            type="AnchorGenerator", scales=[8], ratios=[1.0], strides=[4, 8, 16, 32, 64]
        ),
    )
    return config


def test_parts_that_fit_pass(single_stage):
    preflight.check(single_stage, ("train",))


@pytest.mark.parametrize(
    "changes,said",
    [
        (
            {"neck.in_channels": [8, 16, 32, 128]},
            "in_channels: expected those of the backbone's feature maps, "
            "8, 16, 32, 64, got [8, 16, 32, 128]",
        ),
        (
            {"neck.in_channels": [16, 32, 64]},
            "in_channels: expected those of the backbone's feature maps, "
            "8, 16, 32, 64, got [16, 32, 64]",
        ),
        (
            {"bbox_head.in_channels": 32, "neck.conv_cfg": dict(type="DCN")},
            "in_channels: expected those of the neck's feature maps, 16, 16, 16, 16, 16, got 32",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(single_stage, changes, said):
    single_stage.merge_from_dict({f"model.{place}": value for place, value in changes.items()})
    message = message_of(single_stage)
    assert said in message and f"(model.{next(iter(changes)).partition('.')[0]})" in message


def test_maps_that_are_too_small_are_no_fault_of_channels():
    """SSD is for images of one size, and its neck has a norm that mmdet makes with memory."""
    preflight.register_toolbox()
    cfg = Config.fromfile(TOOLBOX / "_base_" / "models" / "ssd300.py")
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = building.build_without_memory(cfg)
        assert all(value.is_meta for value in model.state_dict().values())
        assert list(channels.channel_problems(model, cfg.model)) == []


def test_what_a_neck_does_with_values_is_no_fault_of_channels(single_stage, monkeypatch):
    """Who fails with the channels that it asks for, too, fails of something else."""
    from mmdet.models.necks import FPN

    def forward(self, maps):
        raise RuntimeError("of values")

    monkeypatch.setattr(FPN, "forward", forward)
    preflight.check(single_stage, ("train",))


# ------------------------------------------------------------------------------------ RoI heads


@pytest.fixture
def two_stage(config):
    """One with a neck, boxes and masks, on four maps of 16 channels."""
    config.model.neck = dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=16, num_outs=5)
    extractor = dict(
        type="SingleRoIExtractor",
        roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=0),
        out_channels=16,
        featmap_strides=[4, 8, 16, 32],
    )
    config.model.roi_head = dict(
        type="StandardRoIHead",
        bbox_roi_extractor=extractor,
        bbox_head=dict(type="Shared2FCBBoxHead", in_channels=16, num_classes=2),
        mask_roi_extractor=extractor | dict(roi_layer=dict(type="RoIAlign", output_size=14)),
        mask_head=dict(type="FCNMaskHead", in_channels=16, conv_out_channels=16, num_classes=2),
    )
    return config


@pytest.fixture(params=["standard", "cascade"])
def any_two_stage(two_stage, request):
    """The same, and with two stages of box heads, each with a mask head."""
    if request.param == "cascade":
        head = two_stage.model.roi_head
        head.update(type="CascadeRoIHead", num_stages=2, stage_loss_weights=[1, 1])
        for name in ("bbox_roi_extractor", "bbox_head", "mask_roi_extractor", "mask_head"):
            head[name] = [head[name], dict(head[name])]
    return two_stage


def change(config, place, value):
    """Change an entry of an RoI head's part, in its last stage where there are several."""
    name, key = place.split(".")
    part = config.model.roi_head[name]
    (part[-1] if isinstance(part, list) else part)[key] = value


def test_roi_heads_that_fit_pass(any_two_stage):
    preflight.check(any_two_stage, ("train",))


@pytest.mark.parametrize("kind", ["bbox", "mask"])
def test_roi_heads_that_do_not_fit_are_named(any_two_stage, kind):
    change(any_two_stage, f"{kind}_head.in_channels", 32)
    message = message_of(any_two_stage)
    assert "in_channels: expected those that it is given, 16, got 32" in message
    assert f"(model.roi_head.{kind}_head" in message


@pytest.mark.parametrize("kind", ["bbox", "mask"])
def test_roi_extractors_that_do_not_fit_are_named(any_two_stage, kind):
    change(any_two_stage, f"{kind}_roi_extractor.out_channels", 32)
    message = message_of(any_two_stage)
    said = "out_channels: expected those of the neck's feature maps, 16, 16, 16, 16, got 32"
    assert f"{said} (model.roi_head.{kind}_roi_extractor)" in message


def test_an_extractor_from_one_map_gives_what_it_has(config):
    """There, its out_channels are not used."""
    config.model.roi_head.bbox_roi_extractor.out_channels = 32
    config.model.backbone.out_indices = (3,)
    config.model.roi_head.bbox_head.in_channels = 64
    preflight.check(config, ("train",))
    config.model.roi_head.bbox_head.in_channels = 32
    assert "expected those that it is given, 64, got 32" in message_of(config)


def test_a_shared_head_comes_between(config):
    config.model.backbone.update(depth=50, num_stages=3, out_indices=(2,), strides=(1, 2, 2))
    config.model.backbone.update(dilations=(1, 1, 1), stage_with_dcn=(False, False, True))
    head = config.model.roi_head
    head.shared_head = dict(type="ResLayer", depth=50, stage=3, stride=2, dilation=1)
    head.bbox_roi_extractor.update(out_channels=1024, featmap_strides=[16])
    head.bbox_roi_extractor.roi_layer.output_size = 14
    config.model.backbone.base_channels = 64
    head.bbox_head = dict(type="BBoxHead", with_avg_pool=True, in_channels=2048, num_classes=2)
    preflight.check(config, ("train",))
    head.bbox_head.in_channels = 1024
    assert "expected those that it is given, 2048, got 1024" in message_of(config)


def test_heads_with_features_of_their_own_are_left_alone(two_stage):
    """What a double head pools is changed before its head sees it."""
    two_stage.model.roi_head = dict(
        two_stage.model.roi_head, type="DoubleHeadRoIHead", reg_roi_scale_factor=1.3
    )
    for kind in ("mask_roi_extractor", "mask_head"):
        del two_stage.model.roi_head[kind]
    two_stage.model.roi_head.bbox_head.in_channels = 32
    preflight.check(two_stage, ("train",))


# ---------------------------------------------------------------------------------- transformers


@pytest.fixture(params=["DETR", "DeformableDETR", "DINO"])
def transformer(config, request):
    """A detector of the toolbox's transformers, narrowed to a backbone of 8 to 64 channels."""
    folder, name = {
        "DETR": ("detr", "detr_r50_8xb2-150e_coco.py"),
        "DeformableDETR": ("deformable_detr", "deformable-detr_r50_16xb2-50e_coco.py"),
        "DINO": ("dino", "dino-4scale_r50_8xb2-12e_coco.py"),
    }[request.param]
    model = Config.fromfile(TOOLBOX / folder / name).model
    model.backbone = dict(config.model.backbone, out_indices=(1, 2, 3))
    model.neck.in_channels = [16, 32, 64]
    if request.param == "DETR":
        model.backbone.out_indices, model.neck.in_channels = (3,), [64]
    model.bbox_head.num_classes = 2
    config.model = model
    return config


def test_transformers_that_fit_pass(transformer):
    preflight.check(transformer, ("train",))


def test_transformers_that_do_not_fit_are_named(transformer):
    transformer.model.neck.out_channels = 128
    count = transformer.model.neck.num_outs
    channels = ", ".join(["128"] * (1 if transformer.model.type == "DETR" else count))
    message = message_of(transformer)
    said = f"embed_dims: expected that of the neck's feature maps, {channels}, got 256"
    assert f"{said} (model.encoder)" in message


def test_transformers_of_another_number_of_maps(transformer):
    if transformer.model.type == "DETR":
        pytest.skip("it looks at the last map alone")
    transformer.model.neck.num_outs = 3
    said = "expected the number of the neck's feature maps, 3, got 4 (model.num_feature_levels)"
    assert said in message_of(transformer)


# ------------------------------------------------------------------------------------ all configs


@pytest.mark.slow
def test_no_config_of_the_toolbox_or_ours_is_refused():
    """What they hand on is right: whatever is said of one of them is a false alarm."""
    preflight.register_toolbox()
    ours = Path(__file__).parents[3] / "configs"
    checked = roi_heads = 0
    seen = set()
    for path in sorted([*TOOLBOX.glob("[!_]*/*.py"), *ours.glob("*/*.py")]):
        try:
            cfg = Config.fromfile(path)
            key = json.dumps(cfg.model.to_dict(), sort_keys=True, default=str)
        except (ImportError, OSError, AttributeError):
            continue  # needs a package that is not there, or is no detector
        if key in seen:
            continue
        seen.add(key)
        with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
            try:
                model = building.build_without_memory(cfg)
            except building.CannotBuild:
                continue
            assert list(channels.channel_problems(model, cfg.model)) == [], path
            if hasattr(model, "roi_head"):
                roi_heads += any(True for _ in channels._roi_parts(model.roi_head))
        checked += 1
    assert checked > 400 and roi_heads > 150
