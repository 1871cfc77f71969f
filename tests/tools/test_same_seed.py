"""Two runs of `tools/train.py` with one seed and deterministic=True are equal, bit for bit."""

import torch

from mmdcn.datasets import warped_shapes
from tests.programs import Program

from .project import REPOSITORY, environment

CONFIG = REPOSITORY / "configs" / "demo" / "faster-rcnn_r50-mdconv-c3-c4_fpn_demo.py"


def train(folder, name, seed=0):
    """Weights, optimizer and logs of a few iterations of the demo's model on two threads."""
    command = [REPOSITORY / "tools" / "train.py", CONFIG, "--work-dir", folder / name]
    command += ["--cfg-options", f"randomness.seed={seed}", "randomness.deterministic=True"]
    command += [f"train_dataloader.dataset.data_root={folder}/shapes", "train_cfg.max_iters=3"]
    command += ["train_dataloader.dataset.pipeline.2.scale=(96,96)"]
    command += ["model.backbone.base_channels=8", "model.neck.in_channels=[64,128,256]"]
    command += ["train_dataloader.batch_size=2", "val_dataloader=None", "val_cfg=None"]
    command += ["val_evaluator=None", "default_hooks.logger.interval=1"]
    threads = environment(folder) | {"OMP_NUM_THREADS": "2"}
    result = Program(command, folder, threads).finish()
    assert result.returncode == 0, result.stdout
    checkpoint = torch.load(folder / name / "iter_3.pth", weights_only=False)
    return checkpoint["state_dict"], checkpoint["optimizer"]


def bits(node):
    """All tensors and values in nested dicts and lists, in order."""
    if isinstance(node, dict):
        node = node.values()
    elif isinstance(node, torch.Tensor):
        return [(node.dtype, node.shape, node.numpy().tobytes())]
    elif not isinstance(node, (list, tuple)):
        return [node]
    return [entry for child in node for entry in bits(child)]


def test_runs_with_one_seed_are_equal(tmp_path):
    parameters = warped_shapes.Parameters(train_images=8, val_images=1, image_size=96, strengths=())
    warped_shapes.generate(tmp_path / "shapes", parameters, progress=False)
    weights, optimizer = train(tmp_path, "first")
    again, optimizer_again = train(tmp_path, "second")
    assert weights.keys() == again.keys()
    differing = [name for name in weights if bits(weights[name]) != bits(again[name])]
    assert differing == []
    assert optimizer["state"] and bits(optimizer) == bits(optimizer_again)
