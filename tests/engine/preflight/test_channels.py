"""What a model's parts hand to each other: a neck and dense heads that do not fit."""

import pytest

from mmdcn.engine import preflight

from .checked import message_of


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
