"""An image that is cut off while a training is under way, which no check beforehand has seen."""

from __future__ import annotations

import json

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
