"""DCNv3 and DCNv4 as layers, against their papers' equations written out in plain PyTorch."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmdcn import layers
from mmdcn.ops import reference

BRANCHES = {"DCNv3": "offset", "DCNv4": "offset_mask"}  # what predicts the offsets
NAMES = tuple(BRANCHES)

SETTINGS = {
    "plain": dict(in_channels=8, out_channels=8, kernel_size=3, padding=1),
    "strided": dict(in_channels=8, out_channels=12, kernel_size=3, padding=1, stride=2),
    "dilated": dict(in_channels=8, out_channels=8, kernel_size=3, padding=2, dilation=2),
    "oblong": dict(
        in_channels=12,
        out_channels=4,
        kernel_size=(1, 5),
        stride=(2, 1),
        padding=(1, 4),
        dilation=(1, 2),
        deform_groups=3,
    ),
    "wide depth-wise": dict(
        in_channels=8, out_channels=8, kernel_size=3, padding=1, dw_kernel_size=5
    ),
    "no center": dict(
        in_channels=8, out_channels=8, kernel_size=3, padding=1, remove_center=True, bias=False
    ),
    "grouped": dict(
        in_channels=12, out_channels=6, kernel_size=3, padding=1, groups=3, deform_groups=2
    ),
    "scaled": dict(
        in_channels=8,
        out_channels=8,
        kernel_size=3,
        padding=1,
        stride=2,
        offset_scale=0.5,
        center_feature_scale=True,
    ),
}


def make(name: str, seed: int = 3, **settings) -> nn.Module:
    torch.manual_seed(seed)
    return getattr(layers, name)(**settings)


def randomize(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)


def middles(layer: nn.Module, x: torch.Tensor, out_size: torch.Size) -> torch.Tensor:
    """`x`, (N, H, W, C), where the middle of the kernel lies, or at the border next to it."""
    rows, columns = (
        (torch.arange(n) * s - p + d * (k - 1) // 2).clamp(0, size - 1)
        for n, s, p, d, k, size in zip(
            out_size, layer.stride, layer.padding, layer.dilation, layer.kernel_size, x.shape[1:3]
        )
    )
    return x[:, rows][:, :, columns]


def project(projection: nn.Linear, groups: int, x: torch.Tensor) -> torch.Tensor:
    """The projection of `x`, (N, H, W, C), as torch's 1×1 convolution in so many groups."""
    weight = projection.weight[..., None, None]
    projected = F.conv2d(x.permute(0, 3, 1, 2), weight, projection.bias, groups=groups)
    return projected.permute(0, 2, 3, 1)


def expected(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The layer's equations, with the reference for the aggregation."""
    group, taps = layer.deform_groups, layer.taps
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, group)
    geometry += (layer.offset_scale, layer.remove_center)
    last = x.permute(0, 2, 3, 1)
    out_size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(
            x.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride
        )
    ]
    if isinstance(layer, layers.DCNv3):
        value = project(layer.input_proj, layer.groups, last)
        features = layer.dw_conv[0](x).permute(0, 2, 3, 1)
        norm = layer.dw_conv[1][1]
        mean, variance = features.mean(-1, True), features.var(-1, correction=0, keepdim=True)
        seen = F.gelu((features - mean) / (variance + 1e-6).sqrt() * norm.weight + norm.bias)
        offset = layer.offset(seen)
        logits = layer.mask(seen).unflatten(-1, (group, taps))
        modulation = logits.exp() / logits.exp().sum(-1, keepdim=True)
        output = reference.dcnv3(value, offset, modulation.flatten(-2), *geometry)
    else:
        value = project(layer.value_proj, layer.groups, last)
        if hasattr(layer, "offset_mask_dw"):
            seen = layer.offset_mask_dw(x).permute(0, 2, 3, 1)
        else:
            seen = middles(layer, last, out_size)
        output = seen = reference.dcnv4(value, layer.offset_mask(seen), *geometry)
    if layer.center_feature_scale:
        weight, bias = layer.center_feature_scale_proj_weight, layer.center_feature_scale_proj_bias
        scale = torch.sigmoid(seen @ weight.T + bias).unsqueeze(-1)
        scale = scale.expand(-1, -1, -1, -1, layer.in_channels // group).flatten(-2)
        output = output * (1 - scale) + middles(layer, value, out_size) * scale
    return project(layer.output_proj, layer.groups, output).permute(0, 3, 1, 2)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_computes_the_papers_equations(name, settings):
    layer = make(name, **settings).double()
    randomize(layer)
    x = torch.randn(2, settings["in_channels"], 9, 11, dtype=torch.float64, requires_grad=True)
    variables = [x, *layer.parameters()]
    outputs = [layer(x), expected(layer, x)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(outputs[0])
    ours, theirs = (torch.autograd.grad(output, variables, direction) for output in outputs)
    for mine, correct in zip(ours, theirs):
        torch.testing.assert_close(mine, correct, rtol=1e-9, atol=1e-9)
    out_size = F.conv2d(
        x[:, :1],
        x.new_zeros(1, 1, *layer.kernel_size),
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
    ).shape[2:]
    assert outputs[0].shape == (2, settings["out_channels"], *out_size)


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_layer_averages_the_taps_of_the_regular_grid(name):
    layer = make(name, **SETTINGS["strided"])
    x = torch.randn(2, 8, 9, 11)
    to_value = layer.input_proj if name == "DCNv3" else layer.value_proj
    value = to_value(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    average = F.avg_pool2d(value, 3, 2, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), layer.output_proj(average).permute(0, 3, 1, 2))
    layer(x).sum().backward()
    branch = layer.get_submodule(BRANCHES[name])
    assert branch.weight.grad.any()


def test_state_dicts_have_the_names_of_the_authors():
    """Those of InternImage's and DCNv4's modules, so that their checkpoints load."""
    v3 = {
        "dw_conv.0.weight": (8, 1, 3, 3),
        "dw_conv.0.bias": (8,),
        "dw_conv.1.1.weight": (8,),
        "dw_conv.1.1.bias": (8,),
        "offset.weight": (72, 8),
        "offset.bias": (72,),
        "mask.weight": (36, 8),
        "mask.bias": (36,),
        "input_proj.weight": (8, 8),
        "input_proj.bias": (8,),
        "output_proj.weight": (8, 8),
        "output_proj.bias": (8,),
    }
    v4 = {
        "offset_mask_dw.weight": (8, 1, 3, 3),
        "offset_mask_dw.bias": (8,),
        "offset_mask.weight": (112, 8),
        "offset_mask.bias": (112,),
        "value_proj.weight": (8, 8),
        "value_proj.bias": (8,),
        "output_proj.weight": (8, 8),
        "output_proj.bias": (8,),
    }
    scale = {"center_feature_scale_proj_weight": (4, 8), "center_feature_scale_proj_bias": (4,)}
    arguments = dict(SETTINGS["plain"], dw_kernel_size=3, center_feature_scale=True)
    for name, keys in (("DCNv3", v3), ("DCNv4", v4)):
        state = make(name, **arguments).state_dict()
        assert {key: tuple(value.shape) for key, value in state.items()} == keys | scale


def test_without_pointwise():
    layer = make("DCNv4", **SETTINGS["plain"], without_pointwise=True)
    assert sorted(layer.state_dict()) == ["offset_mask.bias", "offset_mask.weight"]
    x = torch.randn(2, 8, 6, 7)
    torch.testing.assert_close(layer(x), F.avg_pool2d(x, 3, 1, 1))
    with pytest.raises(ValueError, match=r"out_channels: expected in_channels=8 .* got 12"):
        make("DCNv4", **SETTINGS["strided"], without_pointwise=True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_layout_is_kept(name, channels_last):
    layer = make(name, **SETTINGS["strided"])
    x = torch.randn(2, 8, 9, 11)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    output = layer(x)
    assert output.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert output.is_contiguous() != channels_last
    torch.testing.assert_close(output, layer(x.contiguous()))


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    layer = make(name, **SETTINGS["scaled"])
    randomize(layer)
    x = torch.randn(2, 8, 9, 11, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x), rtol=0.1, atol=0.3)
    output.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_autocast_leaves_the_branch_in_float32(name):
    """Offsets of some 20 pixels, against float64: in bfloat16 they would be 0.06 off."""
    layer = make(name, **SETTINGS["plain"], dw_kernel_size=3)
    randomize(layer)
    branch = layer.get_submodule(BRANCHES[name])
    branch.weight.data *= 20
    exact = copy.deepcopy(layer).double()
    x = torch.randn(2, 8, 9, 11).bfloat16().float()
    predicted = {}
    for each, key in ((branch, "autocast"), (exact.get_submodule(BRANCHES[name]), "exact")):
        each.register_forward_hook(lambda _, __, output, key=key: predicted.update({key: output}))
    with torch.no_grad():
        exact(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
    assert predicted["autocast"].dtype == torch.float32
    assert predicted["exact"].abs().max() > 15
    assert (predicted["autocast"].double() - predicted["exact"]).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, dtype):
    layer = make(name, **SETTINGS["plain"])
    x = torch.randn(2, 8, 9, 11)
    exact = layer(x)
    output = layer.to(dtype)(x.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_empty_batch(name):
    x = torch.randn(0, 8, 9, 11, requires_grad=True)
    output = make(name, **SETTINGS["strided"])(x)
    output.sum().backward()
    assert output.shape == (0, 12, 5, 6)
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_init_weights_makes_it_fresh(name):
    layer = make(name, **SETTINGS["plain"])
    x = torch.randn(2, 8, 6, 7)
    regular = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    for linear in regular:
        nn.init.normal_(linear.weight)
        nn.init.normal_(linear.bias)
    layer.init_weights()
    to_value = layer.input_proj if name == "DCNv3" else layer.value_proj
    value = to_value(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    average = F.avg_pool2d(value, 3, 1, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), layer.output_proj(average).permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", NAMES)
def test_groups_start_as_layers_of_their_own_would(name):
    """Glorot's uniform initialisation, up to √(6 / (inputs + outputs)) of a group."""
    layer = make(name, in_channels=64, out_channels=32, kernel_size=1, groups=4)
    project = layer.input_proj if name == "DCNv3" else layer.value_proj
    for projection, width in ((project, 16 + 16), (layer.output_proj, 16 + 8)):
        bound = (6 / width) ** 0.5
        assert 0.95 * bound < projection.weight.abs().max() <= bound


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", NAMES)
def test_copies_compute_the_same(name, duplicate):
    layer = make(name, **SETTINGS["oblong"])
    randomize(layer)
    x = torch.randn(2, 12, 9, 11)
    assert torch.equal(duplicate(layer)(x), layer(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(in_channels=0), "in_channels: .* at least 1, got 0"),
        (dict(out_channels=2.0), "out_channels: .* got 2.0"),
        (dict(kernel_size=0), "kernel_size: .* at least 1, got 0"),
        (dict(stride=(1, 0)), "stride: .* at least 1"),
        (dict(padding="same"), "padding: .* got 'same'"),
        (dict(dilation=0), "dilation: .* at least 1"),
        (dict(groups=0), "groups: .* at least 1, got 0"),
        (dict(groups=3), "in_channels: expected a multiple of groups=3, got 8"),
        (dict(groups=4, out_channels=6), "out_channels: expected a multiple of groups=4, got 6"),
        (dict(deform_groups=3), "in_channels: expected a multiple of deform_groups=3, got 8"),
        (dict(deform_groups=0), "deform_groups: .* at least 1"),
        (dict(kernel_size=2, remove_center=True), "kernel_size: expected odd .* got 2"),
        (dict(kernel_size=1, remove_center=True), "kernel_size: .* more than one tap"),
        (dict(dw_kernel_size=4), "dw_kernel_size: .* even number .* got 4"),
        (dict(padding=0, dw_kernel_size=1), "dw_kernel_size: .* padding=.*got 1"),
    ],
)
def test_bad_arguments(name, arguments, message):
    good = dict(in_channels=8, out_channels=8, kernel_size=3)
    with pytest.raises(ValueError, match=message):
        getattr(layers, name)(**(good | arguments))


def test_representation_names_what_matters():
    text = repr(make("DCNv4", **SETTINGS["oblong"]))
    assert text.startswith("DCNv4(\n  12, 4, kernel_size=(1, 5)")
    assert "deform_groups=3, offset_scale=1.0" in text
