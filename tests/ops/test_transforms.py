"""Derivatives of every order and kind, torch.func, and counting, over the operator."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmdcn.ops import deform_conv2d, reference
from tests.ops.problems import NAMES, Problem

GEOMETRY = dict(stride=(2, 1), padding=(1, 0), dilation=(1, 2))
VERSIONS = pytest.mark.parametrize("has_mask", [False, True], ids=["v1", "v2"])


def problem(has_mask: bool, **settings) -> tuple[list[str], list[Tensor]]:
    """Names and float64 values, with sampling points away from the kinks at integers."""
    settings = dict(groups=2, deform_groups=2) | settings
    tensors = Problem(1, 4, (5, 6), 4, (3, 2), **GEOMETRY, has_mask=has_mask, **settings).tensors()
    with torch.no_grad():
        tensors["offset"].copy_(torch.rand_like(tensors["offset"]) * 0.8 + 0.1)
    names = [name for name in NAMES if tensors[name] is not None]
    return names, [tensors[name].detach() for name in names]


def call_with(function, names):
    return lambda *values: function(**dict(zip(names, values)), **GEOMETRY)


def compare(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def stacked(values: list[Tensor], count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.stack([v + 0.05 * torch.rand(v.shape, generator=generator) for _ in range(count)])
        for v in values
    ]


# ------------------------------------------------------------------------------------ derivatives


@VERSIONS
def test_forward_mode(has_mask):
    names, values = problem(has_mask)
    variables = [v.requires_grad_() for v in values]
    call = call_with(deform_conv2d, names)
    assert torch.autograd.gradcheck(
        call, variables, check_forward_ad=True, check_backward_ad=False, fast_mode=True
    )
    # Without requires_grad too, where a tangent could get lost.
    tangents = [torch.ones_like(v) for v in values]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(v.detach(), t) for v, t in zip(values, tangents)]
        tangent = forward_ad.unpack_dual(call(*duals)).tangent
    _, expected = torch.func.jvp(
        call_with(reference.deform_conv2d, names), tuple(values), tuple(tangents)
    )
    compare(tangent, expected)


@VERSIONS
def test_batched_gradients(has_mask):
    names, values = problem(has_mask)
    variables = [v.requires_grad_() for v in values]
    assert torch.autograd.gradcheck(
        call_with(deform_conv2d, names), variables, check_batched_grad=True, fast_mode=True
    )


@VERSIONS
def test_third_derivatives(has_mask):
    """The second derivative, contracted with fixed directions, has right derivatives itself."""
    names, values = problem(has_mask, groups=1, deform_groups=1)
    variables = [v.requires_grad_() for v in values]
    directions = [torch.randn_like(v) for v in values]

    def second(function):
        def compute(*variables):
            output = call_with(function, names)(*variables).sin().sum()
            first = torch.autograd.grad(output, variables, create_graph=True)
            along = sum((g * d).sum() for g, d in zip(first, directions))
            return torch.autograd.grad(along, variables, create_graph=True)

        return compute

    def third(function):
        results = second(function)(*variables)
        return torch.autograd.grad(sum(r.cos().sum() for r in results), variables)

    for actual, expected in zip(third(deform_conv2d), third(reference.deform_conv2d)):
        compare(actual, expected)


# ------------------------------------------------------------------------------------- torch.func


@VERSIONS
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, v: torch.func.grad(lambda *a: f(*a).sin().sum(), tuple(range(len(v))))(*v),
        lambda f, v: torch.func.vjp(f, *v)[1](torch.ones_like(f(*v))),
        lambda f, v: torch.func.jvp(f, tuple(v), tuple(torch.ones_like(t) for t in v)),
        lambda f, v: torch.func.jacrev(f, 1)(*v),
        lambda f, v: torch.func.jacfwd(f, 1)(*v),
        lambda f, v: torch.func.hessian(lambda *a: f(*a).sin().sum(), 1)(*v),
        lambda f, v: torch.vmap(f)(*stacked(v)),
        # Images of their own, weights in common; and one set of weights for each.
        lambda f, v: torch.vmap(f, (1, *[None] * (len(v) - 1)))(
            stacked(v)[0].movedim(0, 1), *v[1:]
        ),
        lambda f, v: torch.vmap(f, (None, None, 0, *[None] * (len(v) - 3)))(
            *v[:2], stacked(v)[2], *v[3:]
        ),
        # Gradients of each sample.
        lambda f, v: torch.vmap(torch.func.grad(lambda *a: f(*a).sin().sum(), 2))(*stacked(v)),
        lambda f, v: torch.func.grad(lambda *a: torch.vmap(f)(*a).sin().sum(), 1)(*stacked(v)),
        lambda f, v: torch.func.functionalize(f)(*v),
    ],
    ids=[
        *("grad", "vjp", "jvp", "jacrev", "jacfwd", "hessian", "vmap", "vmap_images"),
        *("vmap_weights", "vmap_of_grad", "grad_of_vmap", "functionalize"),
    ],
)
def test_torch_func(has_mask, transform):
    names, values = problem(has_mask)
    expected = transform(call_with(reference.deform_conv2d, names), values)
    actual = transform(call_with(deform_conv2d, names), values)
    compare(actual, expected)


def test_vmap_is_a_loop():
    names, values = problem(True)
    batch = stacked(values)
    call = call_with(deform_conv2d, names)
    expected = torch.stack([call(*(v[i] for v in batch)) for i in range(3)])
    compare(torch.vmap(call)(*batch), expected)


@VERSIONS
def test_grad_is_the_kernels_gradient(has_mask):
    names, values = problem(has_mask)
    call = call_with(deform_conv2d, names)
    variables = [v.clone().requires_grad_() for v in values]
    expected = torch.autograd.grad(call(*variables).sin().sum(), variables)
    everything = tuple(range(len(values)))
    compare(torch.func.grad(lambda *v: call(*v).sin().sum(), everything)(*values), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_transformed_half_precision_is_rounded_once(dtype):
    tensors = Problem(spread=0.5).tensors(dtype)
    values = [tensors[name].detach() for name in NAMES]

    def call(*values):
        return deform_conv2d(**dict(zip(NAMES, values)), padding=1)

    actual = torch.vmap(call)(*(v.unsqueeze(0) for v in values)).squeeze(0)
    assert actual.dtype == dtype
    # The kernel may round to the other side of a tie.
    torch.testing.assert_close(actual, call(*values), rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_errors_reach_through_transforms():
    names, values = problem(True)
    values[1] = values[1][:, :-1]
    with pytest.raises(ValueError, match=r"offset: offset.shape\[1\] is not valid"):
        torch.func.grad(lambda *v: call_with(deform_conv2d, names)(*v).sum())(*values)


# --------------------------------------------------------------------------------------- counting


def test_flops_are_those_of_a_dense_convolution():
    x, weight = torch.randn(2, 8, 9, 7), torch.randn(6, 4, 3, 3)
    counts = []
    for function in (
        lambda: F.conv2d(x, weight, stride=2, padding=1, groups=2),
        lambda: deform_conv2d(x, torch.zeros(2, 18, 5, 4), weight, stride=2, padding=1),
    ):
        with FlopCounterMode(display=False) as counter:
            function()
        counts.append(counter.get_total_flops())
    by_hand = 2 * (2 * 6 * 5 * 4) * (4 * 3 * 3)
    assert counts == [by_hand, by_hand]


@pytest.mark.parametrize(
    ("wanted", "passes"),
    [(("input", "offset", "weight", "bias", "mask"), 2), (("weight",), 1), (("offset",), 1)],
)
def test_flops_of_the_backward_pass(wanted, passes):
    tensors = Problem().tensors()
    for name in NAMES:
        tensors[name].requires_grad_(name in wanted)
    with FlopCounterMode(display=False) as counter:
        deform_conv2d(**tensors, padding=1).sum().backward()
    forward = 2 * (2 * 6 * 7 * 8) * (4 * 3 * 3)
    operator = torch.ops.mmdcn.deform_conv2d_backward
    assert counter.get_flop_counts()["Global"][operator] == passes * forward
