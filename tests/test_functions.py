"""What stands in for mmcv's functions. Which kernel ran is told by counting calls."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmcv.ops")

import mmcv.ops
from mmengine.registry import MODELS

from mmdcn import ops, plugin
from tests.kernel_calls import KernelCalls
from tests.switched_off import switch_off


@pytest.fixture(autouse=True)
def installed():
    plugin.install()
    yield
    plugin.install()


def problem(dtype=torch.float64, size=6, offset_size=6):
    torch.manual_seed(1)
    x = torch.randn(2, 8, size, size, dtype=dtype)
    offset = torch.randn(2, 2 * 18, offset_size, offset_size, dtype=dtype)
    mask = torch.rand(2, 2 * 9, offset_size, offset_size, dtype=dtype)
    weight = torch.randn(6, 4, 3, 3, dtype=dtype)
    return [t.requires_grad_() for t in (x, offset, mask, weight)], torch.randn(6, dtype=dtype)


def both(function) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`function`, which returns tensors, with our kernels and with mmcv's."""
    with KernelCalls() as calls:
        ours = function()
    assert calls.forward
    assert not calls.mmcv
    plugin.uninstall()
    with KernelCalls() as calls:
        theirs = function()
    assert calls.mmcv
    assert not calls.forward
    return ours, theirs


def test_v1_function_as_mmcvs():
    (x, offset, _, weight), _ = problem()

    def run():
        output = mmcv.ops.deform_conv2d(x, offset, weight, (1, 1), 1, 1, 2, 2, False, 2)
        return [output, *torch.autograd.grad(output.square().sum(), (x, offset, weight))]

    for mine, expected in zip(*both(run)):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("size", "offset_size"), [(6, 6), (6, 9)])
def test_v2_function_as_mmcvs(size, offset_size):
    # Larger offsets than the output: what mmdet's DyHead passes.
    (x, offset, mask, weight), bias = problem(size=size, offset_size=offset_size)

    def run():
        output = mmcv.ops.modulated_deform_conv2d(x, offset, mask, weight, bias, 1, 1, 1, 2, 2)
        return [output, *torch.autograd.grad(output.square().sum(), (x, offset, mask, weight))]

    for mine, expected in zip(*both(run)):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(12, 16), (13, 9)])
def test_dyhead_as_with_mmcv(size):
    registry = pytest.importorskip("mmdet.registry").MODELS
    neck = registry.build(
        dict(
            type="mmdet.DyHead",
            in_channels=16,
            out_channels=16,
            num_blocks=2,
            zero_init_offset=False,
        )
    ).double()
    for block in neck.dyhead_blocks:
        nn.init.normal_(block.spatial_conv_offset.weight, std=0.2)
    height, width = size
    levels = [
        torch.randn(2, 16, -(-height // step), -(-width // step), dtype=torch.float64)
        for step in (1, 2, 4)
    ]
    for mine, expected in zip(*both(lambda: neck(levels))):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_functions_compute_in_the_offsets_dtype():
    (x, offset, mask, weight), bias = problem(torch.float32)
    output = mmcv.ops.deform_conv2d(x, offset.half(), weight, 1, 1, 1, 2, 2)
    assert output.dtype == torch.float16
    output = mmcv.ops.modulated_deform_conv2d(
        x.half(), offset, mask.half(), weight, bias, 1, 1, 1, 2, 2
    )
    assert output.dtype == torch.float32
    expected = ops.deform_conv2d(
        x.half().float(), offset, weight, bias, 1, 1, 1, mask.half().float()
    )
    torch.testing.assert_close(output, expected)


def test_functions_take_keywords():
    (x, offset, mask, weight), bias = problem()
    torch.testing.assert_close(
        mmcv.ops.deform_conv2d(
            x, offset, weight, padding=1, groups=2, deform_groups=2, im2col_step=1
        ),
        ops.deform_conv2d(x, offset, weight, padding=1),
    )
    torch.testing.assert_close(
        mmcv.ops.modulated_deform_conv2d(
            x, offset, mask, weight, bias, padding=1, groups=2, deform_groups=2
        ),
        ops.deform_conv2d(x, offset, weight, bias, padding=1, mask=mask),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(groups=1), "groups: expected .* 8 / 4, got 1"),
        (dict(deform_groups=1), "deform_groups: expected .* 36 / 18, got 1"),
        (dict(stride=0), "stride"),
        (dict(padding=2), "offset: expected shape"),
    ],
)
@pytest.mark.parametrize("function", ["deform_conv2d", "modulated_deform_conv2d"])
def test_functions_refuse(function, arguments, message):
    (x, offset, mask, weight), _ = problem()
    tensors = (x, offset, weight) if function == "deform_conv2d" else (x, offset, mask, weight)
    good = dict(padding=1, groups=2, deform_groups=2)
    with pytest.raises(ValueError, match=message):
        getattr(mmcv.ops, function)(*tensors, **(good | arguments))


def test_v1_function_refuses_a_bias_tensor():
    (x, offset, _, weight), bias = problem()
    with pytest.raises(ValueError, match="bias: expected False"):
        mmcv.ops.deform_conv2d(x, offset, weight, 1, 1, 1, 2, 2, bias)


# ---------------------------------------------------------- where our kernels do not run


@pytest.mark.parametrize("name", ["deform_conv2d", "modulated_deform_conv2d"])
def test_stand_ins_run_on_mmcvs_kernels_where_ours_do_not_run(name, monkeypatch):
    """As before the plugin took mmcv's functions away: forward, backward, and the same numbers."""
    (x, offset, mask, weight), _ = problem()
    tensors = (x, offset, weight) if name == "deform_conv2d" else (x, offset, mask, weight)

    def run():
        function = getattr(mmcv.ops, name)
        output = function(*tensors, padding=1, groups=2, deform_groups=2)
        return [output, *torch.autograd.grad(output.square().sum(), tensors)]

    expected = run()
    switch_off(monkeypatch, "deform_conv2d")
    with KernelCalls() as calls:
        actual = run()
    assert (calls.forward, calls.backward) == (0, 0)
    assert calls.mmcv == (3 if name == "deform_conv2d" else 2)
    for mine, theirs in zip(actual, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "mmcvs"])
@pytest.mark.parametrize("name", ["DCN", "DCNv2"])
def test_layers_run_on_mmcvs_kernels_where_ours_do_not_run(name, theirs, monkeypatch):
    """What configs build, and mmcv's own layers; without the plugin's functions too."""
    classes = {"DCN": mmcv.ops.DeformConv2dPack, "DCNv2": mmcv.ops.ModulatedDeformConv2dPack}
    build = classes[name] if theirs else MODELS.get(name)
    layer = build(4, 4, 3, padding=1)
    x = torch.randn(33, 4, 5, 5, requires_grad=True)  # no multiple of mmcv's im2col_step
    expected = layer(x)
    switch_off(monkeypatch, "deform_conv2d")
    for _ in range(1 if theirs else 2):
        with KernelCalls() as calls:
            actual = layer(x)
            actual.sum().backward()
        assert (calls.forward, calls.backward) == (0, 0)
        assert calls.mmcv > 1
        torch.testing.assert_close(actual, expected)
        plugin.uninstall()
