"""The machine code of the convolutions' kernels, without a GPU: wide accesses, short loops."""

import re
from dataclasses import asdict

import pytest

from . import counts, machine_code
from .built import CSRC
from .machine_code import Code, Kernel, kernels_of, needs_tools, only, reductions_in

SOURCE = CSRC / "cuda" / "deform_conv" / "kernels.cu"
MANGLED = {"float32": "f", "float16": "6__half", "bfloat16": "13__nv_bfloat16", "float64": "d"}
DTYPES = list(MANGLED)
SINGLE = DTYPES[:3]  # whose sums are in float32
WIDE = DTYPES[1:3]  # whose columns may be in float32, too

# Instructions of one round of the innermost loops for sm_80, on the way that one group takes: those
# for sm_90 are in counts.py.
GATHER_80 = {"float32": 71, "float16": 127, "bfloat16": 127}
SCATTER_80 = {"float32": 99, "float16": 106, "bfloat16": 106}
SLACK = 1.1


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Code:
    return machine_code.of_source(SOURCE, tmp_path_factory.mktemp("code"))


def counted_kernels(code: Code, architecture: str) -> list[Kernel]:
    kernels, release = kernels_of(code, architecture), code[architecture][1]
    if release != counts.COMPILER:
        pytest.skip(f"counted in code of nvcc {counts.COMPILER}, not {release}")
    return kernels


def gather_kernel(kernels: list[Kernel], dtype: str, rank: int = 2, wide: bool = False) -> Kernel:
    vector = {"float32": 4, "float64": 2}.get(dtype, 8)
    scalar = MANGLED[dtype]
    acc = "d" if dtype == "float64" else "f"
    # A type that has come before is abbreviated.
    column = acc if wide or dtype not in WIDE else r"S\d?_"
    return only(kernels, rf"gather_kernelILi{vector}ELi{rank}E{scalar}{acc}{column}E")


def scatter_kernel(kernels: list[Kernel], dtype: str, vector: int, rank: int = 2) -> Kernel:
    acc = "d" if dtype == "float64" else "f"
    scalar = MANGLED[dtype]
    return only(
        kernels, rf"scatter_kernelILi{vector}ENS\d?_11FloatingSumI{acc}EELi{rank}E{scalar}{acc}E"
    )


def vector_loop(kernel: Kernel, architecture: str) -> range:
    """The innermost loop of a scattering kernel, of those with additions the one with most loads.

    The compiler may make a loop of its own for calls that want no gradient of offset and mask.
    """
    loops = [kernel.loops_around(one)[0] for one in reductions_in(kernel)]
    return max(loops, key=lambda loop: len(kernel.named("LDG.*", loop)))


@needs_tools
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(
    "dtype,wide", [*((dtype, False) for dtype in DTYPES), *((dtype, True) for dtype in WIDE)]
)
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_gather_moves_16_bytes_at_once(code, architecture, dtype, wide, rank):
    kernel = gather_kernel(kernels_of(code, architecture), dtype, rank, wide)
    stores = kernel.named(r"ST[G]?\..*")
    loop = kernel.loops_around(stores[0])[0]
    # One of a sample's corners each, all of them before the first use.
    assert [one.name for one in kernel.named(r"LDG?\..*", loop)] == ["LDG.E.128.CONSTANT"] * 2**rank
    assert [one.name for one in stores] == ["STG.E.128"] * (2 if wide else 1)
    assert all(one.number in loop for one in stores)


@needs_tools
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("dtype", SINGLE)
def test_scatter_adds_vectors_on_sm_90(code, dtype, rank):
    kernel = scatter_kernel(kernels_of(code, "90"), dtype, vector=4, rank=rank)
    names = {one.name for one in reductions_in(kernel)}
    # RED, unlike ATOM, brings nothing back.
    assert len(names) == 1 and re.fullmatch(r"REDG\.E\.ADD\.F32x4(\..*)?", *names), names
    loop = vector_loop(kernel, "90")
    assert len([one for one in reductions_in(kernel) if one.number in loop]) == 2**rank
    width = "128" if dtype == "float32" else "64"
    loads = [one.name for one in kernel.named(r"LDG?\..*", loop)]
    assert loads == [f"LDG.E.{width}.CONSTANT"] * (2**rank + 1)


@needs_tools
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_adds_scalars_on_sm_80(code, dtype, rank):
    kernel = scatter_kernel(kernels_of(code, "80"), dtype, vector=1, rank=rank)
    names = {one.name for one in reductions_in(kernel)}
    bits = 64 if dtype == "float64" else 32
    assert len(names) == 1 and re.fullmatch(rf"RED\.E\.ADD\.F{bits}(\..*)?", *names), names


def gather_counts(kernel: Kernel) -> dict[str, int]:
    """What :class:`counts.Gather` says, of a kernel."""
    stores, loads = kernel.named(r"STG\..*"), kernel.named(r"LDG\.E\.128.*")
    locating = kernel.loops_around(kernel.named(r"LDG\..*")[0])[0]
    vectors, samples = kernel.loops_around(stores[0])[:2]
    vector = kernel.path(vectors, loads + stores)
    return {
        "block": outside(kernel, locating, samples),
        "locate": kernel.longest_path(locating),
        "sample": kernel.path(samples, loads + stores) - vector,
        "vector": vector,
    }


def scatter_counts(kernel: Kernel) -> dict[str, int]:
    """What :class:`counts.Scatter` says, of a kernel."""
    additions = reductions_in(kernel)
    locating = kernel.loops_around(kernel.named(r"LDG\..*")[0])[0]
    vectors, samples = kernel.loops_around(additions[0])[:2]
    loads = kernel.named(r"LDG\..*", vectors)
    vector = kernel.path(vectors, loads + additions)
    exchanges = kernel.named(r"SHFL\..*", samples)
    rounds = {kernel.loops_around(one)[0] for one in exchanges}
    shuffle = sum(kernel.path(loop, kernel.named(r"SHFL\..*", loop)) for loop in rounds)
    # The first of two loops, which also writes the gradient of a mask.
    finishing = kernel.loops_around(kernel.named(r"STG\..*")[0])[0]
    return {
        "block": outside(kernel, locating, samples, finishing),
        "locate": kernel.longest_path(locating),
        "sample": kernel.path(samples, loads + additions + exchanges) - vector - shuffle,
        "vector": vector,
        "shuffle": shuffle,
        "finish": kernel.longest_path(finishing),
    }


def outside(kernel: Kernel, *loops: range) -> int:
    """Instructions on the way through a kernel outside of these loops."""
    end = next(one.number for one in kernel.named("EXIT") if not one.predicate)
    whole = range(end + 1)
    passed = [0, *(place for loop in loops for place in (loop[0], loop[-1])), end]
    return sum(kernel.steps(a, b, whole) for a, b in zip(passed[::2], passed[1::2]))


@needs_tools
@pytest.mark.parametrize("dtype", SINGLE)
def test_gather_takes_few_instructions(code, dtype):
    now = gather_counts(gather_kernel(counted_kernels(code, "90"), dtype))
    expect_close(now, asdict(counts.GATHER[dtype]))


@needs_tools
@pytest.mark.parametrize("dtype", SINGLE)
def test_scatter_takes_few_instructions(code, dtype):
    now = scatter_counts(scatter_kernel(counted_kernels(code, "90"), dtype, vector=4))
    expect_close(now, asdict(counts.SCATTER[dtype]))


@needs_tools
@pytest.mark.parametrize("dtype", SINGLE)
def test_sums_take_few_instructions(code, dtype):
    kernels = counted_kernels(code, "90")
    vector = 4 if dtype == "float32" else 8
    kernel = only(kernels, rf"add_bias_kernelILi{vector}E{MANGLED[dtype]}fE")
    stated = {"bias": counts.ADD_BIAS[dtype], "accumulate": counts.ACCUMULATE}
    now = {
        "bias": once_a_round(kernel),
        "accumulate": once_a_round(only(kernels, "accumulate.*If")),
    }
    expect_close(now, stated)


def once_a_round(kernel: Kernel) -> float:
    """Instructions for each store, in the first loop that stores, which may be unrolled."""
    loop = next(loops[0] for loops in map(kernel.loops_around, kernel.named(r"STG\..*")) if loops)
    stores = kernel.named(r"STG\..*", loop)
    return kernel.path(loop, kernel.named(r"LDG\..*", loop) + stores) / len(stores)


@needs_tools
@pytest.mark.parametrize("dtype", SINGLE)
def test_loops_on_sm_80_take_few_instructions(code, dtype):
    kernels = counted_kernels(code, "80")
    gather, scatter = gather_kernel(kernels, dtype), scatter_kernel(kernels, dtype, vector=1)
    loop = vector_loop(scatter, "80")
    additions = [one for one in reductions_in(scatter) if one.number in loop]
    now = {
        "gather": once_a_round(gather),
        "scatter": scatter.path(loop, scatter.named(r"LDG\..*", loop) + additions),
    }
    expect_close(now, {"gather": GATHER_80[dtype], "scatter": SCATTER_80[dtype]})


def expect_close(now: dict[str, float], stated: dict[str, int]) -> None:
    """Fewer instructions than stated are welcome, but then the statement is to say so."""
    assert now.keys() == stated.keys()
    for name, count in stated.items():
        assert count / SLACK <= now[name] <= count * SLACK, f"{name}: {now} now, stated {stated}"


LISTING = """
.text._Z6kernelv:
        /*0000*/                   MOV R1, 0x0 ;
.L_x_1:
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
        /*0040*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   FADD R2, R2, R3 ;
        /*0060*/              @!P1 BRA `(.L_x_3) ;
        /*0070*/                   FMUL R2, R2, R3 ;
        /*0080*/                   STG.E desc[UR4][R4.64], R2 ;
.L_x_3:
        /*0090*/               @P2 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
"""


def test_the_way_through_a_loop():
    (kernel,) = machine_code.parse(LISTING)
    assert kernel.name == "_Z6kernelv" and len(kernel.instructions) == 11
    (load,), (store,) = kernel.named(r"LDG\..*"), kernel.named(r"STG\..*")
    (loop,) = kernel.loops_around(store)
    assert loop == range(1, 10)
    assert kernel.path(loop, [load]) == 5  # around the call, and past the store
    assert kernel.path(loop, [load, store]) == kernel.longest_path(loop) == 7
    assert kernel.steps(0, 10, range(11)) == 6
    with pytest.raises(AssertionError, match="nothing leads"):
        kernel.path(loop, kernel.named(r"CALL\..*"))
