"""What deformable operators sample, seen at the operator: where it lies, and whose call it is."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdcn import layers, ops
from mmdcn.engine.sampled_calls import named_calls
from mmdcn.ops import reference
from mmdcn.ops._observers import OBSERVERS, SampledCall, observing
from tests.layers.examples import build, inputs

SAMPLING = [name for name in layers.__all__ if "RoI" not in name]
SIDES = (7, 8, 5)


def seen(function, *arguments, **options) -> tuple[torch.Tensor, SampledCall]:
    calls = []
    with observing(lambda describe: calls.append(describe())):
        output = function(*arguments, **options)
    (call,) = calls
    assert torch.equal(output, function(*arguments, **options))
    return output, call


def sampled(input: torch.Tensor, call: SampledCall) -> torch.Tensor:
    """X at the locations, modulated: (N, G, C / G, K, *out)."""
    batch, groups, taps, rank, *out = call.locations.shape
    points = call.locations.movedim(3, 0).reshape(rank, batch * groups, -1)
    by_group = input.reshape(batch * groups, -1, *input.shape[2:])
    values = reference.sample(by_group, *points).view(batch, groups, -1, taps, *out)
    return values if call.modulation is None else values * call.modulation.unsqueeze(2)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("modulated", [False, True])
def test_a_convolution_samples_at_the_locations(rank, modulated):
    size = SIDES[:rank]
    kernel, stride, padding, dilation = (3, 2, 1)[:rank], (2, 1, 1)[:rank], (2, 1, 0)[:rank], 2
    out = [
        (n + 2 * p - 2 * (k - 1) - 1) // s + 1 for n, p, k, s in zip(size, padding, kernel, stride)
    ]
    taps = torch.Size(kernel).numel()
    x = torch.randn(2, 4, *size).double()
    offset = 2 * torch.randn(2, 2 * rank * taps, *out).double()
    weight = torch.randn(3, 4, *kernel).double()
    mask = torch.rand(2, 2 * taps, *out).double() if modulated else None
    function = getattr(ops, f"deform_conv{rank}d")
    output, call = seen(function, x, offset, weight, None, stride, padding, dilation, mask)
    assert call.size == size
    assert not call.weighs
    columns = sampled(x, call).flatten(1, 2).flatten(3)
    expected = torch.einsum("nckp,ock->nop", columns, weight.flatten(2)).view_as(output)
    torch.testing.assert_close(output, expected)
    moved = (call.locations - call.regular).flatten(1, 3)
    torch.testing.assert_close(moved, offset)


@pytest.mark.parametrize("remove_center", [False, True])
@pytest.mark.parametrize("version", [3, 4])
def test_an_aggregation_samples_at_the_locations(version, remove_center):
    taps = 15 - remove_center
    x, out = torch.randn(2, 7, 9, 8).double(), (4, 9)
    geometry = ((3, 5), (2, 1), (1, 4), (1, 2), 2, 0.5, remove_center)
    if version == 3:
        offset, mask = (torch.randn(2, *out, 2 * n * taps).double() for n in (2, 1))
        output, call = seen(ops.dcnv3, x, offset, mask, *geometry)
    else:
        offset_mask = torch.randn(2, *out, (6 * taps + 7) // 8 * 8).double()
        output, call = seen(ops.dcnv4, x, offset_mask, *geometry)
    assert call.weighs
    assert call.locations.shape == (2, 2, taps, 2, *out)
    expected = sampled(x.permute(0, 3, 1, 2), call).sum(3).flatten(1, 2).permute(0, 2, 3, 1)
    torch.testing.assert_close(output, expected)


def names(model: nn.Module, run) -> list[str]:
    called = []
    with named_calls(model, lambda name, module, describe: called.append(name)):
        run()
    assert not OBSERVERS
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return called


@pytest.mark.parametrize("name", SAMPLING)
def test_every_layer_is_seen_by_its_name(name):
    model = nn.ModuleDict({"layer": build(name)})
    (layer,) = model.values()
    assert names(model, lambda: layer(*inputs(name))) == ["layer"]


@pytest.mark.parametrize("size", [1, 2])
def test_calls_are_counted_anew_in_every_pass(size):
    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = layers.DeformConv2dPack(3, 3, 3, padding=1)

        def forward(self, x):
            return [self.conv(x[..., ::step, ::step]) for step in range(1, size + 1)]

    model, x = Levels(), torch.randn(1, 3, 8, 8)
    expected = ["conv", "conv#2"][:size]
    assert names(model, lambda: (model(x), model(x))) == 2 * expected


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_repetition_by_checkpointing_is_not_another_call(use_reentrant):
    model = nn.Sequential(layers.DeformConv2dPack(3, 3, 3, padding=1))
    x = torch.randn(1, 3, 8, 8, requires_grad=True)

    def run():
        checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()

    assert names(model, run) == ["0"]


def test_a_failed_pass_leaves_nothing_behind():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), layers.DeformConv2dPack(3, 3, 3))

    def run():
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 3, 8, 8).half())
        model[1](torch.randn(1, 3, 8, 8))

    assert names(model, run) == ["1"]


def test_bad_arguments_get_their_own_error_while_observed():
    layer = layers.DeformConv2d(4, 4, 3)
    with (
        named_calls(layer, lambda *_: None),
        pytest.raises(ValueError, match=r"^offset: "),
    ):
        layer(torch.randn(1, 4, 8, 8), torch.randn(1, 16, 6, 6))


def test_compiled_graphs_are_not_seen_and_go_on_to_work():
    torch._dynamo.reset()
    model, x = layers.DeformConv2dPack(3, 3, 3, padding=1), torch.randn(1, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    calls = []
    with torch.no_grad():
        compiled(x)
        with observing(calls.append):
            torch.testing.assert_close(compiled(x), model(x))
    assert len(calls) == 1  # of the model that is not compiled


def heads() -> dict:
    pytest.importorskip("mmdet")
    from mmdcn import plugin
    from tests import toolbox_script

    plugin.install()
    return toolbox_script.heads()


def test_heads_that_compute_their_own_offsets_are_seen():
    """All that the plugin's tests know: two levels, with as many calls as there."""
    levels = (torch.randn(1, 32, 16, 16), torch.randn(1, 32, 8, 8))
    built = heads()
    assert {"VFNetHead", "RepPointsHead", "TOODHead", "DyHead", "GARetinaHead"} <= set(built)
    for kind, (head, number) in built.items():
        with torch.no_grad():
            called = names(head, lambda head=head: head(levels))
        assert len(called) == len(set(called)) == number, kind
        numbers = [int(n.partition("#")[2] or 1) for n in called]
        assert max(numbers) > 1 or kind == "DyHead", kind
        modules = dict(head.named_modules())
        assert all(n.partition("#")[0] in modules for n in called)


def test_every_number_of_offset_groups():
    for groups, modulated in itertools.product((1, 2, 4), (False, True)):
        x, weight = torch.randn(1, 4, 6, 6), torch.randn(2, 4, 3, 3)
        mask = torch.rand(1, groups * 9, 4, 4) if modulated else None
        offset = torch.randn(1, groups * 18, 4, 4)
        _, call = seen(ops.deform_conv2d, x, offset, weight, mask=mask)
        assert call.locations.shape == (1, groups, 9, 2, 4, 4)
        assert (call.modulation is None) != modulated
