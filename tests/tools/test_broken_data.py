"""What breaks while a training is under way, which no check beforehand has seen."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("mmdet")

from . import project as tiny


def train(project: tiny.Project, *settings: str):
    command = ["train.py", project.config, "--work-dir", "work", "--resume"]
    command += ["--cfg-options", "train_dataloader.num_workers=1", *settings]
    return tiny.run_tool(*command, cwd=project.root)


def test_training_goes_on_once_the_image_is_whole(tmp_path):
    project = tiny.make(tmp_path)
    listed = json.loads((project.data / "train.json").read_text())["images"][0]
    image = project.data / "images" / listed["file_name"]
    whole = image.read_bytes()
    first = train(project)
    assert first.returncode == 0, first.stdout
    image.write_bytes(whole[: len(whole) // 2])

    # The check before the training would see it.
    second = train(project, "train_cfg.max_epochs=2", "preflight.annotations=False")
    assert second.returncode == 1
    *_, said = second.stdout.strip().splitlines()
    assert said.startswith(f"error: cannot read the image {image}: ") and said.endswith("--resume")
    work = project.root / "work"
    assert sorted(path.name for path in work.glob("*.pth")) == ["epoch_1.pth"]
    assert not list(work.glob(".*.new"))

    image.write_bytes(whole)
    third = train(project, "train_cfg.max_epochs=2")
    assert third.returncode == 0, third.stdout
    assert (work / "epoch_2.pth").is_file()


def test_shared_memory_that_is_full(tmp_path):
    """In namespaces of its own, where `/dev/shm` is too small for a batch."""
    project = tiny.make(tmp_path)
    small = "mount -t tmpfs -o size=16k none /dev/shm"
    namespaces = ["unshare", "--mount", "sh", "-c"]
    try:
        subprocess.run([*namespaces, small], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting takes rights that this process has not")
    train = [sys.executable, tiny.REPOSITORY / "tools" / "train.py", project.config]
    train += ["--work-dir", "work", "--cfg-options", "train_dataloader.num_workers=1"]
    result = subprocess.run(
        [*namespaces, small + ' && exec "$@"', "sh", *train],
        cwd=project.root,
        env=tiny.environment(project.root),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    *_, said = result.stderr.strip().splitlines()
    assert said.startswith("error: the shared memory (/dev/shm) is full, ")
    assert "set num_workers=0" in said
    assert not list((project.root / "work").glob("*.pth*"))
