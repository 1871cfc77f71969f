"""What works where neither mmengine nor mmcv is installed, in a process that finds neither."""

from tests.programs import run_python

CODE = """
import importlib.util, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mmengine", "mmcv", "mmdet"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nothing())
find = importlib.util.find_spec
hidden = ("mmengine", "mmcv", "mmdet")
importlib.util.find_spec = lambda name, *a: None if name in hidden else find(name, *a)

import torch
import mmdcn
from mmdcn.models import build_deformable, convert_to_deformable, fuse_conv_bn
from torch import nn

model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)).eval()
x = torch.randn(1, 3, 16, 16)
expected = model(x)
convert_to_deformable(model, dict(type="DCNv2"), "0")
convert_to_deformable(model, dict(type="mmdcn.DCN"), "2")
print("SAME", torch.allclose(model(x), expected, atol=1e-5))
print("FUSED", torch.allclose(fuse_conv_bn(model)(x), expected, atol=1e-5), model[1])
print("MODELS", mmdcn.models.convert_to_deformable is convert_to_deformable)
print("HAS", hasattr(mmdcn, "plugin"))

def problem(statement):
    try:
        exec(statement, globals())
    except Exception as error:
        print(type(error).__name__, "|", error)

problem("mmdcn.plugin")
problem("mmdcn.nothing")
problem("from mmdcn import plugin")
problem("import mmdcn.plugin")
problem("build_deformable('ResNet', dict(dcn=dict(type='DCN'), select='*'))")
problem("convert_to_deformable(nn.Sequential(nn.Conv2d(3, 8, 3)), dict(type='DCNv3'), '0')")
"""


def test_models_convert_with_torch_alone():
    lines = run_python("-c", CODE).splitlines()
    assert lines[:4] == ["SAME True", "FUSED True Identity()", "MODELS True", "HAS False"]
    absence, nothing, from_import, plain_import, building, name = lines[4:]
    sentence = "mmdcn.plugin is for the OpenMMLab toolbox, and mmengine and mmcv are not both"
    assert absence.startswith(f"AttributeError | {sentence}")
    assert nothing == "AttributeError | module 'mmdcn' has no attribute 'nothing'"
    assert from_import.startswith(f"ImportError | {sentence}")
    assert plain_import == from_import
    assert building.startswith("ImportError | mmengine and mmcv, which build models by name")
    assert "convert_to_deformable" in building
    assert name.startswith("ValueError | dcn: expected type='DCN' or 'DCNv2'")
