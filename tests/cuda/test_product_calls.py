"""The matrix products of deformable convolution's CUDA source, run on the host.

What they need of cuDNN and cuBLAS stands in for them: the same calls, by what the CPU has.
"""

import contextlib
import itertools
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdcn.ops import _products
from tests.cuda.host_deform_conv import EXACT, MEMORY, host_deform_conv
from tests.cuda.stand_ins import stand_ins
from tests.ops.problems import Problem, compare, problems


@pytest.fixture(autouse=True)
def operators(host_operators, set_memory):
    set_memory(3000, 3000)
    with _products.imposed(EXACT):
        yield host_operators


@contextlib.contextmanager
def calls_in_force(product: str, arithmetic: str, call: str, refused: bool = False, **options):
    """The call that computes a product, on the host; what stands in for it notes its calls."""
    choose = torch.ops.mmdcn_host.set_cuda_product
    with stand_ins(refused=call if refused else "") as made:
        choose(-1, product, arithmetic, call, **options)
        assert torch.ops.mmdcn_host.cuda_product(-1, product, arithmetic) == call
        try:
            yield made
        finally:
            choose(-1, product, arithmetic, "matmul")


CANDIDATES = [
    *itertools.product(
        ["output", "grad_columns"],
        ["float32_beside_tf32", "tf32", "float16", "bfloat16"],
        ["cudnn"],
    ),
    *itertools.product(["grad_weight"], ["float32_beside_tf32", "tf32"], ["convolution"]),
    *itertools.product(["grad_weight"], ["float16", "bfloat16"], ["matmul_to_float"]),
]


@pytest.mark.parametrize("product, arithmetic, call", CANDIDATES, ids="-".join)
@settings(max_examples=5)
@given(problem=problems(ranks=(2, 3)), memory=st.sampled_from(MEMORY))
def test_every_call_matches_reference(set_memory, product, arithmetic, call, problem, memory):
    set_memory(*memory)
    tf32, beside = arithmetic == "tf32", arithmetic == "float32_beside_tf32"
    dtype = torch.float32 if tf32 or beside else getattr(torch, arithmetic)
    options = {"allow_tf32": tf32, "matmul_tf32": beside}
    with calls_in_force(product, arithmetic, call) as made:
        compare(problem, dtype, host_deform_conv, **options)
    if call != "convolution":
        assert made
    for name, *flags in made:
        assert name == call
        assert flags == ([tf32, False] if call == "cudnn" else [])


CAN_BE_REFUSED = [key for key in CANDIDATES if key[2] != "convolution"]
OPTIONS = {"tf32": {"allow_tf32": True}, "float32_beside_tf32": {"matmul_tf32": True}}


@pytest.mark.parametrize("product, arithmetic, call", CAN_BE_REFUSED, ids="-".join)
def test_matmul_takes_the_place_of_what_torch_refuses(caplog, product, arithmetic, call):
    """Of some tensors, though not of those that it was chosen with; once, and with one warning."""
    problem, dtype = Problem(2, 8, (5, 4), 4), getattr(torch, arithmetic, torch.float32)
    options = OPTIONS.get(arithmetic, {})
    with (
        calls_in_force(product, arithmetic, call, refused=True, may_be_replaced=True) as made,
        caplog.at_level(logging.WARNING, "mmdcn"),
    ):
        compare(problem, dtype, host_deform_conv, **options)
        assert made
        assert torch.ops.mmdcn_host.cuda_product(-1, product, arithmetic) == "matmul"
        made.clear()
        compare(problem, dtype, host_deform_conv, **options)
        assert not made
    (record,) = caplog.records
    for part in (product, arithmetic, "by matmul from now on", f"torch refused {call}: "):
        assert part in record.getMessage()


def test_what_may_not_be_replaced_is_an_error():
    """While calls are tried, for instance."""
    with calls_in_force("output", "float16", "cudnn", refused=True):
        with pytest.raises(RuntimeError, match="cudnn_convolution failed"):
            compare(Problem(), torch.float16, host_deform_conv)
        assert torch.ops.mmdcn_host.cuda_product(-1, "output", "float16") == "cudnn"


@pytest.mark.parametrize("out_channels, pixels", [(6, 10), (1024, 5)])
def test_chunks_may_be_imposed(operators, set_memory, out_channels, pixels):
    """On a GPU, to see what their size is worth; and so that a small call has many of them."""
    set_memory(10**8, 9000)
    problem = Problem(1, 16, (7, 6), out_channels)
    with calls_in_force("output", "float16", "cudnn") as made:
        try:
            for imposed, expected in ((0, 1), (3000, -(-42 // pixels)), (0, 1)):
                operators.set_cuda_chunk(imposed)
                made.clear()
                compare(problem, torch.float16, host_deform_conv)
                assert len(made) == expected
        finally:
            operators.set_cuda_chunk(0)
    with pytest.raises(RuntimeError, match="bytes: expected 0 or more, got -1"):
        operators.set_cuda_chunk(-1)


def calls_under(made, dtype: torch.dtype = torch.float32, **settings) -> list:
    """The calls of what stands in for cuDNN, under these of torch's settings."""
    made.clear()
    with _products.imposed(EXACT._replace(**settings)):
        compare(Problem(), dtype, host_deform_conv)
    return made


def test_float32_is_exact_where_torch_multiplies_matrices_in_tf32():
    with calls_in_force("output", "float32_beside_tf32", "cudnn") as made:
        assert ("cudnn", False, False) in calls_under(made, matmul_tf32=True)
        assert not calls_under(made)
        assert not calls_under(made, tf32=True, matmul_tf32=True)
        assert not calls_under(made, torch.float64, matmul_tf32=True)


def test_what_was_not_chosen_is_not_called():
    """Not even where matrices are multiplied in TF32, and convolutions are to be exact."""
    with stand_ins() as made:
        assert not calls_under(made, matmul_tf32=True)
        assert not calls_under(made, tf32=True)


@pytest.mark.parametrize("product", ["output", "grad_columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_settings_count_when_the_operator_runs(product, dtype):
    arithmetic = "tf32" if dtype == torch.float32 else "float16"
    with calls_in_force(product, arithmetic, "cudnn") as made:
        assert set(calls_under(made, dtype, tf32=True)) == {("cudnn", True, False)}
        made_so = calls_under(made, dtype, tf32=True, deterministic=True)
        assert set(made_so) == {("cudnn", True, True)}
        assert not calls_under(made, dtype, tf32=True, cudnn=False)


def test_convolutions_are_told_to_be_deterministic():
    with calls_in_force("grad_columns", "float16", "cudnn") as made:
        compare(Problem(), torch.float16, host_deform_conv, deterministic=True)
    assert made == [("cudnn", False, True)] * len(made) != []


def test_torchs_settings_are_asked():
    """Those of Python, through the dispatcher."""
    with _products.imposed(None), calls_in_force("output", "float16", "cudnn") as made:
        try:
            for deterministic in (False, True):
                torch.backends.cudnn.deterministic = deterministic
                made.clear()
                compare(Problem(), torch.float16, host_deform_conv)
                assert {call[2] for call in made} == {deterministic}
        finally:
            torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, "outputs", "float32", "matmul"), "product: unknown: outputs"),
        ((0, "output", "int8", "matmul"), "arithmetic: unknown: int8"),
        ((0, "output", "float32", "gemm"), "call: unknown: gemm"),
        ((64, "output", "float32", "matmul"), "no device has number 64"),
    ],
)
def test_an_unknown_choice_is_refused(operators, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        operators.set_cuda_product(*arguments)
