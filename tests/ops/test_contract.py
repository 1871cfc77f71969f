"""The contract of operators: every promise is kept by every public function of mmdcn.ops."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmdcn import ops
from tests.ops.calls import CALLS, COORDINATES, Call
from tests.ops.problems import TOLERANCE

EVERY = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def test_every_function_has_a_call():
    assert {call.name for call in CALLS.values()} == set(ops.__all__)


def compare(actual, expected, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def variables(call: Call, **settings) -> dict[str, Tensor]:
    """The tensors; those that can be differentiated for are leaves that require gradients."""
    tensors = call.tensors(**settings)
    return {n: t.requires_grad_(n not in call.constant) for n, t in tensors.items()}


def of_differentiable(call: Call, function):
    """The function of its differentiable tensors by position, and their values."""
    tensors = call.tensors()
    fixed = {n: t for n, t in tensors.items() if n in call.constant}
    names = call.differentiable()

    def compute(*values):
        return function(**dict(zip(names, values)), **fixed, **call.arguments)

    return compute, tuple(tensors[name] for name in names)


def gradients(function, call: Call, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    output = function(**tensors, **call.arguments)
    names = [n for n, t in tensors.items() if t.requires_grad]
    grad_output = torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
    computed = torch.autograd.grad(output, [tensors[n] for n in names], grad_output)
    return {"output": output.detach(), **dict(zip(names, computed))}


# --------------------------------------------------------------------------- the compiled operators


class Recorder(TorchDispatchMode):
    """Collects the calls of our compiled operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mmdcn":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def compiled_calls(call: Call) -> list[tuple]:
    """What a forward and a backward pass call, with tensors that can be differentiated for."""
    with Recorder() as recorder:
        gradients(call.function, call, variables(call))
    return [
        (
            overload,
            [a.detach().clone() if isinstance(a, Tensor) else a for a in arguments],
            options,
        )
        for overload, arguments, options in recorder.calls
    ]


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


# -------------------------------------------------------------------------------------- derivatives


@EVERY
@DTYPES
def test_matches_reference(call, dtype):
    actual = gradients(call.function, call, variables(call, dtype=dtype))
    exact = {n: t.detach().double() for n, t in variables(call, dtype=dtype).items()}
    exact = {n: t.requires_grad_(n not in call.constant) for n, t in exact.items()}
    expected = gradients(call.reference, call, exact)
    for name, value in expected.items():
        assert actual[name].dtype == dtype, name
        error = (actual[name].double() - value).abs().max() / value.abs().max()
        assert error <= TOLERANCE[dtype], (name, float(error))


@EVERY
def test_gradcheck(call):
    compute, values = of_differentiable(call, call.function)
    values = [v.requires_grad_() for v in values]
    assert torch.autograd.gradcheck(
        compute, values, fast_mode=True, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(compute, values, fast_mode=True)


@EVERY
@pytest.mark.parametrize("how", ["graph", "leaves"])
def test_third_derivatives(call, how):
    """The second derivative along fixed directions has right derivatives, whatever is a leaf."""

    def third(function):
        compute, values = of_differentiable(call, function)
        values = [v.requires_grad_() for v in values]
        torch.manual_seed(3)
        directions = [torch.randn_like(v) for v in values]
        inputs = values if how == "leaves" else [2 * v - v.detach() for v in values]
        first = torch.autograd.grad(compute(*inputs).sin().sum(), values, create_graph=True)
        along = sum((g * d).sum() for g, d in zip(first, directions))
        second = torch.autograd.grad(along, values, create_graph=True)
        return torch.autograd.grad(sum(s.cos().sum() for s in second), values)

    for actual, expected in zip(third(call.function), third(call.reference)):
        compare(actual, expected)


@EVERY
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode(call, requires_grad):
    """No tangent gets lost, whether reverse mode is wanted too or not."""
    tangents = []
    for function in (call.function, call.reference):
        compute, values = of_differentiable(call, function)
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(v.clone().requires_grad_(requires_grad), torch.ones_like(v))
                for v in values
            ]
            tangents.append(forward_ad.unpack_dual(compute(*duals)).tangent.detach())
    assert tangents[1].any()
    compare(*tangents)


def stacked(values: tuple[Tensor, ...]) -> list[Tensor]:
    torch.manual_seed(5)
    return [torch.stack([v + 0.05 * torch.rand_like(v) for _ in range(3)]) for v in values]


def summed(compute):
    return lambda *values: compute(*values).sin().sum()


def last(values) -> tuple[int | None, ...]:
    return (*[None] * (len(values) - 1), 0)


TRANSFORMS = {
    "grad": lambda f, v: torch.func.grad(summed(f), tuple(range(len(v))))(*v),
    "vjp": lambda f, v: torch.func.vjp(f, *v)[1](torch.ones_like(f(*v))),
    "jvp": lambda f, v: torch.func.jvp(f, v, tuple(map(torch.ones_like, v))),
    "jacrev": lambda f, v: torch.func.jacrev(f, 1)(*v),
    "jacfwd": lambda f, v: torch.func.jacfwd(f, 1)(*v),
    "hessian": lambda f, v: torch.func.hessian(summed(f), len(v) - 1)(*v),
    "vmap": lambda f, v: torch.vmap(f)(*stacked(v)),
    "vmap_of_one": lambda f, v: torch.vmap(f, last(v))(*v[:-1], stacked(v)[-1]),
    "vmap_elsewhere": lambda f, v: torch.vmap(f, (1, *[None] * (len(v) - 1)))(
        stacked(v)[0].movedim(0, 1), *v[1:]
    ),
    "vmap_of_grad": lambda f, v: torch.vmap(torch.func.grad(summed(f), 1))(*stacked(v)),
    "grad_of_vmap": lambda f, v: torch.func.grad(summed(torch.vmap(f)), 1)(*stacked(v)),
    "functionalize": lambda f, v: torch.func.functionalize(f)(*v),
}


@EVERY
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_torch_func(call, transform):
    actual, expected = (
        transform(*of_differentiable(call, f)) for f in (call.function, call.reference)
    )
    compare(actual, expected)


@EVERY
def test_vmap_is_a_loop(call):
    compute, values = of_differentiable(call, call.function)
    batch = stacked(values)
    compare(torch.vmap(compute)(*batch), torch.stack([compute(*each) for each in zip(*batch)]))


@EVERY
def test_vmap_over_constants_is_a_loop_or_refused_by_name(call):
    for name in call.constant:
        tensors = call.tensors()
        names = list(tensors)
        dims = tuple(0 if n == name else None for n in names)
        tensors[name] = torch.stack([tensors[name], tensors[name]])
        with pytest.raises(RuntimeError, match=rf"^{name}: expected .*vmap"):
            torch.vmap(call.on(call.function, names), dims)(*tensors.values())


@EVERY
@HALVES
def test_transformed_half_precision_is_rounded_once(call, dtype):
    tensors = call.tensors(dtype)
    names = list(tensors)
    dims = tuple(None if n in call.constant else 0 for n in names)
    values = [t if n in call.constant else t.unsqueeze(0) for n, t in tensors.items()]
    compute = call.on(call.function, names)
    actual = torch.vmap(compute, dims)(*values).squeeze(0)
    assert actual.dtype == dtype
    # The kernel may round to the other side of a tie.
    expected = compute(*tensors.values())
    torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps, atol=1e-3)


# ------------------------------------------------------------------------------ PyTorch's machinery


@EVERY
@HALVES
def test_autocast(call, dtype):
    """Features in its dtype or as they came, coordinates in float32, gradients in their own."""
    tensors = variables(call, dtype=torch.float32)
    expected = call.function(**tensors, **call.arguments)
    keeps_dtype = call.name == "deform_roi_pool"
    with torch.autocast("cpu", dtype):
        output = call.function(**tensors, **call.arguments)
        narrow = {n: t.to(dtype) if n in COORDINATES else t for n, t in tensors.items()}
        from_narrow = call.function(**narrow, **call.arguments)
    assert output.dtype == from_narrow.dtype == (torch.float32 if keeps_dtype else dtype)
    largest = expected.abs().max()
    assert (output.float() - expected).abs().max() <= 2 * TOLERANCE[dtype] * largest
    output.float().square().sum().backward()
    for name in call.differentiable():
        assert tensors[name].grad.dtype == torch.float32, name
        assert tensors[name].grad.any(), name


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


# ----------------------------------------------------------------------------------- edges of input


@EVERY
@DTYPES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 6e4, -6e4, 1e30])
def test_offsets_that_reach_nothing(call, dtype, value):
    """The sample is zero, and so is every gradient through it."""
    if dtype == torch.float16 and value == 1e30:
        value = 65504.0
    tensors = variables(call, dtype=dtype)
    name = "offset_mask" if "offset_mask" in tensors else "offset"
    with torch.no_grad():
        tensors[name].fill_(value)
    results = gradients(call.function, call, tensors)
    bias = tensors.get("bias")
    expected = torch.zeros_like(results.pop("output"))
    output = call.function(**tensors, **call.arguments)
    if bias is not None:
        expected = expected + bias.detach().view(-1, *[1] * (output.dim() - 2))
    assert torch.equal(output, expected)
    for name, gradient in results.items():
        if name != "bias":
            assert torch.count_nonzero(gradient) == 0, name


@EVERY
@DTYPES
def test_empty_batch(call, dtype):
    tensors = variables(call, dtype=dtype, batch=0)
    results = gradients(call.function, call, tensors)
    assert results["output"].shape[0] == 0
    for name in call.differentiable():
        assert results[name].shape == tensors[name].shape
        assert torch.count_nonzero(results[name]) == 0, name
    leaves = [tensors[name] for name in call.differentiable()]
    output = call.function(**tensors, **call.arguments)
    first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)
    assert all(g is None or torch.count_nonzero(g) == 0 for g in second)


@EVERY
def test_no_pixels(call):
    """An input of height or length zero is refused by name, or sampled as zero everywhere."""
    tensors = call.tensors(torch.float32)
    side = 1 if call.name in ("dcnv3", "dcnv4") else 2
    tensors["input"] = tensors["input"].narrow(side, 0, 0)
    try:
        output = call.function(**tensors, **call.arguments)
    except ValueError as error:
        assert ": expected" in str(error)
    else:
        assert not output.any()


# ---------------------------------------------------------------------------------------- bad calls


def assert_named(error: Exception, call: Call) -> None:
    """The message begins with an argument, and says what was expected and what came."""
    message = str(error)
    if "rois: expected in column 0" in message:
        return  # numbers in a tensor, which the compiled operator looks at
    argument = message.split(":")[0].split(".")[0]
    assert isinstance(error, (TypeError, ValueError)), repr(error)
    assert argument in (*call.tensors(), *call.function.__annotations__), message
    assert "got" in message and ("expected" in message or "must" in message), message


def refused_or_right(call: Call, tensors: dict, arguments: dict) -> bool:
    """Whether the call is refused; if it is not, it must compute what the reference computes."""
    try:
        output = call.function(**tensors, **arguments)
    except Exception as error:
        assert_named(error, call)
        return True
    assert isinstance(output, Tensor)
    compare(output, call.reference(**tensors, **arguments))
    return False


@EVERY
def test_every_bad_shape_is_named(call):
    for name, tensor in call.tensors().items():
        refused = []
        for d in range(tensor.dim()):
            for size in {0, tensor.shape[d] - 1, tensor.shape[d] + 1, 7 * tensor.shape[d]}:
                index = torch.arange(size) % tensor.shape[d]
                changed = call.tensors() | {name: tensor.index_select(d, index)}
                refused.append(refused_or_right(call, changed, call.arguments))
        for changed in (tensor.unsqueeze(0), tensor.flatten(), tensor.sum()):
            if changed.dim() != tensor.dim():
                assert refused_or_right(call, call.tensors() | {name: changed}, call.arguments)
        assert any(refused), name


@EVERY
def test_every_bad_dtype_device_and_type_is_named(call):
    for name, tensor in call.tensors(torch.float32).items():
        for bad in (
            *(tensor.to(d) for d in (torch.int64, torch.bool, torch.complex64, torch.float64)),
            tensor.to("meta"),
            tensor.tolist(),
            "tensor",
            3,
        ):
            tensors = call.tensors(torch.float32) | {name: bad}
            with pytest.raises((TypeError, ValueError)) as caught:
                call.function(**tensors, **call.arguments)
            assert_named(caught.value, call)


BAD_NUMBERS = [0, -1, 1.5, "1", None, True, [], (1,) * 5, (1, -1), (1, "1"), 2**31, 2**62, 2**70]
BAD_NUMBERS += [-(2**70), float("nan"), float("inf"), 1j, torch.tensor([1, 2]), torch.zeros(2, 2)]


@EVERY
@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=str)
def test_every_bad_number_is_named(call, bad):
    tensors = call.tensors()
    for name in call.function.__annotations__:
        if name == "return" or name in tensors:
            continue
        arguments = call.arguments | {name: bad}
        try:
            output = call.function(**tensors, **arguments)
        except Exception as error:
            assert_named(error, call)
        else:
            assert isinstance(output, Tensor)


@EVERY
def test_errors_reach_through_transforms(call):
    tensors = call.tensors()
    names = list(tensors)
    offset = names[1] if "rois" not in names else "offset"
    tensors[offset] = tensors[offset][:, :-1]
    with pytest.raises((TypeError, ValueError), match=f"^{offset}"):
        torch.func.jvp(
            call.on(call.function, names), tuple(tensors.values()), tuple(tensors.values())
        )


# What allocates more than any machine has: tensors of one element, seen through zero strides.
HUGE = 2**14


def seen_large(*shape: int) -> Tensor:
    return torch.zeros(1).expand(shape)


TOO_LARGE = {
    "deform_conv2d": lambda: ops.deform_conv2d(
        seen_large(HUGE, 1, HUGE, HUGE), seen_large(HUGE, 2, HUGE, HUGE), seen_large(HUGE, 1, 1, 1)
    ),
    "deform_conv1d": lambda: ops.deform_conv1d(
        seen_large(HUGE, 1, HUGE**2), seen_large(HUGE, 1, HUGE**2), seen_large(HUGE, 1, 1)
    ),
    "deform_conv3d": lambda: ops.deform_conv3d(
        seen_large(HUGE, 1, HUGE, HUGE, 1),
        seen_large(HUGE, 3, HUGE, HUGE, 1),
        seen_large(HUGE, 1, 1, 1, 1),
    ),
    "dcnv3": lambda: ops.dcnv3(
        seen_large(HUGE, HUGE, HUGE, 64),
        seen_large(HUGE, HUGE, HUGE, 2),
        seen_large(HUGE, HUGE, HUGE, 1),
        1,
    ),
    "dcnv4": lambda: ops.dcnv4(
        seen_large(HUGE, HUGE, HUGE, 64), seen_large(HUGE, HUGE, HUGE, 3), 1
    ),
    "deform_roi_pool": lambda: ops.deform_roi_pool(
        torch.zeros(1, HUGE, 2, 2), seen_large(2**26, 5), None, 64
    ),
}


def test_every_function_is_asked_for_too_much():
    assert set(TOO_LARGE) == set(ops.__all__)


@pytest.mark.parametrize("function", TOO_LARGE)
def test_failed_allocation_keeps_its_cause(function):
    """What was being done or torch's own message, and no line of ours that made the call."""
    with pytest.raises(RuntimeError) as caught:
        TOO_LARGE[function]()
    message = str(caught.value)
    assert "memory" in message and "bytes" in message, message
    assert "API call failed" not in message and ".h" not in message, message
