"""The contract of operators: every promise is kept by every public function of mmdcn.ops.

Here is what PyTorch asks of an operator; derivatives are in test_contract_derivatives.py, edges and
errors in test_contract_inputs.py.
"""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from mmdcn import ops
from tests.ops.calls import CALLS, COORDINATES, Call
from tests.ops.contract import EVERY, HALVES, compiled_calls, gradients, variables
from tests.ops.problems import TOLERANCE


def test_every_function_has_a_call():
    assert {call.name for call in CALLS.values()} == set(ops.__all__)


# --------------------------------------------------------------------------- the compiled operators


@EVERY
def test_opcheck(call):
    for overload, arguments, options in compiled_calls(call):
        opcheck(overload, arguments, options)
        if overload._opname.endswith("_backward"):
            continue  # its derivative is the reference's, which takes long to trace
        for argument, declared in zip(arguments, overload._schema.arguments):
            if isinstance(argument, Tensor) and declared.name != "rois":
                argument.requires_grad_()
        opcheck(overload, arguments, options)


@EVERY
def test_compiled_operators_refuse_tangents(call):
    """Called directly in forward mode, they raise: a tangent is never lost."""
    for overload, arguments, options in compiled_calls(call):
        assert isinstance(overload(*arguments, **options), (Tensor, tuple))
        for place, argument in enumerate(arguments):
            if not isinstance(argument, Tensor):
                continue
            with forward_ad.dual_level():
                dual = [*arguments]
                dual[place] = forward_ad.make_dual(argument, torch.ones_like(argument))
                with pytest.raises(RuntimeError, match=r"forward-mode.*mmdcn\.ops"):
                    overload(*dual, **options)

        def of_first(first, overload=overload, rest=arguments[1:], options=options):
            return overload(first, *rest, **options)

        with pytest.raises(RuntimeError, match=r"forward-mode.*mmdcn\.ops"):
            torch.func.jvp(of_first, (arguments[0],), (arguments[0],))


# ------------------------------------------------------------------------------ PyTorch's machinery


@EVERY
@HALVES
def test_autocast(call, dtype):
    """Features in its dtype or as they came, coordinates in float32, gradients in their own."""
    keeps_dtype = call.name == "deform_roi_pool"

    def by_hand(given):
        cast = {
            n: t.float() if keeps_dtype or n in COORDINATES else t.to(dtype)
            for n, t in given.items()
        }
        return call.function(**cast, **call.arguments)

    tensors = variables(call, dtype=torch.float32)
    expected = call.function(**tensors, **call.arguments)
    narrow = {
        n: t.detach().to(dtype if n in COORDINATES else t.dtype).requires_grad_(t.requires_grad)
        for n, t in tensors.items()
    }
    with torch.autocast("cpu", dtype):
        output = call.function(**tensors, **call.arguments)
        from_narrow = call.function(**narrow, **call.arguments)
    assert output.dtype == from_narrow.dtype == (torch.float32 if keeps_dtype else dtype)
    assert torch.equal(output, by_hand(tensors))
    assert torch.equal(from_narrow, by_hand(narrow))
    largest = expected.abs().max()
    assert (output.float() - expected).abs().max() <= 2 * TOLERANCE[dtype] * largest
    for given, result in ((tensors, output), (narrow, from_narrow)):
        result.float().square().sum().backward()
        for name in call.differentiable():
            assert given[name].grad.dtype == given[name].dtype, name
            assert given[name].grad.any(), name


@EVERY
def test_compiles_to_one_graph_for_all_sizes(call):
    torch._dynamo.reset()
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager", dynamic=True)
    for more in (0, 2, 3):
        expected = gradients(call.function, call, variables(call, more=more))
        actual = gradients(compiled, call, variables(call, more=more))
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, msg=name)


class Module(torch.nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, **tensors):
        return self.call.function(**tensors, **self.call.arguments)


@EVERY
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_exports(call, strict):
    tensors = call.tensors(torch.float32)
    program = torch.export.export(Module(call), (), tensors, strict=strict)
    other = {name: 0.9 * t if name == "input" else t for name, t in tensors.items()}
    expected = call.function(**other, **call.arguments)
    torch.testing.assert_close(program.module()(**other), expected)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_in_every_run_and_for_any_number_of_threads(call, dtype):
    expected = gradients(call.function, call, variables(call, dtype=dtype, more=20))
    for threads in (1, 2, 5, 2):
        torch.set_num_threads(threads)
        actual = gradients(call.function, call, variables(call, dtype=dtype, more=20))
        for name, value in expected.items():
            assert torch.equal(actual[name], value), (name, threads)


@EVERY
def test_torch_counts_multiply_adds(call):
    tensors = variables(call)
    with FlopCounterMode(display=False) as counter:
        output = call.function(**tensors, **call.arguments)
        forward = counter.get_total_flops()
        output.sum().backward()
    assert forward == 2 * call.multiply_adds > 0
    assert counter.get_total_flops() == 3 * forward
    for name, passes in (("input", 1), ("offset", 1), ("weight", 1)):
        if name not in tensors or name in call.constant:
            continue
        tensors = {n: t.requires_grad_(n == name) for n, t in call.tensors().items()}
        with FlopCounterMode(display=False) as counter:
            call.function(**tensors, **call.arguments).sum().backward()
        assert counter.get_total_flops() == (1 + passes) * forward, name


@EVERY
def test_mmengine_counts_multiply_adds(call):
    pytest.importorskip("mmdet")
    from mmengine.analysis import ActivationAnalyzer, FlopAnalyzer

    import mmdcn  # noqa: F401

    class ByPosition(Module):
        def forward(self, *values):
            return super().forward(**dict(zip(names, values)))

    tensors = call.tensors(torch.float32)
    names = list(tensors)
    inputs = tuple(tensors.values())
    assert FlopAnalyzer(ByPosition(call), inputs).total() == call.multiply_adds
    outputs = call.function(**tensors, **call.arguments).numel()
    assert ActivationAnalyzer(ByPosition(call), inputs).total() == outputs
