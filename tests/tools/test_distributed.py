"""Two gloo processes on the CPU, started by the shell scripts, do what one process does."""

import shutil
import socket
from pathlib import Path

import pytest
import torch
from mmengine.fileio import load

from .project import run_tool

# Losses of Faster R-CNN are means over samples. With as many samples in each image, they are means
# over images too, and the mean of two processes' gradients is the gradient of their joint batch:
# every anchor and every proposal is a sample, and each image keeps as many proposals.
EQUAL_SAMPLES = """
custom_imports = dict(imports=['mmdcn', 'gradient_dump'], allow_failed_imports=False)
everything = dict(
    assigner=dict(pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5),
    sampler=dict(num=1000000),
    allowed_border=-1)
model = dict(
    # Or no gradient reaches the deformable layers in the first step.
    backbone=dict(zero_init_residual=False),
    train_cfg=dict(
        rpn=everything,
        rpn_proposal=dict(max_per_img=20),
        rcnn=dict(assigner=everything['assigner'], sampler=everything['sampler'])))
custom_hooks = [dict(type='GradientDumpHook')]
val_dataloader = None
val_cfg = None
val_evaluator = None
train_dataloader = dict(batch_size=4)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def gradients(work_dir, rank):
    return torch.load(work_dir / f"gradients_{rank}.pth")


def test_two_processes_compute_the_gradients_of_one(project, monkeypatch):
    shutil.copy(Path(__file__).with_name("gradient_dump.py"), project.root)
    config = project.write_config("equal_samples.py", EQUAL_SAMPLES)
    result = run_tool("train.py", config, "--work-dir", "one", cwd=project.root)
    assert result.returncode == 0, result.stdout
    monkeypatch.setenv("PORT", str(free_port()))
    halved = ("--cfg-options", "train_dataloader.batch_size=2")
    result = run_tool("dist_train.sh", config, 2, "--work-dir", "two", *halved, cwd=project.root)
    assert result.returncode == 0, result.stdout

    expected = gradients(project.root / "one", 0)
    offset_branch = [name for name in expected if "conv_offset" in name]
    assert len(offset_branch) == 6  # weight and bias of the three deformable layers
    assert all(expected[name].abs().max() > 0 for name in offset_branch)
    for rank in (0, 1):
        got = gradients(project.root / "two", rank)
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(
                got[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_two_processes_evaluate(project, trained, monkeypatch):
    monkeypatch.setenv("PORT", str(free_port()))
    options = ("--work-dir", "tested_by_two", "--out", "two.pkl")
    result = run_tool(
        "dist_test.sh", project.config, trained / "epoch_1.pth", 2, *options, cwd=project.root
    )
    assert result.returncode == 0, result.stdout
    assert [r["img_id"] for r in load(project.root / "two.pkl")] == [1, 2]


def test_a_mistake_is_reported_once(project, monkeypatch):
    monkeypatch.setenv("PORT", str(free_port()))
    result = run_tool("dist_train.sh", "missing.py", 2, cwd=project.root)
    assert result.returncode != 0
    assert result.stdout.count("error: no config file 'missing.py'") == 1


@pytest.mark.parametrize("script", ["dist_train.sh", "dist_test.sh", "slurm_train.sh"])
def test_a_script_without_arguments_says_how_to_use_it(script, tmp_path):
    result = run_tool(script, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout.startswith("usage: ")


def test_slurm_passes_everything_on(tmp_path, monkeypatch):
    # A stand-in for srun that prints its arguments, one in each line.
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("GPUS", "16")
    monkeypatch.setenv("SRUN_ARGS", "--quotatype=spot --exclusive")
    options = ("--cfg-options", "model.name=a b")
    command = ("slurm_train.sh", "part", "job", "c.py", "work", *options)
    result = run_tool(*command, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "error: no config file 'c.py'\n")
    (tmp_path / "c.py").touch()
    srun.rename(tmp_path / "other")
    result = run_tool(*command, cwd=tmp_path)
    assert result.returncode == 1 and "error: there is no srun here" in result.stdout
    (tmp_path / "other").rename(srun)
    result = run_tool(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    arguments = result.stdout.splitlines()
    assert arguments[arguments.index("--ntasks") + 1] == "16"
    assert {"--quotatype=spot", "--exclusive"} <= set(arguments)
    expected = ["c.py", "--work-dir", "work", "--launcher", "slurm", *options]
    assert arguments[-len(expected) :] == expected
