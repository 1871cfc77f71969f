"""Annotations and images that would stop a run or spoil it are refused; others are warned of."""

import json

import numpy as np
import pytest
from PIL import Image

from mmdcn.engine import preflight
from mmdcn.engine.preflight import masks
from mmdcn.engine.preflight.annotations import _REFUSED, _WARNED
from mmdcn.engine.preflight.images import REFUSED as _IMAGES_REFUSED
from mmdcn.engine.preflight.images import WARNED as _IMAGES_WARNED

from .checked import dataset_of, message_of, warnings_of

LEFT_OUT = object()


def write(data, *changes, images=(), categories=None, count=10):
    """A file of good annotations, then one for each of `changes` to it.

    `images` changes the first images in the same way.
    """
    good = dict(image_id=0, category_id=1, bbox=[1, 2, 4, 5], area=20, iscrowd=0)
    size = dict(width=8, height=8)
    content = {
        "images": [
            changed(dict(id=i, file_name=name, **size), images[i] if i < len(images) else {})
            for i, name in enumerate(["a.png", "b.png"])
        ],
        "annotations": [
            changed(dict(id=i + 1, **good), change)
            for i, change in enumerate([{}] * count + list(changes))
        ],
        "categories": categories or [dict(id=0, name="cat"), dict(id=1, name="dog")],
    }
    (data / "train.json").write_text(json.dumps(content))


def changed(entry, change):
    return {key: value for key, value in (entry | change).items() if value is not LEFT_OUT}


REFUSED = {
    "no id": dict(id=LEFT_OUT),
    "same id": dict(id=3),
    "no image_id": dict(image_id=LEFT_OUT),
    "no category_id": dict(category_id=LEFT_OUT),
    "no bbox": dict(bbox=[1, 2, 3]),
    "not finite": dict(bbox=[1, 2, float("nan"), 4]),
    "no area": dict(area=LEFT_OUT),
    "no iscrowd": dict(iscrowd=LEFT_OUT),
    "other kind of image_id": dict(image_id="0"),
    "other kind of category_id": dict(category_id="1"),
    "iscrowd in quotes": dict(iscrowd="0"),
    "no mask": dict(segmentation=[]),
    "bad mask": dict(segmentation=[1, 2, 5, 2, 5, 7]),
    "mask not finite": dict(segmentation=[[1, 2, float("nan"), 2, 5, 7]]),
    "mask of another size": dict(segmentation=dict(counts=[32, 18], size=[10, 5])),
    "bad counts": dict(segmentation=dict(counts=[32, 30], size=[8, 8])),
    "first polygon": dict(segmentation=[[1, 2, 3, 4]]),
}
WARNED = {
    "unknown image": dict(image_id=9),
    "unknown category": dict(category_id=9),
    "other class": dict(category_id=0),
    "negative": dict(bbox=[5, 5, -3, 4]),
    "empty": dict(bbox=[5, 5, 0, 4]),
    "outside": dict(bbox=[9, 1, 4, 4]),
    "reaches out": dict(bbox=[6, 1, 6, 4]),
    "crowd": dict(iscrowd=1),
    "id 0": dict(id=0),
    "short polygon": dict(segmentation=[[1, 2, 3, 4], [1, 2, 5, 2, 5, 7, 8]]),
}


def make_it_matter(config, what):
    """Set the config so that a check applies."""
    if what == "first polygon":
        config.test_evaluator.metric = ["bbox", "segm"]
        config.preflight = dict(model=False)  # which predicts boxes alone
    elif what in {**masks.REFUSED, **masks.WARNED}:
        pipeline = [dict(type="LoadAnnotations", with_bbox=True, with_mask=True)]
        pipeline.append(dict(type="PackDetInputs"))
        dataset_of(config).pipeline = pipeline
    if what == "other class":
        dataset_of(config).metainfo.classes = ("dog",)
        config.model.roi_head.bbox_head.num_classes = 1
    return ("test",) if what in ("no iscrowd", "id 0", "first polygon") else ("train",)


def test_every_finding_has_an_example():
    assert REFUSED.keys() == _REFUSED.keys()
    assert WARNED.keys() == _WARNED.keys()
    assert IMAGES_REFUSED.keys() == _IMAGES_REFUSED.keys()
    assert IMAGES_WARNED.keys() == _IMAGES_WARNED.keys()


@pytest.mark.parametrize("what", REFUSED)
def test_an_annotation_that_is_refused(config, data, what):
    # Masks are there for all but the last.
    good = dict(segmentation=[[1, 2, 5, 2, 5, 7]])
    write(data, *[good] * 10, {**good, **REFUSED[what]}, REFUSED[what], count=0)
    stages = make_it_matter(config, what)
    message = message_of(config, stages)
    assert f"2 of 12 annotations {_REFUSED[what]}" in message
    assert "train.json" in message and f"{stages[0]}_dataloader.dataset.ann_file" in message
    write(data, *[good] * 10, count=0)
    assert not [w for w in warnings_of(config, stages) if _REFUSED[what] in w]


@pytest.mark.parametrize("what", WARNED)
def test_an_annotation_that_is_warned_of(config, data, what):
    good = dict(segmentation=[[1, 2, 5, 2, 5, 7]])
    write(data, *[good] * 10, {**good, **WARNED[what]}, count=0)
    stages = make_it_matter(config, what)
    found = [w for w in warnings_of(config, stages) if _WARNED[what] in w]
    assert len(found) == 1
    assert f"1 of 11 annotations {_WARNED[what]}" in found[0]
    name = WARNED[what].get("id", 11)
    assert found[0].endswith(f"({name}).")


def test_the_first_few_are_named(config, data):
    write(data, *[dict(bbox=[9, 1, 4, 4])] * 5)
    assert "5 of 15 annotations" in warnings_of(config)[0]
    assert warnings_of(config)[0].endswith("(11, 12, 13, …).")


def test_good_annotations_are_passed_in_silence(config, data):
    ignored = dict(ignore=1, bbox=LEFT_OUT, area=LEFT_OUT)
    crowd = dict(iscrowd=1, segmentation=dict(counts=[1, 2], size=[8, 8]))
    edge = dict(bbox=[-0.5, -0.5, 8.9, 9.0])
    write(data, ignored, crowd, edge, count=30)
    assert warnings_of(config, ("train", "val", "test")) == []


@pytest.mark.parametrize("stage", ["train", "test"])
def test_crowds_alone(config, data, stage):
    write(data, *[dict(iscrowd=1)] * 4, count=0)
    message = message_of(config, (stage,))
    assert "none of its 4 annotations is left to" in message
    assert "4 of 4 annotations have iscrowd=1" in message
    # A few are as they should be.
    write(data, dict(iscrowd=1), count=30)
    assert warnings_of(config, (stage,)) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("annotations", {"1": {"id": 1}}),
        ("annotations", [None]),
        ("annotations", [{"id": 1}, None]),
        ("images", None),
        ("images", [None]),
        ("categories", [None]),
        ("categories", {"1": "cat"}),
    ],
)
def test_lists_that_are_none(config, data, place, value):
    write(data)
    content = json.loads((data / "train.json").read_text())
    content[place] = value
    (data / "train.json").write_text(json.dumps(content))
    message = message_of(config)
    assert "is not a COCO annotation file: " in message
    assert f"no list {place!r} of objects" in message or "got 'None'" in message


@pytest.mark.parametrize("key", ["id", "name"])
@pytest.mark.parametrize("value", [LEFT_OUT, None, [1], {}])
def test_categories_without_an_id_or_a_name(config, data, key, value):
    good = dict(id=1, name="dog")
    write(data, categories=[dict(id=0, name="cat"), changed(good, {key: value})])
    assert "1 of 2 categories have no 'id' that is a number or no 'name'" in message_of(config)


@pytest.mark.parametrize("key", ["id", "image_id", "category_id"])
@pytest.mark.parametrize("value", [None, [1], {}])
def test_ids_that_are_none(config, data, key, value):
    write(data, {key: value})
    assert f"1 of 11 annotations {_REFUSED[f'no {key}']}" in message_of(config)


@pytest.mark.parametrize("change", [dict(id=[1]), dict(file_name=3), dict(id=None)])
def test_images_that_cannot_be_found(config, data, change):
    write(data, images=[change])
    assert f"1 of 2 images {_IMAGES_REFUSED['bad key']}" in message_of(config)


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        ([[[1, 2], [5, 2], [5, 7]]], "bad mask"),
        ([["1", "2", "5", "2", "5", "7"]], "bad mask"),
        ("polygon", "bad mask"),
        (dict(counts=None, size=[8, 8]), "bad mask"),
        (dict(counts=[64], size=8), "bad mask"),
        ([[1, 2, 5, 2, 5, 1e9]], "mask not finite"),
        ([[1, 2, 5, 2, 5, float("inf")]], "mask not finite"),
        (dict(counts=[64.0], size=[8, 8]), "bad counts"),
        (dict(counts=[70, -6], size=[8, 8]), "bad counts"),
        (dict(counts="abc", size=[8, 8]), "bad counts"),
        (dict(counts="é", size=[8, 8]), "bad counts"),
        (dict(counts="o" * 40, size=[8, 8]), "bad counts"),
    ],
)
@pytest.mark.parametrize("is_evaluated", [False, True])
def test_masks_that_pycocotools_is_not_given(segmentation, expected, is_evaluated):
    assert masks.look_at_mask(segmentation, (8, 8), is_evaluated) == (expected, False)


def test_rle_is_read_as_pycocotools_writes_it():
    from pycocotools import mask

    random = np.random.default_rng(0)
    for width, height in ((8, 8), (300, 200), (1, 5)):
        pixels = np.asfortranarray(random.random((height, width)) < 0.3, np.uint8)
        for one in (pixels, np.zeros_like(pixels), np.ones_like(pixels)):
            rle = mask.encode(one)
            rle["counts"] = rle["counts"].decode()
            assert masks.look_at_mask(rle, (width, height), True) == (None, True)
            rle["counts"] = rle["counts"][:-1]
            assert masks.look_at_mask(rle, (width, height), True) == ("bad counts", False)


@pytest.mark.parametrize("stage", ["train", "test"])
@pytest.mark.parametrize("missing", ["list", "annotations", "usable ones"])
def test_nothing_to_learn_from(config, data, stage, missing):
    changes = [dict(category_id=9), dict(bbox=[9, 9, 1, 1])] if missing == "usable ones" else []
    write(data, *changes, count=0)
    if missing == "list":
        content = json.loads((data / "train.json").read_text())
        del content["annotations"]
        (data / "train.json").write_text(json.dumps(content))
    message = message_of(config, (stage,))
    purpose = {"train": "train on", "test": "compare predictions with"}[stage]
    if missing == "usable ones":
        assert f"none of its 2 annotations is left to {purpose}: 1 of 2 annotations" in message
    else:
        assert f"no annotation to {purpose}" in message


def test_a_test_set_without_ground_truth_is_fine_where_nothing_is_compared(config, data):
    write(data, count=0)
    config.test_evaluator.update(format_only=True, outfile_prefix="results")
    preflight.check(config, ("test",))


def test_boxes_as_fractions(config, data):
    fractions = [dict(bbox=box, area=box[2] * box[3]) for box in ([0, 0, 1, 1], [0.5, 0.1, 0.2, 1])]
    write(data, *fractions, count=0)
    problem = message_of(config).split("\n")[1:]
    assert len(problem) == 1
    assert "look like fractions of their image's width and height, as none of 2 goes" in problem[0]
    write(data, *fractions)
    assert "below 1" in warnings_of(config)[0]


@pytest.mark.parametrize("change", [dict(width=0), dict(height="8"), dict(file_name=None)])
def test_annotations_of_a_refused_image_are_not_warned_of(config, data, change):
    from mmdcn.engine.preflight import nodes

    write(data, images=[change])
    assert len(message_of(config).split("\n")) == 2
    assert nodes.said == []


def test_boxes_as_corners(config, data):
    corners = [[0, 0, 8, 8], [1, 2, 5, 6], [3, 3, 7, 8], [4, 1, 6, 5]]
    write(data, *[dict(bbox=box) for box in corners], count=0)
    assert "look like x1, y1, x2, y2, as 2 of 4 would reach outside" in message_of(config)
    # One box that cannot be corners shows that the others are not.
    write(data, *[dict(bbox=box) for box in [*corners, [5, 5, 2, 2]]], count=0)
    assert "2 of 5 annotations reach outside" in warnings_of(config)[0]


@pytest.mark.parametrize("key", ["id", "name"])
def test_categories_that_share_an_id_or_a_name(config, data, key):
    categories = [dict(id=0, name="cat"), dict(id=1, name="dog"), dict(id=2, name="cow")]
    categories[2][key] = categories[1][key]
    write(data, categories=categories)
    dataset_of(config).metainfo.classes = ("cat",)
    config.model.roi_head.bbox_head.num_classes = 1
    assert f"categories share an id or a name: [{categories[1][key]!r}]" in message_of(config)


IMAGES_REFUSED = {
    "no key": dict(height=LEFT_OUT),
    "same id": dict(id=1),
    "bad key": dict(file_name=None),
    "no size": dict(width=0),
    "no file": dict(file_name="missing.png"),
    "no content": dict(file_name="empty.png"),
    "unreadable": dict(file_name="text.png"),
}
IMAGES_WARNED = {
    "swapped": dict(file_name="wide.png", width=6, height=12),
    "other size": dict(file_name="wide.png", width=24, height=12),
}


@pytest.fixture
def images(data):
    folder = data / "images"
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("Not found")
    Image.new("RGB", (12, 6)).save(folder / "wide.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (12, 6)).save(folder / "turned.jpg", exif=turned)
    return folder


@pytest.mark.parametrize("what", IMAGES_REFUSED)
def test_an_image_that_is_refused(config, data, images, what):
    write(data, dict(image_id=1), images=[IMAGES_REFUSED[what]])
    message = message_of(config)
    meaning = _IMAGES_REFUSED[what].format(folder=f"{images}/")
    assert "1 of 2 images" in message and meaning in message
    name = "b.png" if what == "same id" else IMAGES_REFUSED[what].get("file_name", "a.png")
    assert f"({name!r})" in message


@pytest.mark.parametrize("what", IMAGES_WARNED)
def test_an_image_that_is_warned_of(config, data, images, what):
    write(data, images=[IMAGES_WARNED[what]])
    expected = f"1 of 2 images that were opened {_IMAGES_WARNED[what]} ('wide.png')."
    assert expected in warnings_of(config)[0]


def test_a_photograph_is_as_high_as_the_toolbox_turns_it(config, data, images):
    write(data, images=[dict(file_name="turned.jpg", width=6, height=12)])
    assert warnings_of(config) == []


def test_the_check_is_left_out_on_purpose_and_in_other_processes(config, data, monkeypatch):
    write(data, dict(area=LEFT_OUT))
    message_of(config)
    monkeypatch.setenv("RANK", "1")
    preflight.check(config, ("train",))
    monkeypatch.setenv("RANK", "0")
    message_of(config)
    config.preflight = dict(annotations=False)
    preflight.check(config, ("train",))
    config.preflight = dict(annotation=False)
    assert "preflight" in message_of(config) and "'class_counts'" in message_of(config)
