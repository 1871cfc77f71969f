"""The contract of layers: every promise is kept by every public layer of mmdcn.layers."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.layers.examples import NAMES, build, inputs, rank_of
from tests.pytorch.models import assert_same, loss
from tests.switched_off import Graphs, counting, switch_off

EVERY = pytest.mark.parametrize("name", NAMES)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def gradients(model: nn.Module, values: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Output, and gradients of the features and of all parameters, by name."""
    x, *rest = values
    x = x.detach().requires_grad_()
    output = model(x, *rest)
    named = {n.removeprefix("_orig_mod."): p for n, p in model.named_parameters()} | {"x": x}
    computed = torch.autograd.grad(loss(output), list(named.values()))
    return {"output": output.detach(), **dict(zip(named, computed))}


@EVERY
def test_every_parameter_takes_part(name):
    results = gradients(build(name), inputs(name))
    assert all(value.any() for value in results.values()), name


@EVERY
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(name, duplicate):
    model = build(name)
    copied = duplicate(model)
    assert_same(gradients(copied, inputs(name)), gradients(model, inputs(name)), rtol=0)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert all(p.any() for p in model.parameters())


@EVERY
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(name, use_reentrant):
    model = build(name)
    model_of = lambda *v: checkpoint(model, *v, use_reentrant=use_reentrant)  # noqa: E731
    x, *rest = inputs(name)
    x.requires_grad_()
    expected = gradients(model, inputs(name))
    loss(model_of(x, *rest)).backward()
    assert torch.equal(x.grad, expected["x"])
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[key]), key


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2

    def right_inverse(self, weight):
        return weight * 2


@EVERY
def test_parametrized(name):
    model, values = build(name), inputs(name)
    expected = model(*values)
    for module in [*model.modules()]:
        if isinstance(getattr(module, "weight", None), Tensor):
            parametrize.register_parametrization(module, "weight", Halved())
    assert torch.equal(model(*values), expected)


@EVERY
def test_same_bits_in_every_run(name):
    model, values = build(name), inputs(name, more=12)
    assert_same(gradients(model, values), gradients(model, values), rtol=0)


DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm)


@EVERY
def test_same_bits_for_any_number_of_threads(name, monkeypatch):
    """Of what is ours: torch's dense layers and sigmoid, whose bits change at the ends of threads'
    shares, repeat what they gave.

    Then all that reaches these, and the layer's output, must be the same.
    """
    model, values = build(name), inputs(name, more=12)
    given, reached = {}, []

    def repeat(module, arguments, output):
        reached.append(arguments[0])
        return given.setdefault(module, output)

    for module in model.modules():
        if isinstance(module, DENSE):
            module.register_forward_hook(repeat)
    sampled = []
    monkeypatch.setattr(Tensor, "sigmoid", lambda x: given.setdefault("sigmoid", torch.sigmoid(x)))
    for threads in (2, 1, 5):
        torch.set_num_threads(threads)
        reached.clear()
        with torch.no_grad():
            output = model(*values)
        sampled.append([*reached, output])
    for other in sampled[1:]:
        assert all(map(torch.equal, other, sampled[0]))


@EVERY
@HALVES
def test_autocast(name, dtype):
    """Trains in half precision: the output's dtype is autocast's, but for RoI pooling."""
    model, values = build(name), inputs(name)
    expected = gradients(model, values)
    with torch.autocast("cpu", dtype):
        actual = gradients(model, values)
    assert actual["output"].dtype == (torch.float32 if "RoIPool" in name else dtype)
    for key, value in expected.items():
        if key != "output":
            assert actual[key].dtype == torch.float32, key
        error = (actual[key].float() - value).norm() / value.norm()
        assert error < 0.1, (key, float(error))


@EVERY
def test_compiles_to_one_graph_for_all_sizes(name):
    torch._dynamo.reset()
    model = build(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for more in (0, 3):
        values = inputs(name, more)
        assert_same(gradients(compiled, values), gradients(model, values))


@EVERY
def test_exports(name):
    model, values = build(name).eval(), inputs(name)
    dynamic = torch.export.Dim.DYNAMIC
    sides = {0: dynamic} | {2 + d: dynamic for d in range(rank_of(name))}
    shapes = [sides] * len(values)
    if "RoIPool" in name:
        shapes[1:] = [{}] * (len(values) - 1)
    program = torch.export.export(model, values, dynamic_shapes=(*shapes,))
    other = inputs(name, more=2, batch=2 if "RoIPool" in name else 3)
    torch.testing.assert_close(program.module()(*other), model(*other))


@EVERY
def test_derivatives_of_every_kind(name):
    """Forward mode, torch.func and second derivatives of the features, in float64."""
    model = build(name).double()
    x, *rest = (v.double() for v in inputs(name))
    direction = torch.randn_like(x)

    def compute(x):
        return model(x, *rest)

    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(compute(forward_ad.make_dual(x, direction))).tangent
    _, expected = torch.autograd.functional.jvp(compute, x, direction, strict=False)
    torch.testing.assert_close(tangent.detach(), expected)
    torch.testing.assert_close(torch.func.jvp(compute, (x,), (direction,))[1].detach(), expected)
    variable = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(compute(variable)), variable)
    torch.testing.assert_close(torch.func.grad(lambda v: loss(compute(v)))(x), first.detach())


@EVERY
def test_counted(name):
    """torch's counter sees the sampling of every layer, and twice as much in a backward pass."""
    model, (x, *rest) = build(name), inputs(name)
    with FlopCounterMode(display=False) as counter:
        loss(model(x.requires_grad_(), *rest)).backward()
    counts = counter.get_flop_counts()["Global"]
    ours = [str(op) for op in counts if "mmdcn" in str(op) and counts[op] > 0]
    assert any(op.endswith("_backward") for op in ours)
    assert any(not op.endswith("_backward") for op in ours)


def calls_of(name: str) -> int:
    """How many times the layer calls its operator."""
    return 2 if "RoIPoolPack" in name else 1


def has_kernels_in_mmcv(name: str) -> bool:
    """On the CPU: of a convolution of images, or of sequences as images of height one."""
    return "Conv1d" in name or "Conv2d" in name


@EVERY
@pytest.mark.parametrize("substitutes", [(), ("deform_conv2d",)], ids=["reference", "mmcv"])
def test_devices_that_our_kernels_do_not_serve(name, substitutes, monkeypatch):
    """mmcv's kernels compute, or else the reference: the same numbers, and also when compiled.

    Compiling takes seconds, so each layer is compiled once.
    """
    if substitutes:
        pytest.importorskip("mmcv.ops")
    model, values = build(name), inputs(name)
    expected = gradients(model, values)
    switch_off(monkeypatch, *substitutes)
    server = "mmcv" if substitutes and has_kernels_in_mmcv(name) else "reference"
    with counting(monkeypatch) as counts:
        assert_same(gradients(model, values), expected)
    assert {**counts} == {"ours": 0, server: calls_of(name)}

    if bool(substitutes) != has_kernels_in_mmcv(name):
        return
    torch._dynamo.reset()
    graphs = Graphs()
    with counting(monkeypatch, ours=False) as counts:
        assert_same(gradients(torch.compile(model, backend=graphs), values), expected)
    assert counts == {server: calls_of(name)}
    assert not graphs.ours
