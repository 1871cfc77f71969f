"""`tools/image_demo.py` on a trained detector."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch

from .project import run_tool


@pytest.fixture(scope="module")
def model(project, trained):
    return project.config, trained / "epoch_1.pth"


@pytest.fixture
def photos(project, tmp_path):
    """A folder with four images, in a sub-folder one more, and something else."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    names = ("b.PNG", "a.png", "c.png", "more/d.png")
    for source, name in zip(sorted((project.data / "images").iterdir()), names):
        shutil.copy(source, folder / name)
    cv2.imwrite(str(folder / "e.jpg"), np.full((40, 70, 3), 90, np.uint8))
    (folder / "notes.txt").write_text("no image")
    return folder


def cut_off(path):
    """The beginning of an image file, of which OpenCV reads the part that is there."""
    content = path.read_bytes()
    return next(
        content[:size]
        for size in range(len(content) - 1, 0, -1)
        if cv2.imdecode(np.frombuffer(content[:size], np.uint8), cv2.IMREAD_COLOR) is None
    )


def results(out):
    """The names in both folders of results, sorted."""
    return {path.name: sorted(p.name for p in path.iterdir()) for path in out.iterdir()}


def test_a_folder(model, photos, tmp_path, run_here, capsys):
    out = tmp_path / "out"
    options = ["--batch-size", 3, "--pred-score-thr", "0", "--device", "cpu", "--out-dir", out]
    run_here("image_demo.py", photos, *model, *options)
    assert f"4 images: wrote {out}/vis and {out}/preds" in capsys.readouterr().out
    assert results(out) == {
        "vis": ["a.png", "b.PNG", "c.png", "e.jpg"],
        "preds": ["a.json", "b.json", "c.json", "e.json"],
    }
    for name in ("a.png", "e.jpg"):
        before, after = (cv2.imread(str(folder / name)) for folder in (photos, out / "vis"))
        assert before.shape == after.shape
        assert (before != after).any(axis=2).mean() > 0.01  # boxes are drawn
    found = json.loads((out / "preds" / "e.json").read_text())
    assert {len(values) for values in found.values()} == {len(found["scores"])} != {0}
    assert set(found["labels"]) <= {0, 1} and max(found["scores"]) <= 1
    boxes = np.array(found["bboxes"])
    assert boxes.min() >= 0 and (boxes[:, 2:] <= (70, 40)).all()


def test_batches_change_nothing(model, photos, tmp_path, run_here):
    for size in (1, 4):
        options = ["--batch-size", size, "--no-save-vis", "--out-dir", tmp_path / str(size)]
        run_here("image_demo.py", photos, *model, *options)
    assert results(tmp_path / "1") == results(tmp_path / "4")
    assert list(results(tmp_path / "1")) == ["preds"]
    for path in (tmp_path / "1" / "preds").iterdir():
        one, four = (json.loads((tmp_path / n / "preds" / path.name).read_text()) for n in "14")
        np.testing.assert_allclose(one["scores"][:5], four["scores"][:5], rtol=1e-3)


def test_a_pattern_and_a_file_as_a_command(project, model, photos):
    """The command, with its default folder, and an image that cannot be read among others."""
    (photos / "broken.png").write_bytes(b"\x89PNG")
    (photos / "cut.jpg").write_bytes(cut_off(photos / "e.jpg"))
    broken = [photos / "cut.jpg", photos / "broken.png"]
    inputs = [f"{photos}/**/[d-e].*", *broken, photos / "more" / "d.png"]
    done = run_tool("image_demo.py", *inputs, *model, "--no-save-pred", cwd=project.root)
    assert done.returncode == 1
    assert "4/4" in done.stdout  # the progress bar's
    assert "2 images: wrote outputs/vis\n" in done.stdout
    told = [f"error: cannot read the image {path}" for path in broken]
    assert done.stdout.splitlines()[-2:] == told
    assert "Traceback" not in done.stdout
    assert results(project.root / "outputs") == {"vis": ["d.png", "e.jpg"]}


def test_names_under_which_no_picture_can_be_written(model, photos, tmp_path, run_here):
    """None without colours, and none without an ending."""
    pixels = cv2.imread(str(photos / "e.jpg"))
    cv2.imwrite(str(photos / "grey.pgm"), pixels[..., 0])
    shutil.copy(photos / "e.jpg", photos / "no ending")
    out = tmp_path / "out"
    run_here("image_demo.py", photos / "grey.pgm", photos / "no ending", *model, "--out-dir", out)
    assert results(out) == {
        "vis": ["grey.png", "no ending.png"],
        "preds": ["grey.json", "no ending.json"],
    }
    assert cv2.imread(str(out / "vis" / "no ending.png")).shape == pixels.shape


def test_mistakes_in_images_are_seen_before_the_imports(model, photos, run_here, monkeypatch):
    from mmdcn.engine import launch

    monkeypatch.setattr(launch.startup, "load", lambda: pytest.fail("too late"))
    cut = photos / "cut.jpg"
    cut.write_bytes(cut_off(photos / "e.jpg"))
    for command in (
        ["image_demo.py", cut, *model],
        ["visualize_sampling.py", *model, cut],
        ["visualize_sampling.py", *model, photos / "notes.txt"],
        ["visualize_sampling.py", *model, photos / "e.jpg", "--points", "71,3"],
    ):
        with pytest.raises(SystemExit, match=r"^error: (cannot read the |image: |--points: )"):
            run_here(*command)


def test_nothing_is_written_where_nothing_is_asked_for(model, photos, run_here, capsys, project):
    before = sorted(project.root.rglob("*"))
    options = ["--no-save-vis", "--no-save-pred", "--print-result", "--out-dir", "never"]
    run_here("image_demo.py", photos / "e.jpg", *model, *options)
    assert sorted(project.root.rglob("*")) == before
    printed = capsys.readouterr().out
    assert "'bboxes'" in printed and "wrote" not in printed


MISTAKES = {
    "no such image": (["missing.png"], [], "no image 'missing.png': expected an image, a folder"),
    "an empty folder": (["{photos}/empty"], [], "/empty': expected a folder with images (.jpg"),
    "a pattern that fits nothing": (["{photos}/*.gif"], [], "*.gif': expected an image, a folder"),
    "no image": (["{photos}/notes.txt"], [], "cannot read the image {photos}/notes.txt"),
    "cut off": (["{photos}/cut.jpg"], [], "cannot read the image {photos}/cut.jpg"),
    "empty": (["{photos}/empty.png"], [], "cannot read the image {photos}/empty.png"),
    "two of a name": (["{photos}/a.png", "{photos}/more/a.png"], [], "results of the same name"),
    "a file in the way": (
        ["{photos}"],
        ["--out-dir", "{photos}/notes.txt"],
        "notes.txt' is not a folder",
    ),
    "no such device": (["{photos}"], ["--device", "hpu"], "--device hpu: "),
    "a setting": (["{photos}"], ["--cfg-options", "a=[1,2"], "--cfg-options: cannot read 'a=[1,2'"),
    "no visualizer": (["{photos}"], ["--cfg-options", "visualizer=None"], "has no visualizer"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_message(mistake, model, photos, run_here, tmp_path):
    (photos / "empty").mkdir()
    shutil.copy(photos / "a.png", photos / "more" / "a.png")
    (photos / "empty.png").touch()
    (photos / "cut.jpg").write_bytes(cut_off(photos / "e.jpg"))
    inputs, options, expected = MISTAKES[mistake]
    inputs, options = ([text.format(photos=photos) for text in part] for part in (inputs, options))
    out = [] if "--out-dir" in options else ["--out-dir", tmp_path / "never"]
    with pytest.raises(SystemExit) as stop:
        run_here("image_demo.py", *inputs, *model, *options, *out)
    assert stop.value.code.startswith("error: ")
    assert expected.format(photos=photos) in stop.value.code
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--batch-size", "0"], "argument --batch-size: expected at least 1, got 0"),
        (["--pred-score-thr", "30"], "argument --pred-score-thr: expected 0 to 1, got 30.0"),
        (["--device", "tpv"], "argument --device: expected one of cpu, "),
        (["--palette", "pink"], "argument --palette: invalid choice: 'pink'"),
    ],
)
def test_bad_arguments(model, photos, run_here, capsys, options, expected):
    with pytest.raises(SystemExit):
        run_here("image_demo.py", photos, *model, *options)
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["image_demo.py", "export_onnx.py", "visualize_sampling.py"])
def test_a_checkpoint_of_another_model_is_refused(tool, model, photos, run_here, tmp_path):
    """By every tool that would go on with weights that nobody has trained."""
    image, out = photos / "e.jpg", tmp_path / "never"
    command = {
        "image_demo.py": [image, *model, "--out-dir", out],
        "export_onnx.py": [*model, "-o", f"{out}.onnx", "--images", image],
        "visualize_sampling.py": [*model, image, "--out", f"{out}.png"],
    }[tool]
    for setting, expected in (
        ("model.roi_head.bbox_head.num_classes=3", r"weights of .* do not fit the model, such as "),
        ("model.backbone.dcn.type=DCNv3", r"(do not fit|lacks .* weights of) the model, such as "),
    ):
        with pytest.raises(SystemExit, match=expected):
            run_here(tool, *command, "--cfg-options", setting)
    assert not list(tmp_path.glob("never*"))


def test_classes_are_named_by_the_config_where_the_checkpoint_does_not(model, tmp_path):
    from mmdcn.engine import inference, launch

    config, checkpoint = model
    content = torch.load(checkpoint, weights_only=False)
    named = content["meta"]["dataset_meta"]["classes"]
    del content["meta"]["dataset_meta"]
    torch.save(content, tmp_path / "nameless.pth")
    cfg = launch.read_config(str(config))
    inferencer = inference.build(cfg, str(tmp_path / "nameless.pth"), "cpu")
    assert inferencer.visualizer.dataset_meta["classes"] == tuple(named)
    assert inferencer.model.dataset_meta["classes"] == tuple(named)
