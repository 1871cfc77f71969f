"""The contract of operators: derivatives of every order and kind are the reference's."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.ops.contract import (
    DTYPES,
    EVERY,
    HALVES,
    compare,
    gradients,
    of_differentiable,
    variables,
)
from tests.ops.problems import TOLERANCE


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
