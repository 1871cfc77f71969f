"""The warped shapes: repeatable bytes, annotations that are what is drawn, and the files."""

import contextlib
import io
import json
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely

from mmdcn.datasets import shapes, warped_shapes
from mmdcn.datasets.warped_shapes import (
    CLASSES,
    TEMPLATES,
    Parameters,
    Split,
    annotate,
    draw_scene,
    generate,
)
from tests.programs import REPOSITORY, Program

SMALL = Parameters(train_images=4, val_images=3, image_size=96, strengths=(0.0, 2.0))


def _scenes(strength, count=12, size=128):
    parameters = Parameters(image_size=size)
    return [draw_scene(parameters, Split("val", 1, count, strength), i) for i in range(count)]


def _read_all(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "shapes"
    assert generate(path, SMALL, progress=False)
    return path


# The same bytes


def test_same_seed_gives_the_same_bytes(data_dir, tmp_path):
    generate(tmp_path / "again", SMALL, progress=False)
    first, second = _read_all(data_dir), _read_all(tmp_path / "again")
    assert len(first) == 4 + 3 * 3 + 4 + 2  # images, annotations, manifest and contact sheet
    assert first == second


def test_more_images_leave_the_earlier_ones_as_they_were(data_dir, tmp_path):
    more = Parameters(train_images=6, val_images=3, image_size=96, strengths=())
    generate(tmp_path / "more", more, progress=False)
    first, second = _read_all(data_dir), _read_all(tmp_path / "more")
    images = [p for p in first if p.parts[0] in ("train", "val")]
    assert len(images) == 7
    assert all(first[p] == second[p] for p in images)


def test_another_seed_and_the_other_split_give_other_images(data_dir, tmp_path):
    other = Parameters(seed=1, train_images=1, val_images=1, image_size=96, strengths=())
    generate(tmp_path / "other", other, progress=False)
    first, second = _read_all(data_dir), _read_all(tmp_path / "other")
    image = Path("train/000000.jpg")
    assert len({first[image], second[image], first[Path("val/000000.jpg")]}) == 3


# What is annotated is what is drawn


@pytest.mark.parametrize("strength", [0.0, 1.0, 3.0])
def test_boxes_polygons_and_masks_agree(strength):
    from pycocotools import mask as coco_mask

    for scene in _scenes(strength):
        for instance, mask in zip(scene.instances, scene.masks):
            fields = annotate(instance, 128)
            points = np.concatenate([np.reshape(p, (-1, 2)) for p in fields["segmentation"]])
            left, top, width, height = fields["bbox"]
            extent = [*points.min(axis=0), *points.max(axis=0)]
            np.testing.assert_allclose([left, top, left + width, top + height], extent, atol=0.011)
            assert points.min() >= 0
            assert points.max() <= 128

            rows, columns = np.nonzero(mask > 0)
            drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(drawn, extent, atol=1.1)
            border = instance.outline.length * 0.1  # an eighth of a pixel is what it resolves
            assert abs(mask.sum() - fields["area"]) <= border
            runs = coco_mask.merge(coco_mask.frPyObjects(fields["segmentation"], 128, 128))
            assert np.abs(coco_mask.decode(runs) - mask).sum() <= instance.outline.length


def test_scenes_of_two_strengths_differ_only_where_the_instances_are():
    for weak, strong in zip(_scenes(0.0), _scenes(3.0)):
        touched = np.sum(weak.masks + strong.masks, axis=0) > 0
        differs = (weak.image != strong.image).any(axis=-1)
        assert not differs[~touched].any()
        assert differs[touched].mean() > 0.5


def test_strength_zero_draws_the_templates_and_every_strength_keeps_the_area():
    sizes = {}
    for strength in (0.0, 1.0, 3.0):
        for index, scene in enumerate(_scenes(strength, count=8)):
            # The first instance of a scene finds its place at any strength.
            instance = scene.instances[0]
            sizes.setdefault(index, []).append((instance.label, instance.outline.area))
            if strength == 0:
                template = TEMPLATES[CLASSES[instance.label]]
                centre = shapely.get_coordinates(shapely.Polygon(template).centroid)[0]
                scaled = (template - centre) * instance.scale + instance.position
                expected = shapely.Polygon(scaled)
                gap = shapely.hausdorff_distance(expected, instance.outline)
                assert gap < 1e-6
    for seen in sizes.values():
        labels, areas = zip(*seen)
        assert len(set(labels)) == 1
        np.testing.assert_allclose(areas, areas[0], rtol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_instances_never_overlap_and_are_mostly_visible(strength):
    frame = shapely.box(0, 0, 128, 128)
    for scene in _scenes(strength):
        assert scene.instances
        for i, instance in enumerate(scene.instances):
            visible = instance.outline.intersection(frame).area / instance.outline.area
            assert visible >= shapes.MIN_VISIBLE
            for other in scene.instances[:i]:
                assert instance.outline.distance(other.outline) >= shapes.MIN_GAP * 0.95


def test_colour_says_nothing_about_the_class():
    """The label of the instance nearest in mean colour and contrast is right by chance only."""
    features, labels = [], []
    for scene in _scenes(1.0, count=150, size=96):
        for instance, mask in zip(scene.instances, scene.masks):
            pixels = scene.image[mask == 1].astype(float)
            features.append([*pixels.mean(axis=0), *pixels.std(axis=0)])
            labels.append(instance.label)
    features, labels = np.array(features), np.array(labels)
    distance = np.linalg.norm(features[:, None] - features[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    accuracy = (labels[distance.argmin(axis=1)] == labels).mean()
    assert len(labels) > 300
    assert accuracy < 2 / len(CLASSES)


def test_every_class_and_kind_of_warp_occurs():
    scenes = _scenes(1.0, count=40, size=96)
    assert {i.label for s in scenes for i in s.instances} == set(range(len(CLASSES)))
    assert {i.kind for s in scenes for i in s.instances} == {"affine", "projective", "elastic"}


def test_templates_equal_their_mirror_images():
    for outline in TEMPLATES.values():
        shape = shapely.Polygon(outline)
        mirrored = shapely.Polygon(outline * [-1, 1])
        assert shape.symmetric_difference(mirrored).area < 1e-9


# The files


@pytest.mark.parametrize("split", ["train", "val", "val_s0.0", "val_s2.0"])
def test_annotations_load_and_are_valid(data_dir, split):
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(data_dir / "annotations" / f"{split}.json"))
    assert len(coco.imgs) == (4 if split == "train" else 3)
    assert tuple(c["name"] for c in coco.cats.values()) == CLASSES
    assert coco.anns
    for image in coco.imgs.values():
        pixels = cv2.imread(str(data_dir / split / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3) == (96, 96, 3)
    for annotation in coco.anns.values():
        left, top, width, height = annotation["bbox"]
        assert min(left, top) >= 0
        assert width > 1
        assert height > 1
        assert max(left + width, top + height) <= 96.01
        assert 0 < annotation["area"] <= width * height
        assert annotation["category_id"] in coco.cats
        assert annotation["image_id"] in coco.imgs
        assert annotation["iscrowd"] == 0
        assert all(len(p) >= 6 and len(p) % 2 == 0 for p in annotation["segmentation"])
        assert coco.annToMask(annotation).any()


def test_contact_sheet_shows_every_split(data_dir):
    sheet = cv2.imread(str(data_dir / "contact_sheet.png"))
    assert sheet.shape[0] > 4 * 300  # four splits
    green = (np.abs(sheet.astype(int) - [60, 230, 60]).max(axis=-1) < 3).sum()
    assert green > 1000  # boxes


def test_made_again_is_up_to_date(data_dir):
    before = {p: p.stat().st_mtime_ns for p in data_dir.rglob("*")}
    assert not generate(data_dir, SMALL, progress=False)
    assert {p: p.stat().st_mtime_ns for p in data_dir.rglob("*")} == before


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(parameters, split, index):
        if index == 2:
            raise KeyboardInterrupt
        return draw_scene(parameters, split, index)

    monkeypatch.setattr(warped_shapes, "draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "shapes", SMALL, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_peoples_files_are_left_alone(tmp_path, overwrite):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="was not made by this generator"):
        generate(tmp_path, SMALL, overwrite=overwrite, progress=False)
    assert _read_all(tmp_path) == {Path("thesis.txt"): b"years of work"}


def test_other_parameters_need_overwrite(tmp_path):
    one = Parameters(train_images=1, val_images=1, image_size=64, strengths=())
    two = Parameters(train_images=2, val_images=1, image_size=64, strengths=(), seed=3)
    generate(tmp_path / "shapes", one, progress=False)
    before = _read_all(tmp_path)
    with pytest.raises(FileExistsError, match="other values of seed, train_images: overwrite it"):
        generate(tmp_path / "shapes", two, progress=False)
    assert _read_all(tmp_path) == before
    assert generate(tmp_path / "shapes", two, overwrite=True, progress=False)
    assert len(list((tmp_path / "shapes" / "train").iterdir())) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["shapes"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("strength", -0.5),
        ("train_images", 0),
        ("image_size", 8),
        ("max_instances", 1),
        ("min_size", 0),
        ("strengths", (1.0, 1.0)),
    ],
)
def test_parameters_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=rf"{name}.* must be .*got.* \(?{re.escape(str(value))}"):
        Parameters(**{name: value})


# The command line


def _tool(*args):
    return Program([REPOSITORY / "tools/make_warped_shapes.py", *args], REPOSITORY)


def test_command_line(tmp_path):
    out = tmp_path / "shapes"
    sizes = ("--train-images", 2, "--val-images", 1, "--image-size", 64)
    first = _tool(out, *sizes, "--strengths", 1.5).finish()
    assert first.returncode == 0, first.stdout
    assert str(out) in first.stdout
    assert {p.name for p in (out / "annotations").iterdir()} == {
        "train.json",
        "val.json",
        "val_s1.5.json",
    }
    assert json.loads((out / "manifest.json").read_text())["strengths"] == [1.5]
    second = _tool(out, *sizes).finish()
    assert second.returncode == 1
    assert "other values of strengths" in second.stdout
    assert "Traceback" not in second.stdout


def test_a_terminated_command_leaves_nothing(tmp_path):
    program = _tool(tmp_path / "shapes", "--train-images", 100000)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".shapes.*/new/train/*.jpg")):
        assert program.is_running(), program.output
        assert time.monotonic() < deadline
        time.sleep(0.1)
    program.send(signal.SIGTERM)
    assert program.finish(timeout=60).returncode == 143
    assert not list(tmp_path.iterdir())


@pytest.fixture
def interruptible():
    """As in the foreground of a shell, which has its background ignore interruptions."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("at", [0, 1, 7])
def test_an_interruption_waits_for_the_threads_locks(at, monkeypatch, tmp_path, interruptible):
    """It is raised where no work is being handed over, and nothing is left."""
    submit, handed_over = ThreadPoolExecutor.submit, []
    before = signal.getsignal(signal.SIGINT)

    def submit_and_be_interrupted(pool, *arguments):
        if len(handed_over) == at:
            os.kill(os.getpid(), signal.SIGINT)
        handed_over.append(submit(pool, *arguments))
        return handed_over[-1]

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit_and_be_interrupted)
    parameters = Parameters(train_images=8, val_images=1, image_size=64, strengths=())
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "shapes", parameters, progress=False)
    assert len(handed_over) == 8
    assert all(future.done() for future in handed_over)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is before
