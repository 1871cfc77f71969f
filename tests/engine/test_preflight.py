"""Mistakes in a config are found before anything is built, each with a message that names it."""

import json
import os
import warnings
from pathlib import Path

import pytest
from mmengine.config import Config, ConfigDict
from PIL import Image

from mmdcn.engine import preflight
from mmdcn.engine.preflight import ConfigError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path):
    """A dataset of two images in `images/`, with `train.json` beside."""
    (tmp_path / "images").mkdir()
    names = ["a.png", "b.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    write_annotations(tmp_path / "train.json", names)
    return tmp_path


def write_annotations(path, images, categories=("cat", "dog"), **layout):
    content = {
        # The lists that are read also appear in places where they must be passed over.
        "info": {"description": 'has "categories": [{"name": "none"}]', "categories": []},
        "images": [
            {"id": i, "file_name": n, "width": 8, "height": 8} for i, n in enumerate(images)
        ],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 1, "bbox": [0, 0, 4, 4], "note": '"images": ['}
        ],
        "categories": [{"id": i, "name": n} for i, n in enumerate(categories)],
    }
    path.write_text(json.dumps(content, **layout))


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
                type="FasterRCNN",
                backbone=dict(
                    type="ResNet",
                    _scope_="mmdet",  # as in a config that inherits from mmdet::
                    dcn=dict(type="DCN"),
                    conv_cfg=dict(type="Conv2d"),
                    norm_cfg=dict(type="BN"),
                ),
                roi_head=dict(
                    type="StandardRoIHead",
                    bbox_head=dict(type="Shared2FCBBoxHead", num_classes=2),
                ),
            ),
            train_dataloader=dict(dataset=dataset),
            train_cfg=dict(max_epochs=1),
            test_dataloader=dict(dataset=dataset),
            test_cfg=dict(),
            test_evaluator=dict(type="CocoMetric", ann_file=str(data / "train.json")),
        )
    )


def message_of(config, stages=("train",)):
    with pytest.raises(ConfigError) as error:
        preflight.check(config, stages)
    return str(error.value)


def dataset_of(config):
    return config.train_dataloader.dataset


def test_a_right_config_passes(config):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*wrong names")
        preflight.check(config, ("train", "val", "test"))


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        ("ann_file", "val.json", ["no file", "val.json", "train_dataloader.dataset.ann_file"]),
        ("data_prefix", dict(img="pictures/"), ["no folder", "pictures/", "data_prefix.img"]),
        ("data_root", "nowhere/", ["no folder 'nowhere/'", "put or link the data there"]),
        ("metainfo", dict(classes=("cat", "cow")), ["'cow' not among", "'cat', 'dog'", "classes"]),
        ("metainfo", dict(classes="cat"), ["tuple of names", "('cat',)"]),
        ("metainfo", None, ["'person'", "not among the categories", "'cat', 'dog'"]),
        ("type", "CocoDatset", ["no dataset named 'CocoDatset'"]),
    ],
)
def test_a_dataset_that_does_not_fit(config, place, value, expected):
    dataset_of(config)[place] = value
    message = message_of(config)
    for part in expected:
        assert part in message
    assert len(message.splitlines()) == 2


def test_all_problems_come_in_one_message(config):
    dataset_of(config).ann_file = "val.json"
    dataset_of(config).data_prefix.img = "pictures/"
    config.model.backbone.dcn.type = "DCN9"
    assert len(message_of(config).splitlines()) == 4


def test_a_missing_data_root_is_said_once(config):
    for loader in (config.train_dataloader, config.test_dataloader):
        loader.dataset.data_root = "nowhere/"
    config.test_evaluator.ann_file = "nowhere/train.json"
    message = message_of(config, ("train", "test"))
    assert len(message.splitlines()) == 2
    assert "train_dataloader.dataset.data_root, test_dataloader.dataset.data_root" in message


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: dict(type="RepeatDataset", times=2, dataset=d),
        lambda d: dict(type="ClassBalancedDataset", oversample_thr=0.1, dataset=d),
        lambda d: dict(type="ConcatDataset", datasets=[d]),
        lambda d: dict(type="RepeatDataset", dataset=dict(type="ConcatDataset", datasets=[d])),
        lambda d: dict(type="MultiImageMixDataset", dataset=d),
    ],
)
def test_datasets_inside_others_are_checked(config, wrap):
    inner = dataset_of(config)
    config.train_dataloader.dataset = ConfigDict(wrap(inner))
    preflight.check(config, ("train",))
    inner.ann_file = "val.json"
    config.train_dataloader.dataset = ConfigDict(wrap(inner))
    assert "val.json" in message_of(config)


def test_data_that_is_not_on_this_disk_is_not_looked_for(config):
    dataset = dataset_of(config)
    dataset.update(data_root="s3://bucket/coco/")
    preflight.check(config, ("train",))
    dataset.update(data_root="coco/", backend_args=dict(backend="petrel"))
    preflight.check(config, ("train",))
    dataset.update(backend_args=dict(backend="local"))
    message_of(config)


def test_absolute_paths_ignore_the_root(config, data):
    dataset_of(config).update(data_root="nowhere/", ann_file=str(data / "train.json"))
    dataset_of(config).data_prefix.img = str(data / "images")
    preflight.check(config, ("train",))


def test_images_of_another_dataset(config, data):
    write_annotations(data / "train.json", ["x.png", "y.png"])
    message = message_of(config)
    assert "none of the first 2 images" in message and "x.png" in message


def test_one_image_may_be_missing(config, data):
    write_annotations(data / "train.json", ["x.png", "a.png"])
    preflight.check(config, ("train",))


@pytest.mark.parametrize(
    "layout", [dict(indent=1), dict(separators=(",", ":")), dict(sort_keys=True), {}]
)
def test_annotation_files_of_any_layout_are_read(data, layout):
    path = data / "any.json"
    names = [f"图像{'x' * 3000}{i}.png" for i in range(30)]
    write_annotations(path, names, categories=("猫", "d[o]{g}"), **layout, ensure_ascii=False)
    categories, images = preflight._read_coco(str(path))
    assert categories == ["猫", "d[o]{g}"]
    assert images == names[:20]


@pytest.mark.parametrize("content", ["", '{"images": [', "[]", '{"images": []}', "not json"])
def test_a_file_that_holds_no_annotations(config, data, content):
    (data / "train.json").write_text(content)
    assert "is not a COCO annotation file" in message_of(config)


def test_classes_in_another_order_are_warned_of(config):
    dataset_of(config).metainfo.classes = ("dog", "cat")
    with pytest.warns(UserWarning, match="wrong names"):
        preflight.check(config, ("train",))


def test_a_subset_of_the_classes_is_fine(config):
    dataset_of(config).metainfo.classes = ("dog",)
    preflight.check(config, ("train",))


def test_classes_from_a_file(config, data):
    (data / "classes.txt").write_text("cat\ncow\n")
    dataset_of(config).metainfo.classes = str(data / "classes.txt")
    assert "'cow'" in message_of(config)


def test_a_head_with_too_few_classes(config):
    config.model.roi_head.bbox_head = [dict(type="BBoxHead", num_classes=1)]
    assert "1 classes, but train_dataloader.dataset has 2" in message_of(config)


@pytest.mark.parametrize(
    ("place", "name", "hint"),
    [
        ("dcn", "DCNv22", "'DCNv2'"),
        ("conv_cfg", "Conv2D", "'Conv2d'"),
        ("conv_cfg", "mmdcn.Nothing", ""),
        ("norm_cfg", "NB", ""),
    ],
)
def test_an_unknown_type(config, place, name, hint):
    config.model.backbone[place] = dict(type=name)
    message = message_of(config)
    assert f"named {name!r} is registered" in message
    assert f"model.backbone.{place}.type" in message
    assert hint in message


def test_types_of_another_project_are_left_to_it(config):
    config.model.backbone = dict(type="elsewhere.Net", norm_cfg=dict(type="TheirNorm"))
    assert "TheirNorm" not in message_of(config)


def test_a_type_may_be_a_class(config):
    from mmdet.datasets import CocoDataset
    from mmdet.models import ResNet

    config.model.backbone.type = ResNet
    dataset_of(config).type = CocoDataset
    preflight.check(config, ("train",))
    dataset_of(config).ann_file = "val.json"
    message_of(config)


def test_missing_checkpoints(config):
    config.load_from = "epoch_1.pth"
    config.model.backbone.init_cfg = dict(type="Pretrained", checkpoint="resnet.pth")
    message = message_of(config)
    assert "no file 'epoch_1.pth' (load_from)" in message
    assert "no file 'resnet.pth' (model.backbone.init_cfg.checkpoint)" in message
    # Evaluation takes all weights from the checkpoint.
    assert "resnet.pth" not in message_of(config, ("test",))
    config.load_from = "https://example.com/epoch_1.pth"
    config.model.backbone.init_cfg.checkpoint = "torchvision://resnet50"
    preflight.check(config, ("train",))


def test_a_missing_file_of_the_evaluator(config):
    config.test_evaluator = [dict(type="CocoMetric", ann_file="val.json")]
    assert "test_evaluator.0.ann_file" in message_of(config, ("test",))


def test_what_will_not_run_is_not_checked(config):
    dataset_of(config).ann_file = "val.json"
    preflight.check(config, ("test",))
    config.test_cfg = None
    config.test_evaluator = dict(type="CocoMetric", ann_file="val.json")
    dataset_of(config).ann_file = "train.json"
    preflight.check(config, ("train", "test"))


@pytest.mark.parametrize("key", ["model", "train_dataloader"])
def test_a_config_of_something_else(config, key):
    config.pop(key)
    assert f"no such entry ({key})" in message_of(config)


COCO = Path(os.environ.get("MMDCN_COCO", REPOSITORY.parent / "shared" / "data" / "coco"))


@pytest.mark.skipif(not COCO.is_dir(), reason=f"no COCO subset in {COCO}")
@pytest.mark.parametrize(
    "name",
    [
        "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
        "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
        "dcnv2/faster-rcnn_r101-mdconv-c3-c5_fpn_1x_coco.py",
        "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py",
    ],
)
def test_the_configs_find_coco_in_data_coco(name, tmp_path, monkeypatch):
    config = Config.fromfile(REPOSITORY / "configs" / name)
    monkeypatch.chdir(tmp_path)
    assert "no folder 'data/coco/'" in message_of(config)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "coco").symlink_to(COCO)
    preflight.check(config, ("train", "val", "test"))
