"""The hook in a real training run: what it draws, where, and when."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import cv2
import numpy as np
import pytest

pytest.importorskip("mmdet")

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, VISBACKENDS
from mmengine.runner import Runner
from mmengine.visualization import BaseVisBackend
from torch import nn

from mmdcn.engine.offset_hook import OffsetStatisticsHook
from mmdcn.engine.preflight import ConfigError
from mmdcn.engine.sampling_hook import SamplingVisualizationHook
from mmdcn.layers import DeformConv2dPack
from tests.tools import project


@VISBACKENDS.register_module(force=True)
class AnotherBackend(BaseVisBackend):
    """Keeps what it is given."""

    pictures: ClassVar[list] = []
    experiment = None

    def _init_env(self):
        pass

    def add_image(self, name, image, step=0, **kwargs):
        self.pictures.append((name, image, step))


class CountHooks(Hook):
    """How many forward hooks the model has in each iteration."""

    def __init__(self):
        self.counts = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.counts.append(sum(len(m._forward_hooks) for m in runner.model.modules()))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    tiny = project.make(tmp_path_factory.mktemp("sampling"))
    cfg = Config.fromfile(tiny.config)
    cfg.work_dir = str(tiny.root / "run")
    cfg.experiment_name = "sampling_hook"
    cfg.train_cfg.max_epochs = 2
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.custom_hooks = [
        dict(type="SamplingVisualizationHook", interval=3, num_layers=2, max_points=3)
    ]
    backends = [dict(type="LocalVisBackend"), dict(type="AnotherBackend", save_dir=".")]
    if find_spec("tensorboard"):
        backends.append(dict(type="TensorboardVisBackend"))
    cfg.visualizer = dict(type="DetLocalVisualizer", name="sampling_hook", vis_backends=backends)
    runner = Runner.from_cfg(cfg)
    counter = CountHooks()
    runner.register_hook(counter)  # Of higher priority, hence before the pictures are drawn.
    runner.train()
    return runner, counter


def test_pictures_reach_every_backend_at_their_interval(run):
    runner, _ = run
    # 4 images in batches of 2, twice: iterations 1 to 4.
    drawn = [(name, step) for name, _, step in AnotherBackend.pictures]
    assert drawn == [("sampling_points", 1), ("sampling_points", 4)]
    for name, image, step in AnotherBackend.pictures:
        (path,) = Path(runner.work_dir).rglob(f"{name}_{step}.png")
        np.testing.assert_array_equal(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB), image)
        assert image.std() > 20


def test_pictures_reach_tensorboard(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runner, _ = run
    (path,) = Path(runner.work_dir).rglob("events.out.tfevents.*")
    events = EventAccumulator(str(path), {"images": 0}).Reload()
    assert [image.step for image in events.Images("sampling_points")] == [1, 4]


def test_nothing_is_recorded_in_between(run):
    _, counter = run
    first, second, third, fourth = counter.counts
    assert second == third == 0
    assert first == fourth > 0


def test_the_picture_shows_the_image_that_was_trained_on(run):
    """A bright rectangle on a dark image, somewhere in each panel."""
    _, image, _ = AnotherBackend.pictures[0]
    panel = image[100:-100, 50:400]
    assert (panel.max(axis=2) < 90).mean() > 0.5
    assert (panel.min(axis=2) > 100).any()


@pytest.mark.parametrize("scope", ["", "mmdcn."])
def test_it_is_registered(scope):
    hook = HOOKS.build(dict(type=f"{scope}SamplingVisualizationHook", interval=10))
    assert isinstance(hook, SamplingVisualizationHook)
    assert hook.interval == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(interval=0), "interval: expected an int of at least 1, got 0"),
        (dict(max_points=0), "max_points: expected an int of at least 1, got 0"),
        (dict(num_layers=4), "layers: expected one to three, got 4"),
        (dict(layers=["a", "b", "c", "d"]), "layers: expected one to three, got 4"),
        (dict(layers="conv"), "layers: expected a list of one to three names, got 'conv'"),
        (dict(layers=[3]), "layers: expected a list of one to three names"),
        (dict(layers=[]), "num_layers: expected an int of at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SamplingVisualizationHook(**arguments)


def test_layers_are_looked_for_before_training():
    model = nn.ModuleDict({"backbone": nn.Sequential(nn.Conv2d(3, 3, 1))})
    runner = SimpleNamespace(model=model)
    SamplingVisualizationHook(layers=["backbone.0", "backbone.0#2"]).before_train(runner)
    with pytest.raises(ConfigError, match=r"such as 'backbone.0', .*got 'backbon.0'"):
        SamplingVisualizationHook(layers=["backbon.0"]).before_train(runner)


@pytest.mark.parametrize(
    ("layer", "layers", "message"),
    [
        (nn.Conv2d, None, "expected deformable convolutions .*, got none: RoI pooling"),
        (DeformConv2dPack, ["backbone.1"], "layers: expected some of backbone.0, got 'backbone.1'"),
    ],
)
def test_a_model_of_which_nothing_can_be_drawn_ends_a_tool_in_a_sentence(layer, layers, message):
    model = nn.ModuleDict(
        {
            "backbone": nn.Sequential(layer(3, 3, 3, padding=1), nn.ReLU()),
            "data_preprocessor": nn.Identity(),
        }
    )
    runner = SimpleNamespace(model=model, iter=0)
    hook = SamplingVisualizationHook(layers=layers)
    hook.before_train_iter(runner, 0)
    sample = SimpleNamespace(img_shape=(16, 16))
    model["data_preprocessor"](dict(inputs=torch.zeros(1, 3, 16, 16), data_samples=[sample]))
    model["backbone"](torch.zeros(1, 3, 16, 16))
    with pytest.raises(ConfigError, match=f"^SamplingVisualizationHook: .*{message}"):
        hook.after_train_iter(runner, 0)


@pytest.mark.parametrize("kind", [SamplingVisualizationHook, OffsetStatisticsHook])
def test_an_unknown_argument_is_named(kind):
    message = rf"^{kind.__name__}: unknown argument 'intervall' \(did you mean 'interval'\?\)"
    with pytest.raises(TypeError, match=message):
        HOOKS.build(dict(type=kind.__name__, intervall=10))
