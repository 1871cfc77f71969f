"""The machine code of every operator's kernels, without a GPU: no local memory, wide accesses."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from . import machine_code
from .built import CSRC
from .machine_code import Code, kernels_of, needs_tools, only, reductions_in

SOURCES = sorted((CSRC / "cuda").glob("*/kernels.cu"))
# The loads of a sample's vectors of channels, as they are unrolled: in the forward pass all corners
# or, in RoI pooling, one after the other; in the backward pass the gradient of the output, too.
LOADS = {
    ("deform_aggregate", "forward"): 4,
    ("deform_aggregate", "backward"): 5,
    ("deform_roi_pool", "forward"): 1,
    ("deform_roi_pool", "backward"): 2,
}
# The vector and the bits of a load: 16 bytes but for half types, which are summed in float32.
WIDTHS = {"f": (4, 128), "6__half": (4, 64), "13__nv_bfloat16": (4, 64), "d": (2, 128)}

SAMPLERS = pytest.mark.parametrize("operator, direction", LOADS)


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Callable[[Path], Code]:
    found = {}

    def of(source: Path) -> Code:
        if source not in found:
            found[source] = machine_code.of_source(source, tmp_path_factory.mktemp("code"))
        return found[source]

    return of


def test_every_operator_is_read():
    convolutions = {"deform_conv"}
    assert {source.parent.name for source in SOURCES} == convolutions | {name for name, _ in LOADS}


@needs_tools
@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.parent.name)
def test_no_local_memory(code, source, architecture):
    kernels = kernels_of(code(source), architecture)
    assert len(kernels) >= 16
    for kernel in kernels:
        assert len(kernel.instructions) > 20
        assert kernel.named(r"(LDL|STL)(\..*)?") == [], kernel.name


@needs_tools
@SAMPLERS
@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize("scalar", WIDTHS)
def test_samples_are_read_in_vectors(code, operator, direction, architecture, scalar):
    vector, bits = WIDTHS[scalar]
    kernels = kernels_of(code(CSRC / "cuda" / operator / "kernels.cu"), architecture)
    kernel = only(kernels, rf"{direction}_kernelILi{vector}E{scalar}[fd]E")
    loads = kernel.named(rf"LDG\.E\.{bits}\.CONSTANT")
    assert loads and len(loads) % LOADS[operator, direction] == 0
    # The others are of a point or of a box, once for all channels.
    assert not kernel.named(r"LDG\.E\.U16.*")


@needs_tools
@pytest.mark.parametrize("operator", sorted({name for name, _ in LOADS}))
@pytest.mark.parametrize("scalar", ["f", "6__half", "13__nv_bfloat16"])
def test_gradients_are_added_in_vectors_on_sm_90(code, operator, scalar):
    kernels = kernels_of(code(CSRC / "cuda" / operator / "kernels.cu"), "90")
    names = {one.name for one in reductions_in(only(kernels, rf"backward_kernelILi4E{scalar}fE"))}
    # RED, unlike ATOM, brings nothing back.
    assert len(names) == 1 and re.fullmatch(r"REDG\.E\.ADD\.F32x4(\..*)?", *names), names
