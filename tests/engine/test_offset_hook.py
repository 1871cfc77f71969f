"""Statistics of offsets in real training runs: when, of what, where to, and the warning."""

from typing import ClassVar

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS, VISBACKENDS
from mmengine.runner import Runner
from mmengine.visualization import BaseVisBackend

from mmdcn import layers, plugin
from mmdcn.engine.offset_hook import OffsetStatisticsHook


@VISBACKENDS.register_module(force=True)
class ScalarsBackend(BaseVisBackend):
    """Keeps what it is given."""

    given: ClassVar[list[tuple[dict, int]]] = []
    experiment = None

    def _init_env(self):
        pass

    def add_scalars(self, scalars, step=0, file_path=None):
        self.given.append((dict(scalars), step))


class Model(BaseModel):
    """DCN, DCNv2 on two levels, 1-D and DCNv3; the first is moved by (0.5, -2) everywhere."""

    def __init__(self, **options):
        super().__init__()
        self.first = layers.DeformConv2dPack(3, 4, 3, padding=1, **options)
        self.levels = layers.ModulatedDeformConv2dPack(4, 4, 3, padding=1)
        self.line = layers.DeformConv1dPack(4, 4, 3, padding=1)
        self.v3 = layers.DCNv3(4, 4, 3, padding=1)
        with torch.no_grad():
            self.first.conv_offset.bias.view(9, 2).copy_(torch.tensor([0.5, -2.0]))

    def init_weights(self):
        """Leave the offsets as the tests have set them."""

    def forward(self, inputs, mode="tensor"):
        x = self.first(inputs)
        outputs = [self.levels(x), self.levels(x[..., ::2, ::2])]
        outputs += [self.line(x.flatten(2)), self.v3(x)]
        return {"loss": sum(output.mean() for output in outputs)}


class Hooked(Hook):
    """How many forward hooks the model has in each iteration."""

    def __init__(self):
        self.counts = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.counts.append(sum(len(m._forward_hooks) for m in runner.model.modules()))


@pytest.fixture
def train(tmp_path, monkeypatch):
    """``train(model, **config)`` for four iterations, logging every third: (runner, log)."""
    plugin.install()
    ScalarsBackend.given.clear()
    # It asks compilers for their versions, which takes longer than the training.
    monkeypatch.setattr(Runner, "_log_env", lambda *_: None)

    def run(model, hook=None, iterations=4, loop="EpochBasedTrainLoop", logger=None, config=None):
        length = dict(max_epochs=1) if loop.startswith("Epoch") else dict(max_iters=iterations)
        runner = Runner(
            model,
            str(tmp_path),
            train_dataloader=dict(
                dataset=[dict(inputs=torch.randn(3, 12, 16))] * 2 * iterations,
                batch_size=2,
                sampler=dict(type="DefaultSampler", shuffle=False),
                collate_fn=dict(type="default_collate"),
            ),
            train_cfg=dict(type=loop, **length),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.0)),
            default_hooks=dict(
                logger=logger or dict(type="LoggerHook", interval=3),
                checkpoint=None,
                offsets=hook or dict(type="OffsetStatisticsHook"),
            ),
            visualizer=dict(
                type="Visualizer",
                name=str(tmp_path),
                vis_backends=[dict(type="ScalarsBackend", save_dir=".")],
            ),
            experiment_name=tmp_path.name + str(len(list(tmp_path.iterdir()))),
            default_scope="mmengine",
        )
        lines = []
        monkeypatch.setattr(
            runner.logger, "callHandlers", lambda r: lines.append((r.levelname, r.getMessage()))
        )
        counter = Hooked()
        runner.register_hook(counter)
        runner.train()
        return counter, lines

    return run


def given() -> list[tuple[dict, int]]:
    return [(s, step) for s, step in ScalarsBackend.given if any("offsets/" in key for key in s)]


@pytest.mark.parametrize(
    ("loop", "logger", "steps"),
    [
        ("EpochBasedTrainLoop", dict(type="LoggerHook", interval=3), [3]),
        ("EpochBasedTrainLoop", dict(type="LoggerHook", interval=3, ignore_last=False), [3, 4]),
        ("EpochBasedTrainLoop", dict(type="LoggerHook", interval=10), [4]),
        ("IterBasedTrainLoop", dict(type="LoggerHook", interval=2), [2, 4]),
    ],
)
def test_it_logs_when_the_logger_does(train, loop, logger, steps):
    counter, lines = train(Model(), loop=loop, logger=logger)
    assert [step for _, step in given()] == steps
    losses = [step for s, step in ScalarsBackend.given if "loss" in s]
    assert losses == steps
    assert len([text for _, text in lines if text.startswith("Offsets in pixels")]) == len(steps)
    # The model has hooks in no other iteration.
    assert [i + 1 for i, count in enumerate(counter.counts) if count] == steps


def test_its_own_interval(train):
    train(Model(), hook=dict(type="mmdcn.OffsetStatisticsHook", interval=2))
    assert [step for _, step in given()] == [2, 4]


def test_the_numbers(train):
    _, lines = train(Model())
    ((scalars, _),) = given()
    names = {key.split("/")[1] for key in scalars if key.startswith("offsets/")}
    assert names == {"first", "levels", "line", "v3"}
    assert scalars["offsets/first/mean"] == pytest.approx(1.25)
    assert scalars["offsets/first/largest"] == pytest.approx(2)
    for name in ("levels", "line", "v3"):
        assert [scalars[f"offsets/{name}/{k}"] for k in ("mean", "largest", "outside")] == [0, 0, 0]
    # Up to x = 2 in the left taps' column, up to 1 in the others, two pixels to the left; y = 11
    # goes to 11.5, which is inside. All counted by hand, over 12 × 16 positions.
    inside = {tap: [x + tap for x in range(16) if 0 <= x + tap < 16] for tap in (-1, 0, 1)}
    gone = sum(sum(x - 2 <= -1 for x in columns) for columns in inside.values())
    share = gone / sum(map(len, inside.values()))
    assert scalars["offsets/first/outside"] == pytest.approx(share)
    (text,) = [text for _, text in lines if text.startswith("Offsets in pixels")]
    assert f"\n  first: 1.25, 2, {share:.1%}\n" in text
    assert not [text for level, text in lines if level == "WARNING" and "run away" in text]


@pytest.mark.parametrize("bias", [1e4, float("nan"), float("inf")])
def test_runaway_offsets_get_one_warning(train, bias):
    model = Model()
    nn.init.constant_(model.first.conv_offset.bias, bias)
    nn.init.constant_(model.v3.offset.bias, -1e4)
    _, lines = train(model, hook=dict(type="OffsetStatisticsHook", interval=1))
    assert [step for _, step in given()] == [1, 2, 3, 4]
    (warning,) = [text for level, text in lines if level == "WARNING" and "Offsets" in text]
    assert "in first (and in 1 more layer" in warning
    for advice in ("100% of its samples", "dcn_offset_lr_mult=0.1", "clip_grad", "max_offset=8"):
        assert advice in warning


def test_a_bound_keeps_them_from_running_away(train):
    model = Model(max_offset=2.0)
    nn.init.constant_(model.first.conv_offset.bias, 1e4)
    _, lines = train(model)
    ((scalars, _),) = given()
    assert scalars["offsets/first/largest"] == pytest.approx(2, rel=1e-3)
    assert not [text for level, text in lines if "run away" in text]


def test_a_model_without_such_layers_is_told_once(train):
    class Plain(BaseModel):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, inputs, mode="tensor"):
            return {"loss": self.conv(inputs).mean()}

    _, lines = train(Plain(), hook=dict(type="OffsetStatisticsHook", interval=1))
    assert not given()
    assert len([text for _, text in lines if text.startswith("No offsets to log")]) == 1


@pytest.mark.parametrize("scope", ["", "mmdcn."])
def test_it_is_registered(scope):
    plugin.install()
    hook = HOOKS.build(dict(type=f"{scope}OffsetStatisticsHook", max_outside=0.25))
    assert isinstance(hook, OffsetStatisticsHook)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(interval=0), "interval: expected None or an int of at least 1, got 0"),
        (dict(max_outside=1.5), "max_outside: expected a number from 0 to 1, got 1.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        OffsetStatisticsHook(**arguments)
