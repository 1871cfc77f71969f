"""Training that is killed at any moment goes on from its last checkpoint, and ends as it would."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import torch

from tests.programs import Program

from .project import REPOSITORY, environment, run_tool

EPOCHS = 4
ITERATIONS = 2  # in each of them
CONFIG = """
custom_imports = dict(imports=['mmdcn', 'deadly_hook'], allow_failed_imports=False)
custom_hooks = [dict(type='DeadlyHook')]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))
train_cfg = dict(max_epochs=4)
val_dataloader = None
val_cfg = None
val_evaluator = None
"""


def learning_rates(work_dir):
    """The learning rate of each iteration, over all runs in a work folder."""
    found = {}
    for log in sorted(work_dir.glob("*/vis_data/2*.json")):
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            found[entry["step"]] = entry["lr"]
    return found


def check_files(work_dir, *expected):
    """Every file that may be taken for a checkpoint is one; `expected` are all there are."""
    names = sorted(path.name for path in work_dir.rglob("*.pth"))
    for name in names:
        assert "optimizer" in torch.load(work_dir / name, weights_only=False)
    assert names == sorted(expected)


def test_training_survives_being_killed(project, monkeypatch):
    shutil.copy(Path(__file__).with_name("deadly_hook.py"), project.root)
    config = project.write_config("deadly.py", CONFIG)
    whole, work_dir = project.root / "uninterrupted", project.root / "killed"

    def train(work_dir, die, *options):
        monkeypatch.setenv("DIE", die)
        return run_tool("train.py", config, "--work-dir", work_dir, *options, cwd=project.root)

    result = train(whole, "0:")
    assert result.returncode == 0, result.stdout

    # From outside, at a moment that nobody chose, after the first epoch.
    command = [REPOSITORY / "tools" / "train.py", config, "--work-dir", work_dir]
    program = Program(command, project.root, environment(project.root))
    deadline = time.monotonic() + 120
    while not (work_dir / "last_checkpoint").exists():
        assert program.is_running() and time.monotonic() < deadline, program.output
        time.sleep(0.01)
    time.sleep(random.Random().uniform(0, 0.3))
    program.send(signal.SIGKILL)
    assert program.finish().returncode == -signal.SIGKILL
    first = int((work_dir / "last_checkpoint").read_text().rpartition("_")[2].removesuffix(".pth"))

    # Each time the next epoch, of the last of which nothing was recorded.
    done = first
    for moment, ended_by, saved in (
        ("training", signal.SIGKILL, 0),
        ("writing", signal.SIGXFSZ, 0),
        ("recording", signal.SIGKILL, 1),
    ):
        result = train(work_dir, f"{done + 1}:{moment}", "--resume")
        assert result.returncode == -ended_by, result.stdout
        assert f"resumed epoch: {done}, iter: {done * ITERATIONS}" in result.stdout
        kept = {done, done + saved}
        check_files(work_dir, *(f"epoch_{epoch}.pth" for epoch in kept))
        done += saved
    assert (work_dir / "last_checkpoint").read_text() == ""

    result = train(work_dir, "0:", "--resume")
    assert result.returncode == 0, result.stdout
    assert f"names no checkpoint: going on from {work_dir}/epoch_{done}.pth" in result.stdout
    assert f"resumed epoch: {done}, iter: {done * ITERATIONS}" in result.stdout
    assert learning_rates(work_dir) == learning_rates(whole)
    assert list(learning_rates(whole)) == list(range(1, EPOCHS * ITERATIONS + 1))
    last = f"epoch_{EPOCHS}.pth"
    expected = torch.load(whole / last, weights_only=False)
    got = torch.load(work_dir / last, weights_only=False)
    assert got["meta"]["iter"] == expected["meta"]["iter"] == EPOCHS * ITERATIONS
    assert got["param_schedulers"] == expected["param_schedulers"]
    assert [g["lr"] for g in got["optimizer"]["param_groups"]] == [
        g["lr"] for g in expected["optimizer"]["param_groups"]
    ]
