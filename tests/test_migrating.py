"""Each row of the table in docs/migrating.md: what was called there, and what is to be called here.

The other packages are not needed: their calls are written out as the equations that they compute,
with their arguments in their order.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmdcn import functions, layers, ops
from mmdcn.ops import reference

PAGE = (Path(__file__).parents[1] / "docs/migrating.md").read_text()
ROWS = [
    line.split(" | ")[0].removeprefix("| ") for line in PAGE.splitlines() if line.startswith("| `")
]
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
GEOMETRY = dict(stride=2, padding=1, dilation=(1, 2))


def problem(deform_groups: int = 2) -> dict[str, Tensor]:
    """Tensors of a convolution of eight channels, whose output is 5 × 5."""
    return dict(
        x=torch.randn(2, 8, 9, 11),
        offset=torch.randn(2, deform_groups * 18, 5, 5),
        weight=torch.randn(6, 8, 3, 3),
        bias=torch.randn(6),
        mask=torch.rand(2, deform_groups * 9, 5, 5),
    )


def equation(x, offset, weight, bias, mask, stride=2, padding=1, dilation=(1, 2)) -> Tensor:
    wide = [None if t is None else t.double() for t in (x, offset, weight, bias)]
    mask = None if mask is None else mask.double()
    return reference.deform_conv_nd(*wide, stride, padding, dilation, mask).float()


def same(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def load(layer: nn.Module, **state: Tensor) -> nn.Module:
    layer.load_state_dict(state)
    return layer


def torchvision_function():
    p = problem()
    args = (p["x"], p["offset"], p["weight"], p["bias"], 2, 1, (1, 2), p["mask"])
    same(ops.deform_conv2d(*args), equation(**p))


def torchvision_layer():
    p = problem()
    layer = layers.ModulatedDeformConv2d(8, 6, 3, 2, 1, (1, 2), 1, deform_groups=2)
    load(layer, weight=p["weight"], bias=p["bias"])
    same(layer(p["x"], p["offset"], p["mask"]), equation(**p))
    layer = layers.DeformConv2d(8, 6, 3, 2, 1, (1, 2), 1, deform_groups=2, bias=True)
    load(layer, weight=p["weight"], bias=p["bias"])
    same(layer(p["x"], p["offset"]), equation(**{**p, "mask": None}))


def dcnv2_function():
    torchvision_function()  # The order on the right of the row is torchvision's.


def dcnv2_layer():
    p = problem()
    layer = layers.ModulatedDeformConv2d(8, 6, 3, 2, 1, (1, 2), deformable_groups=2)
    load(layer, weight=p["weight"], bias=p["bias"])
    same(layer(p["x"], p["offset"], p["mask"]), equation(**p))


def branch(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets and modulation as the DCNv2 packages compute them."""
    out = nn.functional.conv2d(x, weight, bias, 2, 1, (1, 2))
    o1, o2, mask = torch.chunk(out, 3, dim=1)
    return torch.cat((o1, o2), dim=1), torch.sigmoid(mask)


def dcnv2_pack():
    p = problem()
    weight, bias = torch.randn(54, 8, 3, 3) / 9, torch.randn(54)
    offset, mask = branch(p["x"], weight, bias)
    expected = equation(p["x"], offset, p["weight"], p["bias"], mask)
    layer = layers.ModulatedDeformConv2dPack(8, 6, 3, 2, 1, (1, 2), deformable_groups=2)
    state = {"conv_offset_mask.weight": weight, "conv_offset_mask.bias": bias}
    load(layer, weight=p["weight"], bias=p["bias"], **state)
    same(layer(p["x"]), expected)


def second_input():
    names: dict = {}
    exec(CODE[0], names)
    p, feat = problem(), torch.randn(2, 8, 9, 11)
    weight, bias = torch.randn(54, 8, 3, 3) / 9, torch.randn(54)
    offset, mask = branch(feat, weight, bias)
    for key in ("conv_offset", "conv_offset_mask"):
        layer = names["DCNv2Pack"](8, 6, 3, 2, 1, (1, 2), deform_groups=2)
        state = {f"{key}.weight": weight, f"{key}.bias": bias}
        load(layer, weight=p["weight"], bias=p["bias"], **state)
        same(layer(p["x"], feat), equation(p["x"], offset, p["weight"], p["bias"], mask))


def three_convolutions():
    names: dict = {}
    exec(CODE[1], names)
    p = problem(1)
    there = nn.ModuleDict(
        dict(
            offset_conv=nn.Conv2d(8, 18, 3, **GEOMETRY),
            modulator_conv=nn.Conv2d(8, 9, 3, **GEOMETRY),
            regular_conv=nn.Conv2d(8, 6, 3, **GEOMETRY),
        )
    )
    x, conv = p["x"], there["regular_conv"]
    mask = 2 * torch.sigmoid(there["modulator_conv"](x))
    expected = equation(x, there["offset_conv"](x), conv.weight, conv.bias, mask)
    layer = layers.ModulatedDeformConv2dPack(8, 6, 3, **GEOMETRY, modulation_scale=2)
    layer.load_state_dict(names["converted"](there.state_dict()))
    same(layer(x), expected)


def mmcv_function():
    p = {**problem(), "bias": None, "mask": None}
    expected = equation(**p)
    same(
        functions.deform_conv2d(p["x"], p["offset"], p["weight"], 2, 1, (1, 2), 1, 2),
        expected,
    )
    same(ops.deform_conv2d(p["x"], p["offset"], p["weight"], None, 2, 1, (1, 2), None), expected)


def mmcv_modulated_function():
    p = problem()
    args = (p["x"], p["offset"], p["mask"], p["weight"], p["bias"], 2, 1, (1, 2), 1, 2)
    same(functions.modulated_deform_conv2d(*args), equation(**p))
    torchvision_function()


def mmcv_layers():
    mmcv_ops = pytest.importorskip("mmcv.ops")
    names = [n for n in dir(mmcv_ops) if re.fullmatch(r"(Modulated)?DeformConv2d(Pack)?", n)]
    assert len(names) == 4
    for name in names:
        theirs = getattr(mmcv_ops, name)(8, 6, 3, padding=1, deform_groups=2, bias=False)
        ours = getattr(layers, name)(8, 6, 3, padding=1, deform_groups=2, bias=False)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())


def there_v3(x, offset, mask, kh, kw, sh, sw, ph, pw, dh, dw, group, group_channels, scale, center):
    assert x.shape[-1] == group * group_channels
    geometry = ((kh, kw), (sh, sw), (ph, pw), (dh, dw), group, scale, center)
    return reference.dcnv3(x.double(), offset.double(), mask.double(), *geometry).float()


NUMBERS = (3, 5, 2, 1, 1, 4, 1, 2)  # kernel, stride, pad and dilation, vertical before horizontal
PAIRS = ((3, 5), (2, 1), (1, 4), (1, 2))


def dcnv3_function():
    x, offset, mask = (torch.randn(2, h, 9, c) for h, c in ((7, 8), (4, 60), (4, 30)))
    expected = there_v3(x, offset, mask, *NUMBERS, 2, 4, 0.5, False)
    same(ops.dcnv3(x, offset, mask, *PAIRS, 2, 0.5, False), expected)


def dcnv3_layer():
    """With the module's own steps, on its own keys."""
    norm = nn.Sequential(nn.Identity(), nn.LayerNorm(8, eps=1e-6))
    there = nn.ModuleDict(
        dict(
            dw_conv=nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), norm, nn.GELU()),
            offset=nn.Linear(8, 36),
            mask=nn.Linear(8, 18),
            input_proj=nn.Linear(8, 8),
            output_proj=nn.Linear(8, 8),
        )
    )
    x = torch.randn(2, 7, 9, 8)
    value = there["input_proj"](x)
    seen = there["dw_conv"][0](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    seen = nn.functional.gelu(norm[1](seen))
    mask = there["mask"](seen).reshape(2, 7, 9, 2, -1).softmax(-1).flatten(3)
    sampled = there_v3(value, there["offset"](seen), mask, 3, 3, 1, 1, 1, 1, 1, 1, 2, 4, 1.0, False)
    layer = layers.DCNv3(8, 8, kernel_size=3, stride=1, padding=1, dilation=1, deform_groups=2)
    layer.load_state_dict(there.state_dict())
    same(layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), there["output_proj"](sampled))


def there_v4(
    x, offset_mask, kh, kw, sh, sw, ph, pw, dh, dw, group, group_channels, scale, step, rc
):
    assert x.shape[-1] == group * group_channels
    assert step > 0
    geometry = ((kh, kw), (sh, sw), (ph, pw), (dh, dw), group, scale, rc)
    return reference.dcnv4(x.double(), offset_mask.double(), *geometry).float()


def dcnv4_function():
    x, offset_mask = torch.randn(2, 7, 9, 8), torch.randn(2, 4, 9, 96)
    expected = there_v4(x, offset_mask, *NUMBERS, 2, 4, 0.5, 256, False)
    same(ops.dcnv4(x, offset_mask, *PAIRS, 2, 0.5, False), expected)


def dcnv4_layer():
    channels = math.ceil(2 * 9 * 3 / 8) * 8
    there = nn.ModuleDict(
        dict(
            value_proj=nn.Linear(8, 8),
            offset_mask=nn.Linear(8, channels),
            output_proj=nn.Linear(8, 8, bias=False),
        )
    )
    x = torch.randn(2, 7 * 9, 8)
    value, offset_mask = (
        there[name](x).unflatten(1, (7, 9)) for name in ("value_proj", "offset_mask")
    )
    sampled = there_v4(value, offset_mask, 3, 3, 1, 1, 1, 1, 1, 1, 2, 4, 1.0, 256, False)
    layer = layers.DCNv4(8, 8, kernel_size=3, stride=1, padding=1, deform_groups=2, bias=False)
    layer.load_state_dict(there.state_dict())
    here = layer(x.unflatten(1, (7, 9)).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
    same(here, there["output_proj"](sampled).flatten(1, 2))


CHECKS = {
    "`torchvision.ops.deform_conv2d`": torchvision_function,
    "`torchvision.ops.DeformConv2d`": torchvision_layer,
    "`dcn_v2_conv` of the DCNv2 packages": dcnv2_function,
    "`DCNv2` of the DCNv2 packages": dcnv2_layer,
    "`DCN` of the DCNv2 packages, CenterNet, CenterTrack": dcnv2_pack,
    "`DCNv2Pack` of EDVR and BasicSR": second_input,
    "`offset_conv`, `modulator_conv`, `regular_conv` of tutorials on torchvision": (
        three_convolutions
    ),
    "`mmcv.ops.deform_conv2d`": mmcv_function,
    "`mmcv.ops.modulated_deform_conv2d`": mmcv_modulated_function,
    "`mmcv.ops.ModulatedDeformConv2dPack` and its like": mmcv_layers,
    "`dcnv3_core_pytorch`, `DCNv3Function.apply` of InternImage": dcnv3_function,
    "`DCNv3` of InternImage": dcnv3_layer,
    "`DCNv4Function.apply`": dcnv4_function,
    "`DCNv4` of its authors": dcnv4_layer,
}


def test_every_row_has_a_check():
    assert list(CHECKS) == ROWS


@pytest.mark.parametrize("row", CHECKS)
def test_row(row):
    with torch.no_grad():
        CHECKS[row]()
