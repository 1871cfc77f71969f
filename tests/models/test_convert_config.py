"""Models converted by their config: built, trained and resumed by a runner."""

import copy

import pytest
import torch

pytest.importorskip("mmdet")

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdcn.engine import preflight
from tests.models.converted import assert_same_output, converted, image
from tests.tools import project

pytestmark = pytest.mark.usefixtures("plugin_in_mmdet")


PLAIN = """
model = dict(backbone=dict(depth=18, dcn=None), neck=dict(in_channels=[8, 16, 32, 64]))
"""
DEFORMABLE = """
_base_ = './plain.py'
model = dict(
    type='mmdcn.Deformable',
    model_type='FasterRCNN',
    convert=[
        dict(dcn=dict(type='DCNv2'),
             select=['backbone.layer[34].*.conv2', 'neck.fpn_convs.*.conv']),
        dict(dcn=dict(type='DCN', deform_groups=2), select='rpn_head.rpn_conv')])
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='SGD', lr=0.002), paramwise_cfg=dict(dcn_offset_lr_mult=0.5))
"""
SELECTED = 2 + 2 + 4 + 1


class _AtTheStart(Hook):
    """Keeps a copy of the model as it is when training begins."""

    def before_train(self, runner):
        self.model = copy.deepcopy(runner.model)


def run(config, work_dir, **settings):
    """Train as the config says; the runner, and the model with which it began."""
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(settings | dict(work_dir=str(work_dir), val_cfg=None))
    cfg.val_dataloader = cfg.val_evaluator = None
    cfg.experiment_name = work_dir.name
    preflight.check(cfg, stages=("train",))
    runner = Runner.from_cfg(cfg)
    hook = _AtTheStart()
    runner.register_hook(hook)
    runner.train()
    return runner, hook.model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A plain detector trained for an epoch, a converted one from its weights, and that resumed."""
    tiny = project.make(tmp_path_factory.mktemp("convert"))
    plain = tiny.write_config("plain.py", PLAIN)
    deformable = tiny.root / "deformable.py"
    deformable.write_text(DEFORMABLE)
    results = {"plain": run(plain, tiny.root / "plain")}
    results["from scratch"] = run(deformable, tiny.root / "scratch")
    results["loaded"] = run(
        deformable, tiny.root / "loaded", load_from=str(tiny.root / "plain" / "epoch_1.pth")
    )
    results["resumed"] = run(
        deformable,
        tiny.root / "resumed",
        load_from=str(tiny.root / "loaded" / "epoch_1.pth"),
        resume=True,
        train_cfg=dict(max_epochs=2),
    )
    return results


def features(model):
    model.eval()
    return lambda x: model.rpn_head(model.neck(model.backbone(x)))


def test_a_config_alone_makes_it_deformable(runs):
    runner, start = runs["from scratch"]
    assert type(runner.model).__name__ == "FasterRCNN"
    assert len(converted(runner.model)) == SELECTED
    # Of the same seed, the plain detector starts from the same output.
    assert_same_output(features(start), features(runs["plain"][1]), image())


def test_the_optimizer_learns_the_offset_branches(runs):
    runner, start = runs["from scratch"]
    rates = {
        id(group["params"][0]): group["initial_lr"]
        for group in runner.optim_wrapper.optimizer.param_groups
    }
    branches = [layer.conv_offset for layer in converted(runner.model).values()]
    assert {rates[id(p)] for branch in branches for p in branch.parameters()} == {0.001}
    begun = [layer.conv_offset for layer in converted(start).values()]
    assert not any(p.any() for branch in begun for p in branch.parameters())
    assert all(branch.bias.any() for branch in branches)


def test_load_from_a_plain_checkpoint(runs):
    _, start = runs["loaded"]
    trained, _ = runs["plain"]
    assert len(converted(start)) == SELECTED
    assert_same_output(features(start), features(trained.model), image())


def test_resume(runs):
    runner, start = runs["resumed"]
    stopped, _ = runs["loaded"]
    assert runner.epoch == 2
    for (name, mine), (_, theirs) in zip(
        start.state_dict().items(), stopped.model.state_dict().items(), strict=True
    ):
        assert torch.equal(mine, theirs), name
