"""The log line about checkpoints without offset branches."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

import mmengine.runner
from mmengine.logging import MMLogger
from mmengine.runner.checkpoint import load_checkpoint

from mmdcn import layers, plugin


@pytest.fixture
def lines(monkeypatch):
    plugin.install()
    logged = []
    logger = MMLogger.get_current_instance()
    monkeypatch.setattr(logger, "callHandlers", lambda record: logged.append(record.getMessage()))
    return logged


def model() -> nn.Module:
    return nn.Sequential(
        layers.DeformConv2dPack(4, 4, 3),
        layers.ModulatedDeformConv2dPack(4, 4, 3),
        layers.DeformConv1dPack(4, 4, 3),
    )


def plain_state() -> dict[str, torch.Tensor]:
    return {key: value for key, value in model().state_dict().items() if "offset" not in key}


def by_file(target, state, folder):
    torch.save({"state_dict": state}, folder / "plain.pth")
    load_checkpoint(target, str(folder / "plain.pth"))


LOADERS = {
    "torch": lambda target, state, _: target.load_state_dict(state, strict=False),
    "mmengine": lambda target, state, _: mmengine.runner.checkpoint.load_state_dict(target, state),
    "mmengine, a file": by_file,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_one_line_says_how_many(loader, lines, tmp_path):
    LOADERS[loader](model(), plain_state(), tmp_path)
    (line,) = [line for line in lines if "offset branch" in line]
    assert line.startswith("The checkpoint has no weights for 3 offset branches")
    assert "(0, …)" in line
    assert "right for the checkpoint of a plain model" in line


@pytest.mark.parametrize("loader", LOADERS)
def test_nothing_is_said_of_a_complete_checkpoint(loader, lines, tmp_path):
    LOADERS[loader](model(), model().state_dict(), tmp_path)
    LOADERS[loader](nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3).state_dict(), tmp_path)
    assert not [line for line in lines if "offset branch" in line]


@pytest.mark.parametrize("layer", [layers.DCNv3, layers.DCNv4])
def test_nothing_is_said_of_layers_that_no_plain_checkpoint_fills(layer, lines):
    """Their weights are linear layers': without an offset branch they are part of a checkpoint."""
    target = nn.Sequential(layer(4, 4, 3, padding=1))
    without = {key: v for key, v in target.state_dict().items() if ".offset" not in key}
    assert any("proj.weight" in key for key in without)
    plain = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).state_dict()
    for state in (without, plain):
        missing = target.load_state_dict(state, strict=False).missing_keys
        assert any(".offset" in key for key in missing)  # of which mmengine tells
    assert not [line for line in lines if "offset branch" in line]


def test_both_are_given_back(lines):
    plugin.uninstall()
    try:
        model().load_state_dict(plain_state(), strict=False)
        assert not lines or not any("offset branch" in line for line in lines)
        assert nn.Module.load_state_dict.__module__ == "torch.nn.modules.module"
        assert not hasattr(nn.Module.load_state_dict, "__wrapped__")
        assert not hasattr(mmengine.runner.checkpoint.load_state_dict, "__wrapped__")
    finally:
        plugin.install()
