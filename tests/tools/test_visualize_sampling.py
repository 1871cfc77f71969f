"""`tools/visualize_sampling.py` on a trained detector."""

import importlib.util
import json
import re
import sys

import cv2
import pytest

pytest.importorskip("mmdet")

from mmdcn.engine import launch

from .project import REPOSITORY, run_tool


@pytest.fixture(scope="module")
def arguments(project, trained):
    return [project.config, trained / "epoch_1.pth", project.data / "images" / "val1.png"]


@pytest.fixture
def run_here(project, monkeypatch):
    """The tool in this process, which has imported the toolbox already."""
    spec = importlib.util.spec_from_file_location(
        "tool", REPOSITORY / "tools/visualize_sampling.py"
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.chdir(project.root)

    def run(*command):
        monkeypatch.setattr(sys, "argv", ["visualize_sampling.py", *map(str, command)])
        launch.run(tool.main, tool.parse_args)

    return run


def test_given_points_and_layers(project, arguments):
    out = project.root / "pictures" / "some.png"
    names = ["backbone.layer4.1.conv2", "backbone.layer4.2.conv2"]
    options = ["--points", "20,30.5", "50,9", "--layers", *names, "--out", out]
    result = run_tool("visualize_sampling.py", *arguments, *options, cwd=project.root)
    assert result.returncode == 0, result.stdout
    assert f"wrote {out} and {out.with_suffix('.html')}" in result.stdout
    assert sorted(path.name for path in out.parent.iterdir()) == ["some.html", "some.png"]
    picture = cv2.imread(str(out))
    assert picture.shape[1] > 1.5 * picture.shape[0]  # two panels
    page = out.with_suffix(".html").read_text()
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    assert [layer["name"] for layer in data["layers"]] == names[::-1]
    assert (data["width"], data["height"], data["start"]) == (64, 64, [20, 30.5])


def test_detected_objects(project, arguments, run_here):
    run_here(*arguments, "--min-score", "0", "--max-objects", "2")
    assert (project.root / "sampling_val1.png").exists()
    page = (project.root / "sampling_val1.html").read_text()
    for name in ("layer4.2.conv2", "layer4.1.conv2", "layer4.0.conv2"):
        assert f"backbone.{name}" in page


@pytest.mark.parametrize("kind", ["DCNv3", "DCNv4"])
def test_layers_of_every_version(project, arguments, run_here, kind, tmp_path):
    out = tmp_path / "picture.png"
    # The checkpoint is of another version, and their weights are as they start.
    settings = [f"model.backbone.dcn.type={kind}", "preflight.checkpoint=False"]
    run_here(*arguments, "--out", out, "--points", "20,30", "--cfg-options", *settings)
    page = out.with_suffix(".html").read_text()
    for name in ("layer4.2.conv2", "layer4.1.conv2", "layer4.0.conv2"):
        assert f"backbone.{name}" in page
    assert cv2.imread(str(out)).std() > 20


MISTAKES = {
    "nothing deformable": (
        ["--cfg-options", "model.backbone.dcn=None", "preflight.checkpoint=False"],
        "model: expected deformable convolutions (DCN, DCNv2, DCNv3, DCNv4, or a head that "
        "computes offsets of its own), got none",
    ),
    "nothing detected": (["--min-score", "1.1"], "nothing was detected with a score of 1.1"),
    "point outside": (["--points", "65,3"], "--points: expected x up to 64 and y to 64"),
    "a layer that samples nothing": (
        ["--layers", "backbone.layer4"],
        "--layers: expected some of backbone.layer4.0.conv2",
    ),
    "no such layer": (
        ["--layers", "backbone.layer4.0.conv"],
        "--layers: the model has no module 'backbone.layer4.0.conv'; did you mean "
        "'backbone.layer4.0.conv",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_message(arguments, run_here, mistake):
    options, expected = MISTAKES[mistake]
    with pytest.raises(SystemExit, match=f"^error: {re.escape(expected)}"):
        run_here(*arguments, *options)


def test_layers_are_looked_for_before_the_model_runs(arguments, run_here, monkeypatch):
    from mmdcn import visualization

    monkeypatch.setattr(visualization, "sample_image", lambda *_: pytest.fail("too late"))
    with pytest.raises(SystemExit, match="--layers: the model has no module 'layer4'"):
        run_here(*arguments, "--layers", "layer4")
    with pytest.raises(pytest.fail.Exception):
        run_here(*arguments, "--layers", "backbone.layer4.0.conv2#1")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--out", "a.jpg"], "expected a name ending in .png, got a.jpg"),
        (["--points", "3"], "argument --points: expected X,Y in pixels, such as 20,30.5, got '3'"),
        (["--points", "1,nan"], "argument --points: expected X,Y in pixels"),
        (["--max-objects", "0"], "argument --max-objects: expected at least 1, got 0"),
        (["--layers", *"abcd"], "argument --layers: expected one to three, got 4"),
    ],
)
def test_bad_arguments(arguments, run_here, capsys, options, expected):
    with pytest.raises(SystemExit):
        run_here(*arguments, *options)
    assert expected in capsys.readouterr().err


def test_missing_files(arguments, run_here):
    config, checkpoint, image = arguments
    with pytest.raises(SystemExit, match=r"error: no checkpoint 'missing.pth'"):
        run_here(config, "missing.pth", image)
    with pytest.raises(SystemExit, match=r"image: expected an image file, got 'missing.png'"):
        run_here(config, checkpoint, "missing.png")
    with pytest.raises(SystemExit, match=r"image: expected an image file, got '.*tiny\.py'"):
        run_here(config, checkpoint, config)
