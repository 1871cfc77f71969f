"""Mistakes in a config are found before anything is built, each with a message that names it."""

import json
import os
import re
from pathlib import Path

import pytest
from mmengine.config import Config, ConfigDict

from mmdcn.engine import preflight
from mmdcn.engine.preflight.coco_file import CocoFile

from .checked import dataset_of, message_of, write_annotations

REPOSITORY = Path(__file__).parents[3]


def test_a_right_config_passes(config):
    assert preflight.check(config, ("train", "val", "test")) == []


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


def test_an_image_that_is_left_out_may_be_missing(config, data):
    write_annotations(data / "train.json", ["a.png", "x.png"])
    assert "1 of 2 images have no file" in message_of(config)
    # It has no annotation.
    dataset_of(config).filter_cfg = dict(filter_empty_gt=True)
    preflight.check(config, ("train",))
    write_annotations(data / "train.json", ["x.png", "a.png"])
    assert "1 of 2 images have no file" in message_of(config)


@pytest.mark.parametrize(
    "layout", [dict(indent=1), dict(separators=(",", ":")), dict(sort_keys=True), {}]
)
def test_annotation_files_of_any_layout_are_read(data, layout):
    path = data / "any.json"
    # Several pieces as long as the file is read in, with characters that their ends cut.
    names = [f"图像{'图' * 20_000}{i}.png" for i in range(40)]
    write_annotations(path, names, categories=("猫", "d[o]{g}"), **layout, ensure_ascii=False)
    read = []
    with CocoFile(str(path), read.append) as file:
        assert [c["name"] for c in file.objects("categories", "name")] == ["猫", "d[o]{g}"]
        read.clear()
        assert [i["file_name"] for i in file.objects("images", "file_name")] == names
        assert sum(read) == pytest.approx(path.stat().st_size, rel=0.01)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "it is empty"),
        ('{"images": [', "is the download complete?"),
        ("[]", "it is a list, as files of predictions are"),
        ('[{"image_id": 1, "bbox": [0, 0, 1, 1]}]', "it is a list, as files of predictions are"),
        ('{"images": []}', "no list 'categories'"),
        ("not json", "it does not start with '{'"),
        ('{"categories": [{"name": "a"}, {"name"]}', "Expecting"),
        ('{"categories": [{"name": "a"}, 3]}', "expected an object, got '3'"),
        (b'\xef\xbb\xbf{"categories": []}', "byte order mark"),
        ('{"categories": []}'.encode("utf-16"), "open(path, encoding='utf-16')"),
        (b'{"info": "\xe9", "categories": [{"name": "a"}]}', "not UTF-8 at byte 10: if"),
        (
            b'{"categories": [{"name": "\xff"}, {"name": "a"}], "images": []}',
            "not UTF-8 at byte 26",
        ),
    ],
)
def test_a_file_that_holds_no_annotations(config, data, content, expected):
    (data / "train.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = message_of(config)
    assert "is not a COCO annotation file" in message
    assert expected in message


def test_classes_in_another_order_are_warned_of(config):
    dataset_of(config).metainfo.classes = ("dog", "cat")
    assert "wrong names" in preflight.check(config, ("train",))[0]


def test_a_subset_of_the_classes_is_fine(config):
    dataset_of(config).metainfo.classes = ("dog",)
    config.model.roi_head.bbox_head.num_classes = 1
    preflight.check(config, ("train",))


def test_classes_from_a_file(config, data):
    (data / "classes.txt").write_text("cat\ncow\n")
    dataset_of(config).metainfo.classes = str(data / "classes.txt")
    assert "'cow'" in message_of(config)


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


@pytest.mark.parametrize("place", ["dcn", "conv_cfg"])
@pytest.mark.parametrize("name", ["DCN1d", "mmdcn.DCNv2_3d", "DeformConv3dPack"])
def test_a_convolution_of_other_dimensions(config, place, name):
    config.model.backbone[place] = dict(type=name)
    message = message_of(config)
    assert f"'DCNv2', got {name!r}, which is {3 if '3d' in name else 1}-D" in message
    assert f"(model.backbone.{place}.type)" in message


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


def test_a_work_folder_that_cannot_be_written(config, data, monkeypatch):
    config.work_dir = str(data / "new" / "deeper")
    preflight.check(config, ("train",))
    assert not (data / "new").exists()
    (data / "new").touch()
    assert f"as '{data / 'new'}' is not a folder (work_dir)" in message_of(config)
    # The tests may run as a user who may write everywhere.
    monkeypatch.setattr("os.access", lambda *_: False)
    config.work_dir = str(data / "other")
    assert f"no permission in '{data}' (work_dir)" in message_of(config)


def test_a_missing_file_of_the_evaluator(config):
    config.test_evaluator = [dict(type="CocoMetric", ann_file="val.json")]
    assert "test_evaluator.0.ann_file" in message_of(config, ("test",))


def write_val(config, data, images, ids=None, categories=("cat", "dog")):
    write_annotations(data / "val.json", images, categories=categories)
    if ids is not None:
        content = json.loads((data / "val.json").read_text())
        for image, key in zip(content["images"], ids):
            image["id"] = key
        (data / "val.json").write_text(json.dumps(content))
    config.test_evaluator.ann_file = str(data / "val.json")


@pytest.mark.parametrize(
    ("images", "ids", "expected"),
    [
        (["a.png"], None, "1 of the 2 images of '.*train.json' are not in '.*val.json'"),
        (["a.png", "b.png", "c.png"], None, "1 of the 3 images of '.*val.json' .* count as missed"),
        (["a.png", "b.png"], [0, 7], "1 of the 2 images .* have nothing to be compared with"),
    ],
)
def test_an_evaluator_of_other_images(config, data, images, ids, expected):
    write_val(config, data, images, ids)
    message = message_of(config, ("test",))
    assert re.search(expected, message) and "(test_evaluator.ann_file)" in message
    config.update(val_cfg={}, val_dataloader=config.test_dataloader)
    config.val_evaluator = config.test_evaluator
    assert "(val_evaluator.ann_file)" in message_of(config, ("train", "val"))
    config.preflight = dict(annotations=False)
    preflight.check(config, ("test",))


def test_an_evaluator_of_other_classes(config, data):
    write_val(config, data, ["a.png", "b.png"], categories=("cat", "cow"))
    assert "has no categories 'dog'" in message_of(config, ("test",))


def test_an_evaluator_of_a_copy_of_the_file(config, data):
    write_val(config, data, ["a.png", "b.png"])
    assert preflight.check(config, ("test",)) == []


def test_an_evaluator_of_all_images_and_data_of_some(config):
    for indices, taken in ((1, 1), ([0], 1)):
        config.test_dataloader.dataset.indices = indices
        message = message_of(config, ("test",))
        assert f"takes {taken} of 2 images (indices)" in message
        assert "give both a file of those images alone" in message
    config.test_evaluator.ann_file = None
    preflight.check(config, ("test",))
    # What is trained on is compared with nothing.
    dataset_of(config).indices = 1
    preflight.check(config, ("train",))


SETTINGS = [
    ("model.backbone.depth", 19, "invalid depth 19", "model.backbone"),
    ("model.backbone.stage_with_dcn", (True,), "len(stage_with_dcn) == num_stages", None),
    ("model.backbone.dcn.deform_groups", 3, "expected a multiple of deform_groups=3", None),
    ("model.backbone.dcn.deform_group", 1, "did you mean 'deform_groups'", None),
    ("model.backbone.dcn.max_offset", -1, "max_offset: expected", None),
    ("model.backbone.dept", 18, "unexpected keyword argument 'dept'", "model.backbone"),
    ("optim_wrapper.optimizer.lr", "abc", "expected a number, got 'abc'", None),
    ("optim_wrapper.optimizer.lr", -1, "Invalid learning rate: -1", "optim_wrapper"),
    ("optim_wrapper.optimizer.type", "SDG", "did you mean 'SGD'", None),
    ("optim_wrapper.paramwise_cfg.dcn_offset_lr_mult", "abc", "expected a number, got 'abc'", None),
    ("param_scheduler", [dict(type="MultiStepLR")], "'milestones'", "param_scheduler[0]"),
    ("train_cfg.max_epochs", "abc", "expected an int of at least 1, got 'abc'", None),
    ("randomness.seed", "abc", "expected an int of at least 0 or None, got 'abc'", None),
    ("train_dataloader.batch_size", 0, "expected an int of at least 1, got 0", None),
    ("train_dataloader.batch_size", "abc", "expected an int of at least 1, got 'abc'", None),
    ("train_dataloader.num_workers", -1, "expected an int of at least 0, got -1", None),
    ("train_dataloader.persistent_workers", True, "num_workers > 0", "train_dataloader"),
]


@pytest.mark.parametrize(("key", "value", "said", "place"), SETTINGS)
def test_a_setting_of_which_nothing_can_be_built(config, key, value, said, place):
    config.optim_wrapper = dict(
        type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1), paramwise_cfg={}
    )
    assert preflight.check(config, ("train",)) == []
    config.merge_from_dict({key: value})
    _first, problem = message_of(config).split("\n")
    assert said in problem
    place = place or (key if key.partition(".")[0] != "model" else "model.backbone")
    assert problem.endswith(f"({place})") or problem.endswith(f"({place}.dcn)")


def test_whether_the_model_can_be_built_is_left_out_on_purpose(config):
    config.model.backbone.depth = 19
    message_of(config)
    config.preflight = dict(model=False)
    preflight.check(config, ("train",))


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
