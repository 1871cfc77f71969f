"""Config text in checkpoints: what mmengine writes is read, and nothing is executed."""

import mmengine.infer.infer as toolbox
import pytest
import torch
from mmengine.config import Config
from mmengine.infer import BaseInferencer
from mmengine.registry import MODELS

from mmdcn.engine import checkpoint
from mmdcn.engine.config_text import LONGEST, ConfigTextError, read
from tests.programs import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").glob("*/*r50*c3-c5*.py"))[::6]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_mmengine_writes_is_read(path):
    config = Config.fromfile(path, format_python_code=False)
    config.names = {"a.b": (None, -1, 1e-5), "c d": [[1, "it's"], {"e": True}]}
    config.pi = 3.14
    assert read(config.pretty_text).to_dict() == config.to_dict()


HOSTILE = [
    "open({target!r}, 'w')",
    "model = open({target!r}, 'w')",
    "model = dict(type=open({target!r}, 'w'))",
    "model = dict({{'a': [(1, open({target!r}, 'w'))]}})",
    "model = [x for x in [open({target!r}, 'w')]]",
    "model = f'{{open({target!r}, \"w\")}}'",
    "model = {{1: 2}}[open({target!r}, 'w')]",
    "model = dict(**open({target!r}, 'w'))",
    "model = 1 if open({target!r}, 'w') else 2",
    "dict = open\nmodel = dict({target!r}, 'w')",
    "from os import system\nsystem('touch {target}')",
    "if True:\n    open({target!r}, 'w')",
    "@open({target!r}, 'w').write\ndef f(): pass",
    "a = b = open({target!r}, 'w')",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_would_run_is_refused(text, tmp_path):
    text = text.format(target=str(tmp_path / "executed"))
    with pytest.raises(ConfigTextError, match="refused and nothing of it was executed") as caught:
        read(text)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    Config.fromstring("executed = 1", ".py")  # so does mmengine read text


@pytest.mark.parametrize(
    "text",
    [
        "model = ",
        "model = b",
        "_base_ = './other.py'",
        "a, b = 1, 2",
        "model: dict = dict()",
        "model = dict(1)",
        "model = 9**9**9**9",
        "filename = 'x'",
        "model = {[]: 1}",
        "a\0 = 1",
        "model = " + "[" * 1000,
        "model = " + "-" * 10**5 + "1",
        "model = " + "1+" * 10**5 + "1",
        " " * (LONGEST + 1),
        None,
    ],
    ids=lambda text: repr(text)[:20],
)
def test_what_mmengine_does_not_write_is_refused(text):
    with pytest.raises(ConfigTextError) as caught:
        read(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_modules_are_named_and_not_imported(caplog):
    read("custom_imports = dict(imports=['mmdcn', 'this'], allow_failed_imports=False)")
    import sys

    assert "this" not in sys.modules


class Inferencer(BaseInferencer):
    """mmengine's own, of which nothing but the model is looked at."""

    def _init_pipeline(self, cfg):
        return None

    def visualize(self, *args, **kwargs): ...

    def postprocess(self, *args, **kwargs): ...


@MODELS.register_module(force=True)
class LayerOfText(torch.nn.Linear):
    """What the config text in a checkpoint builds."""


def save(path, text, place):
    hub = {"runtime_info": {"cfg": text} if place == "message_hub" else {}}
    weights = torch.nn.Linear(2, 3).state_dict()
    torch.save({"state_dict": weights, "meta": {"cfg": text}, "message_hub": hub}, path)
    return weights


@pytest.mark.usefixtures("safe_checkpoints")
@pytest.mark.parametrize("place", ["message_hub", "meta"])
def test_inferencers_without_a_config(tmp_path, place):
    path = tmp_path / "a.pth"
    weights = save(path, "model = dict(type='LayerOfText', in_features=2, out_features=3)\n", place)
    inferencer = Inferencer(weights=str(path), device="cpu", scope=None)
    assert type(inferencer.model) is LayerOfText
    torch.testing.assert_close(dict(inferencer.model.state_dict()), dict(weights))
    target = tmp_path / "executed"
    save(path, f"open({str(target)!r}, 'w')\nmodel = dict(type='LayerOfText')", place)
    with pytest.raises(ConfigTextError, match="refused"):
        Inferencer(weights=str(path), device="cpu", scope=None)
    assert not target.exists()


def test_it_can_be_undone(safe_checkpoints):
    assert isinstance(Config(), toolbox.Config) and not isinstance({}, toolbox.Config)
    assert toolbox.Config.fromstring("a = 1", ".py").a == 1
    checkpoint.uninstall()
    assert toolbox.Config is Config
    checkpoint.install()
    assert toolbox.Config is not Config
