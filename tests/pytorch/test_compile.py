"""torch.compile on layers, a backbone and a detector: whole graphs, and one for all sizes."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from mmdcn.ops import _devices, _library
from tests.pytorch.models import assert_same, backbone, gradients, layer

NAMES = pytest.mark.parametrize("name", ["DCN", "DCNv2"])
SLOW = pytest.mark.slow
# The first is not square: the compiler takes two sizes that are equal in the first input for one.
SIZES = [(64, 96), (64, 64), (96, 64), (70, 81), (128, 33), (40, 40), (97, 64), (64, 65), (33, 128)]
SIZES += [(80, 112)]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients_by_name(compiled: nn.Module, x: torch.Tensor) -> dict:
    return {n.removeprefix("_orig_mod."): g for n, g in gradients(compiled, x).items()}


# ------------------------------------------------------------------------------------------ layers


@pytest.mark.parametrize(
    ("name", "dynamic"), [pytest.param("DCN", False, marks=SLOW), ("DCNv2", True)]
)
def test_layer_by_inductor(name, dynamic):
    model = layer(name)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for size in [(9, 11), (12, 7)] if dynamic else [(9, 11)]:
        x = torch.randn(2, 8, *size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
        assert_same(gradients_by_name(compiled, x), gradients(model, x))


@NAMES
def test_layer_in_mixed_precision(name):
    model = layer(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 9, 11)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), model(x))


def test_the_look_for_kernels_breaks_no_graph():
    def compute(x):
        ours = _devices.server("deform_conv2d", x.device) == _devices.OURS
        return x + 1 if ours and not _library.cuda_is_loaded() else x - 1

    compiled = torch.compile(compute, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), compute(torch.ones(2)))


def test_errors_are_ours_within_a_compiled_function():
    from mmdcn.ops import deform_conv2d

    compiled = torch.compile(deform_conv2d, backend="eager")
    with pytest.raises(Exception, match=r"offset: offset.shape\[1\] is not valid"):
        compiled(torch.zeros(1, 4, 5, 5), torch.zeros(1, 16, 5, 5), torch.zeros(4, 4, 3, 3))


# ---------------------------------------------------------------------------------------- backbone


@NAMES
def test_resnet50_is_one_graph(name):
    pytest.importorskip("mmdet")
    model = backbone(name)
    explained = torch._dynamo.explain(model)(torch.randn(2, 3, 64, 64))
    assert (explained.graph_break_count, explained.graph_count) == (0, 1), explained.break_reasons
    operators = [node.target for graph in explained.graphs for node in graph.graph.nodes]
    assert operators.count(torch.ops.mmdcn.deform_conv2d.default) == 4 + 6 + 3


@pytest.mark.parametrize("name", [pytest.param("DCN", marks=SLOW), "DCNv2"])
def test_ten_sizes_are_one_compilation(name):
    pytest.importorskip("mmdet")
    model = backbone(name)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for batch, size in zip([2, 2, 3] * 4, SIZES):
        x = torch.randn(batch, 3, *size)
        assert_same(gradients_by_name(compiled, x), gradients(model, x))
    assert counter.frame_count == 1


@SLOW
@NAMES
def test_resnet50_trains_by_inductor(name):
    model = backbone(name)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(2, 3, *SIZES[0])
    assert_same(gradients_by_name(compiled, x), gradients(model, x), rtol=1e-3)


@SLOW
@NAMES
def test_ten_sizes_are_one_compilation_by_inductor(name):
    model = backbone(name, training=False)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for size in SIZES:
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)


@SLOW
@NAMES
def test_training_by_inductor_compiles_as_often_as_dense_convolutions_do(name):
    """Inductor fixes image sizes where it compiles the backward pass of torch's convolutions."""

    def compilations(deformable: nn.Module) -> int:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = nn.Sequential(nn.Conv2d(3, 8, 1), deformable, nn.ReLU(), nn.Conv2d(12, 8, 1))
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for size in SIZES[:3]:
            x = torch.randn(2, 3, *size)
            assert_same(gradients_by_name(compiled, x), gradients(model, x), rtol=1e-3)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    assert compilations(layer(name)) <= compilations(nn.Conv2d(8, 12, 3, padding=1))


# ----------------------------------------------------------------------- what the plugin takes over


@pytest.mark.parametrize("name", ["DeformConv2dPack", "ModulatedDeformConv2dPack"])
def test_mmcvs_own_layers(name):
    mmcv_ops = pytest.importorskip("mmcv.ops")
    model = getattr(mmcv_ops, name)(8, 12, 3, padding=1, groups=2, deform_groups=2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for size in ((9, 11), (12, 7), (20, 21)):
        x = torch.randn(2, 8, *size)
        assert_same(gradients_by_name(compiled, x), gradients(model, x))
    assert counter.frame_count == 1


def test_heads_of_mmdet_break_at_none_of_our_lines():
    pytest.importorskip("mmdet")
    from tests.toolbox_script import heads

    levels = [torch.randn(2, 32, size, size) for size in (16, 8)]
    for name, (model, _) in heads().items():
        torch._dynamo.reset()
        explained = torch._dynamo.explain(model)(levels)
        frames = [str(reason.user_stack) for reason in explained.break_reasons]
        assert not [frame for frame in frames if "mmdcn" in frame], (name, frames)
        operators = [node.target for graph in explained.graphs for node in graph.graph.nodes]
        assert torch.ops.mmdcn.deform_conv2d.default in operators, name
