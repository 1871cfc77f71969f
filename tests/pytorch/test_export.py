"""torch.export and AOTInductor: a backbone whose batch and image size stay open."""

import pytest
import torch
from torch import nn

from tests.pytorch.models import backbone, layer

NAMES = pytest.mark.parametrize("name", ["DCN", "DCNv2"])
# A ResNet-50 of all its blocks, and to save time one of a few.
WHOLE = pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("DCN", 2),
        ("DCNv2", 2),
        pytest.param("DCN", 6, marks=pytest.mark.slow),
        pytest.param("DCNv2", 6, marks=pytest.mark.slow),
    ],
)
DYNAMIC = torch.export.Dim.DYNAMIC
SHAPES = ({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},)


def others(x: torch.Tensor) -> list[torch.Tensor]:
    """Inputs of other batch and image sizes than the example's."""
    return [
        torch.randn(n, x.shape[1], h, w) for n, h, w in ((1, 64, 64), (3, 97, 70), (2, 33, 128))
    ]


def compare(function, model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        for inputs in (x, *others(x)):
            torch.testing.assert_close(function(inputs), model(inputs), rtol=1e-4, atol=1e-4)


@NAMES
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_layer_exports(name, strict):
    model = layer(name).eval()
    x = torch.randn(2, 8, 9, 11)
    program = torch.export.export(model, (x,), dynamic_shapes=SHAPES, strict=strict)
    compare(program.module(), model, x)


@WHOLE
def test_backbone_exports_saves_and_loads(name, blocks, tmp_path):
    pytest.importorskip("mmdet")
    model = backbone(name, blocks=blocks, training=False)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=SHAPES)
    operators = [node.target for node in program.graph.nodes]
    layers = sum(min(blocks, count) for count in (4, 6, 3))
    assert operators.count(torch.ops.mmdcn.deform_conv2d.default) == layers
    torch.export.save(program, tmp_path / "backbone.pt2")
    compare(torch.export.load(tmp_path / "backbone.pt2").module(), model, x)


def package_and_load(model: nn.Module, x: torch.Tensor, path) -> nn.Module:
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=SHAPES)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return torch._inductor.aoti_load_package(package)


@pytest.mark.slow
def test_layer_by_aotinductor(tmp_path):
    model = layer("DCNv2").eval()
    x = torch.randn(2, 8, 9, 11)
    compare(package_and_load(model, x, tmp_path / "layer.pt2"), model, x)


@pytest.mark.slow
@NAMES
def test_backbone_by_aotinductor(name, tmp_path):
    model = backbone(name, training=False)
    x = torch.randn(2, 3, 64, 96)
    compare(package_and_load(model, x, tmp_path / "backbone.pt2"), model, x)
