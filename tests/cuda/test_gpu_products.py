"""The matrix products of convolutions on a GPU, by each of torch's calls."""

import pytest
import torch

from mmdcn.benchmark.gpu.accuracy import exact_sums, outside_one_rounding
from mmdcn.ops import _products, deform_conv2d
from tests.cuda.gpu import MARKS, PROBLEMS
from tests.ops.problems import Problem, compare

pytestmark = MARKS

CANDIDATES = [
    (product, arithmetic, call)
    for product, arithmetics in _products.CALLS.items()
    for arithmetic, calls in arithmetics.items()
    for call in calls
]


@pytest.fixture
def matrices_in_tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("product, arithmetic, call", CANDIDATES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_call_of_a_product_matches_reference(
    product_by, request, problem, product, arithmetic, call
):
    """One that is not chosen may be refused by torch; none may be wrong."""
    in_force = torch.ops.mmdcn.cuda_product(0, product, arithmetic) == call
    last = call == _products.CALLS[product][arithmetic][-1]
    product_by(product, arithmetic, call)
    tolerance = None
    if arithmetic == "tf32":
        request.getfixturevalue("tf32")
        tolerance = 1e-3
    if arithmetic == "float32_beside_tf32":
        request.getfixturevalue("matrices_in_tf32")
        tolerance = 1e-3 if last else None
    dtype = getattr(torch, arithmetic, torch.float32)
    try:
        compare(problem, dtype, device="cuda", tolerance=tolerance)
    except RuntimeError as error:
        if in_force or last:
            raise
        pytest.skip(f"torch does not compute it: {str(error).splitlines()[0]}")


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_float32_is_exact_whatever_torch_allows_products_of_matrices(problem, setting):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        compare(problem, torch.float32, device="cuda")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels, size", [(512, (25, 42)), (128, (100, 168))])
def test_half_types_add_up_in_float32(dtype, channels, size):
    """Sums of the same columns in float64, rounded once, are next to all within one rounding."""
    problem = Problem(1, channels, size, channels, has_bias=False, float32_offset=True)
    leaves = {n: t for n, t in problem.tensors(dtype, "cuda").items() if t is not None}
    output = deform_conv2d(**leaves, padding=1)
    grad_output = torch.randn(output.shape, device="cuda").to(dtype)
    output.backward(grad_output)
    for product, actual in (("output", output.detach()), ("grad_weight", leaves["weight"].grad)):
        share = outside_one_rounding(actual, exact_sums(leaves, grad_output, product))
        assert share <= 1e-3, f"{product}: {share:.2%}"
