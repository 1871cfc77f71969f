"""A tiny data set, and the config of a detector that is to be trained on it."""

import pytest
from mmengine.config import Config
from PIL import Image

from .checked import write_annotations


@pytest.fixture
def data(tmp_path):
    """A dataset of two images in `images/`, with `train.json` beside."""
    (tmp_path / "images").mkdir()
    names = ["a.png", "b.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    write_annotations(tmp_path / "train.json", names)
    return tmp_path


@pytest.fixture
def config(data):
    dataset = dict(
        type="CocoDataset",
        data_root=f"{data}/",
        ann_file="train.json",
        data_prefix=dict(img="images/"),
        metainfo=dict(classes=("cat", "dog")),
    )
    return Config(
        dict(
            default_scope="mmdet",
            model=dict(
                type="FastRCNN",
                backbone=dict(
                    type="ResNet",
                    _scope_="mmdet",  # as in a config that inherits from mmdet::
                    depth=18,
                    base_channels=8,
                    dcn=dict(type="DCN"),
                    stage_with_dcn=(False, False, False, True),
                    conv_cfg=None,
                    norm_cfg=dict(type="BN"),
                ),
                roi_head=dict(
                    type="StandardRoIHead",
                    bbox_roi_extractor=dict(
                        type="SingleRoIExtractor",
                        roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=0),
                        out_channels=8,
                        featmap_strides=[4],
                    ),
                    bbox_head=dict(type="Shared2FCBBoxHead", in_channels=8, num_classes=2),
                ),
                train_cfg=None,
                test_cfg=dict(rcnn=None),
            ),
            train_dataloader=dict(dataset=dataset),
            train_cfg=dict(max_epochs=1),
            test_dataloader=dict(dataset=dataset),
            test_cfg=dict(),
            test_evaluator=dict(type="CocoMetric", ann_file=str(data / "train.json")),
        )
    )
