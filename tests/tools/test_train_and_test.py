"""`tools/train.py` and `tools/test.py` as commands: train, resume, evaluate, and refuse."""

import json
import os
import re
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.fileio import load

from .project import run_tool


class Call:
    """An object that, unpickled, calls `function(*args)`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def losses(work_dir):
    """The losses of the last training run in a work folder, step by step."""
    log = max(work_dir.glob("*/vis_data/*.json"))
    entries = map(json.loads, log.read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def average_precision(output):
    return re.findall(r"bbox_mAP_copypaste: (.*)", output)


def test_training_writes_what_mmdet_writes(trained):
    assert (trained / "epoch_1.pth").exists()
    assert (trained / "last_checkpoint").read_text().endswith("epoch_1.pth")
    assert (trained / "tiny.py").exists()
    assert len(losses(trained)) == 2 and all(0 < loss < 10 for loss in losses(trained))


def test_resume_in_mixed_precision(project, trained):
    checkpoint = torch.load(trained / "epoch_1.pth", weights_only=False)
    # Text that Runner.resume would run as a Python file, as older toolboxes store it.
    checkpoint["meta"]["config"] = "open('executed', 'w')"
    work_dir = project.root / "resumed"
    work_dir.mkdir()
    torch.save(checkpoint, work_dir / "epoch_1.pth")
    (work_dir / "last_checkpoint").write_text(str(work_dir / "epoch_1.pth"))
    result = run_tool(
        *("train.py", project.config, "--work-dir", work_dir, "--resume", "--amp"),
        *("--cfg-options", "train_cfg.max_epochs=2"),
        cwd=project.root,
    )
    assert result.returncode == 0, result.stdout
    assert "resumed epoch: 1, iter: 2" in result.stdout
    assert "CPUAmpOptimWrapper" in result.stdout
    assert (work_dir / "epoch_2.pth").exists()
    assert len(losses(work_dir)) == 2 and all(0 < loss < 10 for loss in losses(work_dir))
    assert not (project.root / "executed").exists()


@pytest.mark.slow
def test_compiled_training_breaks_graphs_at_no_line_of_ours(project, trained, monkeypatch):
    """What mmengine's `compile` does to the training step, without inductor's minutes."""
    monkeypatch.setenv("TORCH_LOGS", "graph_breaks")
    result = run_tool(
        *("train.py", project.config, "--work-dir", "compiled"),
        *("--cfg-options", "compile.backend=eager"),
        cwd=project.root,
        fresh=True,  # torch reads its variable when it is imported
    )
    assert result.returncode == 0, result.stdout
    assert 'Model has been "compiled"' in result.stdout
    assert losses(project.root / "compiled") == pytest.approx(losses(trained), rel=1e-3)
    places = re.findall(r"Graph break in user code at (\S+):\d+", result.stdout)
    assert places, result.stdout  # of mmdet's
    assert not [place for place in places if "mmdcn" in Path(place).parts], places


def test_evaluation(project, trained):
    result = run_tool(
        *("test.py", project.config, trained / "epoch_1.pth", "--work-dir", "tested"),
        *("--out", "predictions.pkl", "--show-dir", "painted"),
        cwd=project.root,
    )
    assert result.returncode == 0, result.stdout
    assert len(average_precision(result.stdout)) == 1
    predictions = load(project.root / "predictions.pkl")
    assert [p["img_id"] for p in predictions] == [1, 2]
    assert all(p["pred_instances"]["bboxes"].shape[1] == 4 for p in predictions)
    painted = sorted(p.name for p in (project.root / "tested").glob("*/painted/*"))
    assert painted == ["val1.png", "val2.png"]


def test_evaluation_with_augmentation(project, trained):
    result = run_tool(
        *("test.py", project.config, trained / "epoch_1.pth", "--work-dir", "augmented", "--tta"),
        *("--out", "augmented.pkl"),
        cwd=project.root,
    )
    assert result.returncode == 0, result.stdout
    assert "DetTTAModel" in result.stdout
    assert len(load(project.root / "augmented.pkl")) == 2


def test_auto_scale_lr(project):
    # The batch of 2 is an eighth of the base batch size, and so is the learning rate.
    result = run_tool(
        *("train.py", project.config, "--work-dir", "scaled", "--auto-scale-lr"),
        cwd=project.root,
    )
    assert "Scaling the original LR by 0.125" in result.stdout, result.stdout


@pytest.mark.parametrize("option", ["test", "--resume", "load_from"])
def test_a_hostile_checkpoint_is_refused(project, trained, option):
    executed = project.root / "executed"
    hostile = project.root / "hostile.pth"
    checkpoint = torch.load(trained / "epoch_1.pth", weights_only=False)
    checkpoint["message_hub"]["runtime_info"]["best"] = Call(os.system, f"touch {executed}")
    torch.save(checkpoint, hostile)
    command = {
        "test": ["test.py", project.config, hostile],
        "--resume": ["train.py", project.config, "--resume", hostile],
        "load_from": ["train.py", project.config, "--cfg-options", f"load_from={hostile}"],
    }[option]
    result = run_tool(*command, "--work-dir", "refused", cwd=project.root)
    assert result.returncode == 1
    last = result.stdout.splitlines()[-1]
    assert last.startswith(
        f"error: checkpoint {hostile} was refused and nothing of it was executed"
    )
    assert "posix.system" in last
    assert "Traceback" not in result.stdout
    assert not executed.exists()
    assert not list((project.root / "refused").rglob("*.pth"))


def test_the_tools_of_mmdet_refuse_it_too(project, trained):
    # Importing the package is enough, as the config does.
    executed = project.root / "executed"
    hostile = project.root / "hostile.pth"
    torch.save({"state_dict": Call(os.system, f"touch {executed}")}, hostile)
    tool = Path(mmdet.__file__).parent / ".mim" / "tools" / "test.py"
    command = [tool, project.config, hostile, "--work-dir", "refused"]
    result = run_tool(*command, cwd=project.root)
    assert result.returncode == 1
    assert "UnsafeCheckpointError: checkpoint" in result.stdout.splitlines()[-1]
    assert not executed.exists()


def with_other_classes(checkpoint, path):
    """A checkpoint of a head for seven classes, which does not say so."""
    content = torch.load(checkpoint, weights_only=False)
    head = "roi_head.bbox_head.fc_cls."
    content["state_dict"] |= {f"{head}weight": torch.zeros(8, 32), f"{head}bias": torch.zeros(8)}
    del content["meta"]["dataset_meta"]
    torch.save(content, path)
    return path


def weights_alone(checkpoint, path):
    torch.save({"state_dict": torch.load(checkpoint, weights_only=False)["state_dict"]}, path)
    return path


MISTAKES = {
    "no config": (["train.py", "missing.py"], "no config file 'missing.py'"),
    "no annotations": (
        ["test.py", "{config}", "{checkpoint}", "--cfg-options", "test_evaluator.ann_file=x.json"],
        "no file 'x.json' (test_evaluator.ann_file)",
    ),
    "classes of the head": (
        ["train.py", "{config}", "--cfg-options", "model.roi_head.bbox_head.num_classes=7"],
        "train_dataloader.dataset and val_dataloader.dataset have 2: set num_classes=2",
    ),
    "classes of the checkpoint": (
        ["test.py", "{config}", "{other_classes}"],
        "do not fit the model, such as roi_head.bbox_head.fc_cls.weight: (8, 32) for (3, 32)",
    ),
    "a file for a folder": (
        ["test.py", "{config}", "{checkpoint}", "--out", "{config}/out.pkl"],
        "argument --out: cannot write to",
    ),
    "a file for pictures": (
        ["test.py", "{config}", "{checkpoint}", "--show-dir", "{checkpoint}"],
        "argument --show-dir: cannot write to",
    ),
    "weights to resume": (
        ["train.py", "{config}", "--resume", "{weights}"],
        "holds weights, but not how far the training was: to begin a new one with them",
    ),
    "no checkpoint to resume": (
        ["train.py", "{config}", "--resume", "missing.pth"],
        "no checkpoint 'missing.pth'",
    ),
    "no processes": (
        ["train.py", "{config}", "--launcher", "pytorch"],
        "--launcher pytorch: expected the environment variables RANK, WORLD_SIZE, MASTER_ADDR",
    ),
    "no display": (
        ["test.py", "{config}", "{checkpoint}", "--show"],
        "--show: there is no display (DISPLAY is not set): --show-dir writes",
    ),
    "a depth that there is none of": (
        ["train.py", "{config}", "--cfg-options", "model.backbone.depth=19"],
        "invalid depth 19 for resnet (model.backbone)",
    ),
    "a plain model": (
        ["test.py", "{config}", "{checkpoint}", "--cfg-options", "model.backbone.dcn=None"],
        "is of a deformable model, and 3 of its layers are plain in this one",
    ),
    "unknown convolution": (
        ["train.py", "{config}", "--cfg-options", "model.backbone.dcn.type=DCNv22"],
        "no convolution named 'DCNv22' is registered; did you mean 'DCNv2'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_message_before_anything_is_written(
    project, trained, mistake, run_here, monkeypatch
):
    command, expected = MISTAKES[mistake]
    names = dict(config=project.config, checkpoint=trained / "epoch_1.pth")
    names["other_classes"] = with_other_classes(trained / "epoch_1.pth", project.root / "7.pth")
    names["weights"] = weights_alone(names["checkpoint"], project.root / "weights.pth")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND", "RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    command = [part.format(**names) for part in command]
    work_dir = project.root / "never"
    with pytest.raises(SystemExit) as stop:
        run_here(*command, "--work-dir", work_dir)
    message = stop.value.code
    assert message.startswith("error: ")
    assert expected in message
    assert len(message.splitlines()) <= 2
    assert not work_dir.exists()
