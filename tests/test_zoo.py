"""mmdet's own deformable configs. `make zoo` runs them all; here are a few that differ most."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")

from mmengine.config import ConfigDict

from mmdcn import plugin, zoo
from mmdcn.zoo import checking

TABLE = Path(__file__).resolve().parents[1] / "docs" / "zoo.md"

# Layers of a neck; a function that a head calls; layers that are given their offsets; a neck that
# passes larger offsets than the output.
FEW = {
    "centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py": {"ModulatedDeformConv2dPack": 3},
    "tood/tood_r50_fpn_1x_coco.py": {"TOODHead": 1},
    "vfnet/vfnet_r50_fpn_1x_coco.py": {"DeformConv2d": 2},
    "dyhead/atss_r50_fpn_dyhead_1x_coco.py": {"ModulatedDeformConv2d": 18},
}


@pytest.fixture(autouse=True)
def installed():
    plugin.install()
    yield
    plugin.install()


@pytest.mark.parametrize("name", FEW)
def test_config_works_as_with_mmcv(name):
    (found,) = zoo.find(name)
    assert found.operators == FEW[name]
    checked = zoo.check(found)
    assert checked.problem is None
    assert checked.difference <= max(zoo.TOLERANCES.values())
    assert checked.forward >= checked.backward > 0


def test_plain_configs_are_not_found():
    assert not list(zoo.find("fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py"))


def test_a_difference_is_seen(monkeypatch):
    (found,) = zoo.find("centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py")
    build, built = checking.build, []

    def build_and_spoil(settings):
        model = build(settings)
        built.append(model)
        if len(built) == 2:  # Ours. The activation hides no change of this size.
            model.neck.register_forward_hook(lambda _, __, outputs: [o + 1e-5 for o in outputs])
        return model

    monkeypatch.setattr(checking, "build", build_and_spoil)
    assert zoo.check(found).problem == "its outputs differ from mmcv's"


def test_operators_are_told_by_what_is_called():
    class Head(nn.Module):
        def sample(self, x):
            from mmcv.ops import deform_conv2d

            return deform_conv2d(x, x, x)

    class Derived(Head):
        use_deform = False

    model = nn.Sequential(nn.Conv2d(2, 2, 3), Head(), plugin.LAYERS["DCN"](2, 2, 3), Derived())
    assert zoo.operators(model) == {"Head": 1, "DeformConv2dPack": 1}


def test_the_table_lists_failures_and_counts_the_rest():
    settings = ConfigDict(type="A")
    results = [
        (zoo.Found("a/one.py", settings, {"TOODHead": 1}), zoo.Checked(3, 2, 1.6e-12)),
        (zoo.Found("a/two.py", settings, {"DeformRoIPoolPack": 4}), zoo.Checked(3, 2, None, False)),
        (zoo.Found("b/three.py", settings, {"DCN": 2}), zoo.Checked(problem="KeyError: 'x'")),
    ]
    reason = "ImportError: no transformers"
    text = zoo.table(results, {"c/four.py": reason, "c/x/five.py": reason})
    assert "**2 of 3** configs" in text
    assert "(1 distinct models)" in text
    assert "| a/one.py | TOODHead ×1 | 3 | 2 | 2e-12 |" in text
    assert "| a/two.py * | DeformRoIPoolPack ×4 | 3 | 2 | – |" in text
    assert "| b/three.py | DCN ×2 | KeyError: 'x' |  | – |" in text
    assert "| ImportError: no transformers | 2: c (2) |" in text
    assert f"torch {torch.__version__}" in text


def published() -> dict[str, str | None]:
    """The configs in the table of the documentation, and what failed there."""
    rows = re.findall(
        r"^\| (\S+\.py)(?: \*)? \| [^|]* \| ([^|]*) \|", TABLE.read_text(), re.MULTILINE
    )
    return {name: None if cell.isdigit() else cell for name, cell in rows}


def test_the_published_table_is_complete():
    passed, of = map(int, re.search(r"\*\*(\d+) of (\d+)\*\* configs", TABLE.read_text()).groups())
    assert passed == of == len(published()) >= 90
    assert not any(published().values())


@pytest.mark.slow
def test_every_config_works_as_with_mmcv(tmp_path):
    results = zoo.sweep(zoo.find(), tmp_path / "zoo.json")
    assert {found.name: checked.problem for found, checked in results} == published()
