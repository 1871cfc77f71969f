"""A detector and a dataset small enough to train in seconds, and the tools as commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests import small_detector
from tests.programs import REPOSITORY, Program

CLASSES = ("square", "bar")

CONFIG = """
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdcn'], allow_failed_imports=False)
classes = ('square', 'bar')
{model}
model['backbone'].update(
    frozen_stages=-1,
    init_cfg=None,
    dcn=dict(type='DCN', deform_groups=1, fallback_on_stride=False),
    stage_with_dcn=(False, False, False, True))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
data_root = '{root}/'
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file='train.json',
        data_prefix=dict(img='images/'),
        metainfo=dict(classes=classes),
        pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file='val.json',
        data_prefix=dict(img='images/'),
        metainfo=dict(classes=classes),
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
default_hooks = dict(logger=dict(interval=1))
randomness = dict(seed=0)
"""


@dataclass
class Project:
    """The files of a tiny project: `config` trains on `data`."""

    root: Path
    data: Path
    config: Path

    def write_config(self, name: str, text: str) -> Path:
        """Write a config that inherits from the tiny one."""
        path = self.root / name
        path.write_text(f"_base_ = './{self.config.name}'\n{text}")
        return path


def make(root: Path) -> Project:
    """Write a project into a folder."""
    data = root / "data"
    (data / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        _write_split(data, split, count, random)
    config = root / "tiny.py"
    config.write_text(CONFIG.format(model=small_detector.MODEL, root=data))
    return Project(root, data, config)


def _write_split(data: Path, split: str, count: int, random: np.random.Generator) -> None:
    """Images of one bright rectangle each, with their COCO annotations."""
    images, annotations = [], []
    for index in range(1, count + 1):
        name = f"{split}{index}.png"
        category = index % 2
        width, height = (24, 24) if category == 0 else (40, 12)
        x, y = (int(v) for v in random.integers(0, 24, 2))
        pixels = random.integers(0, 60, (64, 64, 3)).astype(np.uint8)
        pixels[y : y + height, x : x + width] = random.integers(150, 255, 3)
        Image.fromarray(pixels).save(data / "images" / name)
        images.append(dict(id=index, file_name=name, width=64, height=64))
        box = dict(bbox=[x, y, width, height], area=width * height, iscrowd=0)
        annotations.append(dict(id=index, image_id=index, category_id=category + 1, **box))
    categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)]
    text = json.dumps(dict(images=images, annotations=annotations, categories=categories))
    (data / f"{split}.json").write_text(text)


def environment(cwd: Path) -> dict[str, str]:
    """The environment variables of a tool that runs in a folder."""
    return {
        **os.environ,
        # The project's folder, for modules that its configs import.
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{cwd}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }


def run_tool(
    *command: object, cwd: Path, timeout: float = 300, fresh: bool = False
) -> subprocess.CompletedProcess:
    """Run a tool as a user would: ``run_tool("train.py", config, ...)``; output is joined.

    Args:
        command: its name in `tools/`, and its arguments.
        cwd: where it runs.
        timeout: in seconds.
        fresh: whether it imports torch itself, as what torch sees then is what is tested.
    """
    tool = REPOSITORY / "tools" / str(command[0])
    if tool.suffix == ".py" and not fresh:
        return Program([tool, *command[1:]], cwd, environment(cwd)).finish(timeout)
    program = [sys.executable] if tool.suffix == ".py" else ["bash"]
    return subprocess.run(
        [*program, str(tool), *map(str, command[1:])],
        cwd=cwd,
        env=environment(cwd),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
