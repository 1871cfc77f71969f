"""torch.jit.trace: every layer traced, saved, loaded and frozen, for sizes that it has not seen."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmdcn.ops import _library
from tests.layers.examples import NAMES, build, inputs
from tests.programs import run_python
from tests.pytorch.models import backbone

EVERY = pytest.mark.parametrize("name", NAMES)
# Pixels that each side has more than in the trace, and images in the batch.
SIZES = ((0, 2), (5, 3))

pytestmark = pytest.mark.filterwarnings(
    # Python's checks of shapes are not recorded; what they find out holds for every size.
    "ignore::torch.jit.TracerWarning",
    "ignore:`torch.jit:DeprecationWarning",
)


def versions(model: nn.Module, example: tuple[Tensor, ...], path: Path) -> Iterator[tuple]:
    """What a trace is used as, by name; the file is one of them."""
    traced = torch.jit.trace(model, example)
    yield "traced", traced
    traced.save(path)
    loaded = torch.jit.load(path)
    yield "loaded", loaded
    yield "frozen", torch.jit.freeze(loaded)


@EVERY
def test_layers_compute_what_they_do_in_python_for_every_size(name, tmp_path):
    model = build(name).eval()
    for version, traced in versions(model, inputs(name), tmp_path / "layer.pt"):
        for more, batch in SIZES:
            given = inputs(name, more, batch)
            # The first calls of a trace are specialised to their sizes.
            for _ in range(2):
                with torch.no_grad():
                    output, expected = traced(*given), model(*given)
                torch.testing.assert_close(output, expected, msg=f"{version}, {more}, {batch}")


@EVERY
def test_a_loaded_layer_is_differentiated(name, tmp_path):
    model = build(name)
    torch.jit.trace(model, inputs(name)).save(tmp_path / "layer.pt")
    gradients = []
    for module in (model, torch.jit.load(tmp_path / "layer.pt")):
        features, *others = inputs(name, 3, 3)
        features.requires_grad_()
        module(features, *others).square().sum().backward()
        gradients.append([features.grad, *(p.grad for p in module.parameters())])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_backbone(tmp_path):
    pytest.importorskip("mmdet")
    model = backbone("DCNv2", blocks=1, training=False)
    for version, traced in versions(model, (torch.randn(1, 3, 64, 96),), tmp_path / "model.pt"):
        x = torch.randn(2, 3, 97, 70)
        with torch.no_grad():
            for output, expected in zip(traced(x), model(x), strict=True):
                torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4, msg=version)


# In a process that has torch and the compiled library, and no Python of ours.
ELSEWHERE = """
import sys
from pathlib import Path
import torch

folder, library = Path(sys.argv[1]), sys.argv[2]
names = sorted(path.stem for path in folder.glob("*.pt"))
for name in names:
    try:
        torch.jit.load(folder / f"{name}.pt")
    except RuntimeError as error:
        assert "Unknown builtin op: mmdcn::" in str(error), error
    else:
        raise AssertionError(f"{name} was loaded without the library")
torch.ops.load_library(library)
for name in names:
    given, expected = torch.load(folder / f"{name}.tensors")
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(folder / f"{name}.pt")(*given), expected)
assert "mmdcn" not in sys.modules
print(*names)
"""


def test_another_process_needs_the_library_and_nothing_else(tmp_path):
    for name in NAMES:
        model, given = build(name).eval(), inputs(name, 4, 3)
        traced = torch.jit.trace(model, inputs(name), check_trace=False)
        traced.save(tmp_path / f"{name}.pt")
        with torch.no_grad():
            torch.save((given, model(*given)), tmp_path / f"{name}.tensors")
    printed = run_python("-c", ELSEWHERE, tmp_path, _library.CPU_LIBRARY, cwd=tmp_path)
    assert printed.splitlines()[-1].split() == sorted(NAMES)
