"""What a user has without a checkout: configs by their names, their metafiles, and the tools."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet")

import mmdet
import torch
import yaml
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hub import get_config
from mmengine.infer import BaseInferencer
from mmengine.registry import init_default_scope

import mmdcn
import tests.unformatted_configs  # noqa: F401
from mmdcn import layers, plugin, registry
from mmdcn.engine import launch
from mmdcn.errors import InputError

MIM = Path(mmdcn.__file__).parent / ".mim"
CONFIGS = sorted(str(path.relative_to(MIM / "configs")) for path in MIM.glob("configs/*/*.py"))
DEMO = "mmdcn::demo/faster-rcnn_r50-mdconv-c3-c4_fpn_demo.py"


@pytest.fixture(autouse=True)
def installed():
    plugin.install()
    yield
    plugin.install()


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def models() -> list[dict]:
    """The models of all metafiles, by the index that mmengine and mim read."""
    return [
        model
        for name in read(MIM / "model-index.yml")["Import"]
        for model in read(MIM / name)["Models"]
    ]


def test_every_config_is_in_a_metafile_and_found_by_its_name():
    assert len(CONFIGS) > 25
    assert sorted(model["Config"] for model in models()) == [f"configs/{name}" for name in CONFIGS]
    names = [model["Name"] for model in models()]
    assert len(set(names)) == len(names)
    # Of each folder one: mmengine reads all metafiles for each.
    for name in {Path(name).parent: name for name in CONFIGS}.values():
        path, scope = Config._get_cfg_path(f"mmdcn::{name}", "")
        assert Path(path).samefile(MIM / "configs" / name)
        assert scope == "mmdet"


def test_weights_are_those_of_the_same_config_of_mmdet():
    theirs = {}
    folder = Path(mmdet.__file__).parent / ".mim" / "configs"
    for name in ("dcn", "dcnv2", "faster_rcnn", "mask_rcnn"):
        for model in read(folder / name / "metafile.yml")["Models"]:
            theirs.setdefault(model["Config"], model.get("Weights"))
    ours = {model["Config"]: model.get("Weights") for model in models()}
    assert ours == {config: theirs.get(config) for config in ours}


def test_reading_by_name_is_reading_the_file():
    name = DEMO.removeprefix("mmdcn::")
    assert Config.fromfile(DEMO).to_dict() == Config.fromfile(MIM / "configs" / name).to_dict()
    assert launch.read_config(DEMO, ["max_iters=7"]).max_iters == 7
    assert get_config(DEMO).model.type == "FasterRCNN"


def test_a_config_inherits_from_ours_by_name(tmp_path):
    """Where it uses a variable of the base too, which mmengine marks with the base's scope."""
    (tmp_path / "mine.py").write_text(f"_base_ = {DEMO!r}\nteacher = _base_.model\n")
    config = Config.fromfile(tmp_path / "mine.py")
    init_default_scope("mmdet")
    for settings in (config.model, config.teacher):
        with torch.device("meta"):
            assert type(MODELS.build(settings)).__name__ == "FasterRCNN"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mmdcn::dcnv2/no-such.py", "no-such.py"),
        ("nonsense::dcnv2/some.py", "mmengine does not support to load nonsense config"),
        ("mmdcn::", "like `mmdet::faster_rcnn"),
    ],
)
def test_a_tool_says_which_name_is_wrong(name, said):
    with pytest.raises(InputError) as raised:
        launch.read_config(launch.config_file(name))
    assert said in str(raised.value)


def test_models_are_listed(capsys):
    listed = BaseInferencer.list_models("mmdcn", ".*mdconv-c3-c5")
    assert "faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco" in listed


def test_the_scope_is_found_where_mmengine_looks(caplog):
    init_default_scope("mmdet")
    settings = dict(type="DCN", _scope_="mmdcn", in_channels=4, out_channels=4, kernel_size=3)
    with caplog.at_level(logging.WARNING):
        assert isinstance(MODELS.build(settings), layers.DeformConv2dPack)
        assert "OffsetStatisticsHook" in registry.HOOKS
    assert not caplog.records


def test_uninstalling_gives_mmengine_its_own_back(tmp_path):
    assert plugin.report().packaged_configs
    plugin.uninstall()
    assert not plugin.report().packaged_configs
    assert "mmdcn" not in MODULE2PACKAGE
    with pytest.raises(FileNotFoundError):
        Config.fromfile(DEMO)


def test_tools_run_from_there():
    said = subprocess.run(
        [sys.executable, MIM / "tools" / "train.py", "--help"], capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("usage: train.py")
