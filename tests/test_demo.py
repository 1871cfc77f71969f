"""The demo: its report, and what it keeps, does again or leaves alone."""

import fcntl
import importlib.util
import json
import os
import signal
import time
from pathlib import Path
from typing import ClassVar

import cv2
import pytest

pytest.importorskip("mmdet")

from mmengine.config import Config
from mmengine.runner import Runner

from mmdcn.datasets import warped_shapes
from mmdcn.datasets.warped_shapes import CLASSES
from mmdcn.engine.preflight import ConfigError
from mmdcn.visualization import demo_report
from tests import unformatted_configs  # noqa: F401
from tests.programs import Program

ROOT = Path(__file__).parents[1]
MODELS = ("plain", "DCN", "DCNv2")


# Small enough for seconds: all layers, with few channels, on few images.
ITERATIONS = 6
OPTIONS = [
    *("--iters", ITERATIONS, "--train-images", 8, "--val-images", 4, "--cfg-options"),
    *("train_dataloader.batch_size=2", f"default_hooks.checkpoint.interval={ITERATIONS // 2}"),
    *("model.backbone.base_channels=8", "model.neck.in_channels=[64,128,256]"),
    "default_hooks.logger.interval=1",
]


def _start(work_dir, *options):
    command = [ROOT / "tools/demo.py", "--work-dir", work_dir, *OPTIONS, *options]
    return Program(command, work_dir, os.environ | {"OMP_NUM_THREADS": "1"})


def _finish(program):
    result = program.finish()
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def interrupted_and_resumed(tmp_path_factory):
    """The demo terminated while its second model trains, and what the same command then says."""
    work_dir = tmp_path_factory.mktemp("demo")
    first = _start(work_dir)
    deadline = time.monotonic() + 300
    while not (work_dir / "DCN" / "last_checkpoint").exists():
        assert first.is_running(), first.output
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send(signal.SIGTERM)
    result = first.finish()
    assert result.returncode == 143, result.stdout
    assert "terminated; run the same command again" in result.stdout
    assert not list(work_dir.rglob(".*.new"))
    assert not (work_dir / "DCN" / "result.json").exists()
    return work_dir, _finish(_start(work_dir))


def test_an_interrupted_demo_goes_on(interrupted_and_resumed):
    work_dir, output = interrupted_and_resumed
    assert f"{work_dir / 'plain'} is up to date" in output.replace("\n", "")
    resumed = next(line for line in output.splitlines() if "resumed epoch" in line)
    iteration = int(resumed.rpartition("iter: ")[2])
    assert 3 <= iteration < ITERATIONS
    assert f"Iter(train) [{iteration + 1}/{ITERATIONS}]" in output
    assert (work_dir / "DCNv2" / f"iter_{ITERATIONS}.pth").exists()


def test_report(interrupted_and_resumed):
    work_dir, _ = interrupted_and_resumed
    report = json.loads((work_dir / "report.json").read_text())
    assert tuple(report["models"]) == MODELS
    for result in report["models"].values():
        for metric in ("AP", "AP50", "APs", "APm", "APl"):
            assert -1 <= result[metric] <= 1
        assert result["iterations"] == ITERATIONS
        assert 0 < result["seconds_per_iteration"] < 60
        assert {"torch", "mmcv", "mmdet", "mmdcn"} < set(result["versions"])
        assert result["machine"]
    parameters = [report["models"][name]["parameters"] for name in MODELS]
    # 4 + 6 layers of 16 and 32 channels, with 18 and 27 offset channels each.
    branches = [sum(n * (9 * c + 1) for n, c in ((4, 16), (6, 32))) * k for k in (18, 27)]
    assert parameters[1] - parameters[0] == branches[0]
    assert parameters[2] - parameters[0] == branches[1]
    text = (work_dir / "report.md").read_text()
    for name in MODELS:
        assert f"| {name} | {report['models'][name]['AP']:.3f} |" in text


def test_a_quick_demo_says_so_and_has_a_folder_of_its_own(
    demo, interrupted_and_resumed, monkeypatch
):
    report = json.loads((interrupted_and_resumed[0] / "report.json").read_text())
    assert report["quick"] is False
    assert demo_report.QUICK_NOTE not in demo_report.text(report)
    assert demo_report.QUICK_NOTE in demo_report.text({**report, "quick": True})
    parsed = {}
    for options in ([], ["--quick"], ["--quick", "--iters", "7"]):
        monkeypatch.setattr("sys.argv", ["demo.py", *options])
        parsed[" ".join(options)] = demo.parse_args()
    full, quick, own = parsed.values()
    assert full.iters is None
    assert (full.train_images, full.val_images) == (2000, 200)
    assert quick.iters * 8 <= quick.train_images < full.train_images  # each image at most once
    assert (own.iters, own.work_dir) == (7, quick.work_dir)
    assert quick.work_dir != full.work_dir


@pytest.mark.parametrize(
    "picture", ["detections.png", "sampling_points.png", "data/contact_sheet.png"]
)
def test_pictures_are_in_the_report(interrupted_and_resumed, picture):
    work_dir, _ = interrupted_and_resumed
    assert f"]({picture})" in (work_dir / "report.md").read_text()
    pixels = cv2.imread(str(work_dir / picture))
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 20


def test_a_finished_demo_is_quick(interrupted_and_resumed):
    work_dir, _ = interrupted_and_resumed
    output = _finish(_start(work_dir))
    assert "Iter(train)" not in output
    assert output.replace("\n", "").count("is up to date") == 4  # data and three models


def test_configs_name_the_classes_of_the_data():
    for config in (ROOT / "configs/demo").glob("*.py"):
        cfg = Config.fromfile(config)
        assert cfg.metainfo.classes == CLASSES
        assert len(cfg.metainfo.palette) == cfg.model.roi_head.bbox_head.num_classes == len(CLASSES)


def test_two_demos_do_not_share_a_folder(demo, tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another demo is running in"):
            demo.main(_arguments(demo, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def _arguments(demo, work_dir, *options):
    """The arguments as the command line has them."""
    command = ["demo.py", "--work-dir", work_dir, *OPTIONS, *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [str(part) for part in command])
        return demo.parse_args()


def test_other_settings_are_refused_before_anything_changes(demo, interrupted_and_resumed):
    work_dir, _ = interrupted_and_resumed
    before = {path: path.stat().st_mtime_ns for path in work_dir.rglob("*")}
    for options, named in {
        ("--iters", "9"): f"train_cfg.max_iters {ITERATIONS}, now 9",
        ("--seed", "1"): "randomness.seed 0, now 1; data.seed 0, now 1",
        ("train_dataloader.batch_size=3",): "train_dataloader.batch_size 2, now 3",
    }.items():
        with pytest.raises(ConfigError) as error:
            demo.main(_arguments(demo, work_dir, *options))
        assert f"{work_dir / 'plain'} was made with other settings ({named}" in str(error.value)
        assert "is kept: choose another --work-dir for these, or --restart" in str(error.value)
    after = {path: path.stat().st_mtime_ns for path in work_dir.rglob("*")}
    assert {**after, work_dir / ".lock": 0} == {**before, work_dir / ".lock": 0}


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("model.backbone.depth=7", "KeyError: 'invalid depth 7 for resnet'"),
        ("test_evaluator.metric=F1", "metric should be one of"),
        ("train_dataloader.batch_size=0", "batch_size should be a positive integer"),
        ("randomness=3", "AttributeError: 'int' object has no attribute 'seed'"),
    ],
)
def test_a_bad_option_is_one_sentence(demo, tmp_path, monkeypatch, option, expected):
    monkeypatch.setattr(demo, "Runner", Runner)
    monkeypatch.setattr(f"{__name__}.OPTIONS", OPTIONS[2:])
    with pytest.raises(ConfigError) as error:
        demo.main(_arguments(demo, tmp_path, option))
    assert str(error.value).startswith("--cfg-options train_dataloader.batch_size=2")
    assert f"{option}: the demo cannot run: " in str(error.value)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    # Nothing is there that would be in the way of the next try.
    monkeypatch.setattr(demo, "train_and_test", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.main(_arguments(demo, tmp_path))


def test_a_folder_that_cannot_be_written(demo, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write to .*file.demo: .*; choose another"):
        demo.main(_arguments(demo, tmp_path / "file" / "demo"))


# One model's folder


@pytest.fixture
def demo(monkeypatch):
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tools/demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "Runner", _FakeRunner)
    monkeypatch.setattr(module.preflight, "check", lambda *_, **__: None)
    monkeypatch.setattr(_FakeRunner, "trained", 0)
    monkeypatch.setattr(_FakeRunner, "times", [3.0, 0.1, 0.1])
    return module


class _FakeRunner:
    """Stands for mmengine's: counts how often it trains."""

    trained = 0
    times: ClassVar = []
    test_loop = None

    def __init__(self, cfg):
        self.cfg = cfg
        self.model = type("Model", (), {"parameters": lambda self: []})()
        buffer = type("Buffer", (), {"data": (self.times, None)})
        self.message_hub = type("Hub", (), {"get_scalar": lambda *_: buffer})()

    from_cfg = classmethod(lambda cls, cfg: cls(cfg))

    def train(self):
        _FakeRunner.trained += 1

    def test(self):
        metrics = ("mAP", "mAP_50", "mAP_s", "mAP_m", "mAP_l")
        return {f"coco/bbox_{name}": 0.5 for name in metrics}


def _train(demo, folder, iters=4, data_seed=0, restart=False):
    cfg = Config.fromfile(ROOT / "configs/demo/faster-rcnn_r50_fpn_demo.py")
    demo.set_iterations(cfg, iters)
    settings = demo.settings_of(cfg, warped_shapes.Parameters(seed=data_seed))
    demo.work_folder.claim(folder, settings, demo.RESULT, restart)
    return demo.train_and_test(cfg, folder.with_name("data"), folder)


def test_a_finished_model_is_not_trained_again(demo, tmp_path):
    result = _train(demo, tmp_path / "plain")
    assert result["seconds_per_iteration"] == 0.1  # the median, whatever the first one took
    assert _train(demo, tmp_path / "plain") == result
    assert _train(demo, tmp_path / "plain", restart=True) == result
    assert _FakeRunner.trained == 1


@pytest.mark.parametrize("change", [{"iters": 5}, {"data_seed": 1}])
@pytest.mark.parametrize("kept", ["result.json", "last_checkpoint"])
def test_other_settings_begin_anew_only_for_a_restart(demo, tmp_path, change, kept):
    folder = tmp_path / "plain"
    _train(demo, folder)
    (folder / "result.json").rename(folder / kept)
    with pytest.raises(ConfigError, match="was made with other settings"):
        _train(demo, folder, **change)
    assert (folder / kept).exists()
    assert _FakeRunner.trained == 1
    _train(demo, folder, **change, restart=True)
    assert _FakeRunner.trained == 2
    if kept == "last_checkpoint":
        assert not (folder / kept).exists()


def test_what_never_came_to_a_checkpoint_is_replaced(demo, tmp_path):
    _train(demo, tmp_path / "plain")
    (tmp_path / "plain" / "result.json").unlink()
    _train(demo, tmp_path / "plain", iters=5)
    assert _FakeRunner.trained == 2


def test_times_that_scatter_are_marked(demo, tmp_path, monkeypatch):
    quiet = _train(demo, tmp_path / "quiet")
    assert quiet["seconds_per_iteration_quartiles"] == [0.1, 1.55]
    monkeypatch.setattr(_FakeRunner, "times", [3.0, *[0.1] * 20])
    rows = {"first": quiet, "second": _train(demo, tmp_path / "second")}
    assert [row[-1] for row in demo_report.table_rows(rows)] == ["ms / iter", "~100", "100"]
    assert demo_report.scatter_note(rows).startswith(
        "~ half of the iterations spread over more than 20%"
    )
    assert demo_report.scatter_note({"second": rows["second"]}) == ""


def test_set_iterations_scales_the_whole_schedule(demo):
    cfg = Config.fromfile(ROOT / "configs/demo/faster-rcnn_r50_fpn_demo.py")
    begins = [s.begin for s in cfg.param_scheduler]
    total = cfg.train_cfg.max_iters
    demo.set_iterations(cfg, 2 * total)
    assert cfg.train_cfg.max_iters == 2 * total
    assert cfg.param_scheduler[-1].end == 2 * total
    assert [s.begin for s in cfg.param_scheduler] == [2 * b for b in begins]


def test_a_folder_of_something_else_is_left_alone(demo, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="was not made by this demo"):
        _train(demo, folder)
    assert (folder / "thesis.txt").read_text() == "years of work"
    assert _FakeRunner.trained == 0
