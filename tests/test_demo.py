"""The demo: its report, and what it keeps, does again or leaves alone."""

import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest

pytest.importorskip("mmdet")

from mmengine.config import Config

from mmdcn.datasets.warped_shapes import CLASSES

ROOT = Path(__file__).parents[1]
MODELS = ("plain", "DCN", "DCNv2")


def _start(work_dir):
    command = [sys.executable, ROOT / "tools/demo.py", "--work-dir", work_dir, "--iters", 8]
    command += ["--train-images", 8, "--val-images", 4, "--cfg-options"]
    command += ["train_dataloader.batch_size=2", "default_hooks.checkpoint.interval=2"]
    return subprocess.Popen(
        [*map(str, command), "default_hooks.logger.interval=1"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Shells ignore interrupts on behalf of what they run in the background, tests included.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def interrupted_and_resumed(tmp_path_factory):
    """The demo interrupted while its second model trains, and what the same command then says."""
    work_dir = tmp_path_factory.mktemp("demo")
    first = _start(work_dir)
    try:
        deadline = time.monotonic() + 300
        while not (work_dir / "DCN" / "last_checkpoint").exists():
            assert first.poll() is None, first.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first.send_signal(signal.SIGINT)
        output, _ = first.communicate(timeout=120)
    finally:
        first.kill()
    assert first.returncode == 130, output
    assert "run the same command again" in output
    assert not (work_dir / "DCN" / "result.json").exists()
    return work_dir, _finish(_start(work_dir))


def test_an_interrupted_demo_goes_on(interrupted_and_resumed):
    work_dir, output = interrupted_and_resumed
    assert f"{work_dir / 'plain'} is up to date" in output.replace("\n", "")
    resumed = next(line for line in output.splitlines() if "resumed epoch" in line)
    iteration = int(resumed.rpartition("iter: ")[2])
    assert 2 <= iteration < 8
    assert f"Iter(train) [{iteration + 1}/8]" in output
    assert (work_dir / "DCNv2" / "iter_8.pth").exists()


def test_report(interrupted_and_resumed):
    work_dir, _ = interrupted_and_resumed
    report = json.loads((work_dir / "report.json").read_text())
    assert tuple(report["models"]) == MODELS
    for result in report["models"].values():
        for metric in ("AP", "AP50", "APs", "APm", "APl"):
            assert -1 <= result[metric] <= 1
        assert result["iterations"] == 8
        assert 0 < result["seconds_per_iteration"] < 60
        assert {"torch", "mmcv", "mmdet", "mmdcn"} < set(result["versions"])
        assert result["machine"]
    parameters = [report["models"][name]["parameters"] for name in MODELS]
    # 4 + 6 + 3 layers of 32, 64 and 128 channels, with 18 and 27 offset channels each.
    branches = [sum(n * (9 * c + 1) for n, c in ((4, 32), (6, 64), (3, 128))) * k for k in (18, 27)]
    assert parameters[1] - parameters[0] == branches[0]
    assert parameters[2] - parameters[0] == branches[1]
    text = (work_dir / "report.md").read_text()
    for name in MODELS:
        assert f"| {name} | {report['models'][name]['AP']:.3f} |" in text


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


def test_two_demos_do_not_share_a_folder(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--work-dir", str(tmp_path)])
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another demo is running in"):
            demo.main()
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


# One model's folder


@pytest.fixture
def demo(monkeypatch):
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tools/demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "Runner", _FakeRunner)
    monkeypatch.setattr(_FakeRunner, "trained", 0)
    return module


class _FakeRunner:
    """Stands for mmengine's: counts how often it trains."""

    trained = 0

    def __init__(self, cfg):
        self.cfg = cfg
        self.model = type("Model", (), {"parameters": lambda self: []})()
        self.message_hub = type(
            "Hub",
            (),
            {"get_scalar": lambda *_: type("Buffer", (), {"data": ([3.0, 0.1, 0.1], None)})},
        )()

    from_cfg = classmethod(lambda cls, cfg: cls(cfg))

    def train(self):
        _FakeRunner.trained += 1

    def test(self):
        metrics = ("mAP", "mAP_50", "mAP_s", "mAP_m", "mAP_l")
        return {f"coco/bbox_{name}": 0.5 for name in metrics}


def _train(demo, folder, iters=4, data_seed=0):
    data_dir = folder.with_name("data")
    data_dir.mkdir(exist_ok=True)
    (data_dir / "manifest.json").write_text(json.dumps({"seed": data_seed}))
    cfg = Config.fromfile(ROOT / "configs/demo/faster-rcnn_r50_fpn_demo.py")
    demo.set_iterations(cfg, iters)
    return demo.train_and_test(cfg, data_dir, folder)


def test_a_finished_model_is_not_trained_again(demo, tmp_path):
    result = _train(demo, tmp_path / "plain")
    assert result["seconds_per_iteration"] == 0.1  # the median, whatever the first one took
    assert _train(demo, tmp_path / "plain") == result
    assert _FakeRunner.trained == 1


@pytest.mark.parametrize("change", [{"iters": 5}, {"data_seed": 1}])
def test_other_settings_start_anew(demo, tmp_path, change):
    _train(demo, tmp_path / "plain")
    (tmp_path / "plain" / "iter_4.pth").touch()
    _train(demo, tmp_path / "plain", **change)
    assert _FakeRunner.trained == 2
    assert not (tmp_path / "plain" / "iter_4.pth").exists()


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
    with pytest.raises(SystemExit, match="was not made by this demo"):
        _train(demo, folder)
    assert (folder / "thesis.txt").read_text() == "years of work"
    assert _FakeRunner.trained == 0
