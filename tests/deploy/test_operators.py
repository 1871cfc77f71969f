"""The operators of decoding: their contract with torch, and their translation to ONNX."""

import pytest
import torch

pytest.importorskip("mmdet")

from mmcv.ops import RoIAlign
from torch import Tensor, nn
from torch.library import opcheck

from mmdcn.deploy import operators
from mmdcn.deploy.operators import UNUSED


def boxes(*shape: int) -> Tensor:
    corners = torch.rand(*shape, 2) * 50
    return torch.cat([corners, corners + torch.rand(*shape, 2) * 40], dim=-1)


def scores(*shape: int) -> Tensor:
    values = torch.rand(*shape)
    return torch.where(values < 0.3, UNUSED, values)


def rois(count: int, images: int) -> Tensor:
    return torch.cat([torch.randint(0, images, (count, 1)).float(), boxes(count)], dim=1)


def pyramid(images: int) -> list[Tensor]:
    return [torch.randn(images, 8, 30, 32), torch.randn(images, 8, 15, 16)]


#: Arguments of each operator, for a batch of two.
CALLS = {
    "select_top_k": lambda: (torch.rand(2, 7), 10),
    "nms": lambda: (boxes(2, 3, 30), scores(2, 3, 30), 0.5, 5),
    "multi_level_roi_align": lambda: (
        pyramid(2),
        rois(20, 2),
        torch.randint(-1, 2, (20,)),
        [7, 5],
        [0.5, 0.25],
        0,
        True,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_contract_with_torch(name):
    opcheck(getattr(torch.ops.mmdcn_deploy, name).default, CALLS[name]())


def test_the_largest_and_what_is_left():
    found, indices = operators.select_top_k(torch.tensor([[0.1, 0.7, 0.4]]), 2)
    assert found.tolist() == [[pytest.approx(0.7), pytest.approx(0.4)]]
    assert indices.tolist() == [[1, 2]]
    found, indices = operators.select_top_k(torch.tensor([[0.5]]), 3)
    assert found.tolist() == [[0.5, UNUSED, UNUSED]] and indices.tolist() == [[0, 0, 0]]


def test_suppression_within_a_group():
    box = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.0], [20.0, 0.0, 30.0, 9.0]])
    given = torch.tensor([[[0.5, 0.6, 0.7], [0.5, UNUSED, 0.2]]])
    kept = operators.nms(box[None, None], given, 0.5, 10)
    assert torch.equal(kept, torch.tensor([[[UNUSED, 0.6, 0.7], [0.5, UNUSED, 0.2]]]))
    assert torch.equal(operators.nms(box.expand(1, 2, 3, 4), given, 0.5, 10), kept)
    fewest = operators.nms(box[None, None], given, 0.5, 1)
    assert torch.equal(fewest, torch.tensor([[[UNUSED, UNUSED, 0.7], [0.5, UNUSED, UNUSED]]]))


def test_each_roi_at_its_own_level():
    features, regions, levels = pyramid(2), rois(6, 2), torch.tensor([0, 1, -1, 1, 0, -1])
    pooled = operators.multi_level_roi_align(
        features, regions, levels, [7, 5], [0.5, 0.25], 0, True
    )
    for roi, level, got in zip(regions, levels.tolist(), pooled):
        expected = torch.zeros(8, 7, 5)
        if level >= 0:
            layer = RoIAlign((7, 5), (0.5, 0.25)[level])
            expected = layer(features[level], roi[None])[0]
        assert torch.allclose(got, expected, atol=1e-6)


class All(nn.Module):
    """Every operator, and suppression of each kind."""

    def forward(self, flat, own, own_scores, common, features, regions, levels):
        suppress = operators.nms
        return (
            *operators.select_top_k(flat, 10),
            suppress(own, own_scores, 0.5, 4),
            suppress(common, own_scores, 0.5, 4),
            suppress(common, own_scores[:, :1], 0.3, 100),
            operators.multi_level_roi_align(
                features, regions, levels, [7, 5], [0.5, 0.25], 0, True
            ),
            operators.multi_level_roi_align(
                features, regions, levels, [2, 2], [0.5, 0.25], 2, False
            ),
        )


def arguments(images: int, count: int, used: bool = True) -> tuple:
    levels = torch.randint(-1, 2, (count,)) if used else torch.full((count,), -1)
    own_scores = scores(images, 3, count) if used else torch.full((images, 3, count), UNUSED)
    own, common = boxes(images, 3, count), boxes(images, 1, count)
    flat = torch.rand(images, count)
    return flat, own, own_scores, common, pyramid(images), rois(count, images), levels


def test_translations(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from mmdcn.deploy.translations import TRANSLATIONS

    batch, count = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    of_count = {0: batch, 2: count}
    levels = [{0: batch, 2: batch, 3: batch}] * 2
    shapes = ({0: batch, 1: count}, *[of_count] * 3, levels, {0: count}, {0: count})
    program = torch.export.export(All(), arguments(2, 30), dynamic_shapes=shapes, strict=False)
    path = tmp_path / "operators.onnx"
    torch.onnx.export(
        program, dynamo=True, custom_translation_table=TRANSLATIONS, verbose=False
    ).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    for given in (arguments(2, 30), arguments(3, 60), arguments(1, 4), arguments(1, 4, used=False)):
        flat = torch.utils._pytree.tree_leaves(given)
        results = session.run(None, {n: t.numpy() for n, t in zip(names, flat)})
        for result, expected in zip(results, All()(*given)):
            assert result.shape == tuple(expected.shape)
            assert torch.allclose(torch.from_numpy(result), expected, atol=1e-5)
