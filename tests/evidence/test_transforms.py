"""Transformations: their strengths, and that maps are moved as digits are."""

import math

import pytest
import torch
from torch.nn import functional as F

from mmdcn.evidence import transforms

from . import examples

IMAGES = examples.digits(20).images
EVERY = (*transforms.KINDS, transforms.ALL)


def transformed(kind: str, strength: float) -> torch.Tensor:
    return transforms.transform(IMAGES, kind, strength, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", EVERY)
def test_strength_zero_is_the_digit_on_its_canvas(kind):
    margin = (transforms.CANVAS - 28) // 2
    expected = F.pad(IMAGES, [margin] * 4)[:, None]
    torch.testing.assert_close(transformed(kind, 0.0), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", EVERY)
def test_more_strength_changes_more(kind):
    start = transformed(kind, 0.0)
    changes = [(transformed(kind, s) - start).abs().mean().item() for s in (0.25, 0.5, 1.0)]
    assert 0 < changes[0] < changes[1] < changes[2]


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"kind: expected one of rotation, .*, got 'flip'"):
        transformed("flip", 1.0)


def test_similarity_turns_clockwise_and_enlarges():
    image = torch.zeros(1, 28, 28)
    image[0, 13:15, 20:24] = 1.0  # to the right of the middle
    turned = transforms.similarity(image, angle=math.pi / 2, factor=1.5)[0, 0]
    y, x = (turned > 0.5).nonzero().float().mean(dim=0).tolist()
    middle = (transforms.CANVAS - 1) / 2
    assert x == pytest.approx(middle, abs=0.6)
    assert y - middle == pytest.approx(1.5 * 8, abs=0.6)  # below: y points down


@pytest.mark.parametrize("stride", [1, 2, 8])
def test_maps_move_as_digits_do(stride):
    """A map that samples the canvas at multiples of its stride, as convolutions do."""
    axis = torch.arange(transforms.CANVAS) - (transforms.CANVAS - 1) / 2
    ramp = (axis[:, None] + 2 * axis)[None, None, ::stride, ::stride]
    moved = transforms.warp_features(ramp, angle=0.3, factor=1.2)
    y, x = torch.meshgrid(axis[::stride], axis[::stride], indexing="ij")
    cosine, sine = math.cos(0.3) / 1.2, math.sin(0.3) / 1.2
    expected = (cosine * y - sine * x) + 2 * (cosine * x + sine * y)
    inner = slice(1, -1) if stride == 8 else slice(4, -4)
    inner = slice(8, -8) if stride == 1 else inner
    torch.testing.assert_close(
        moved[0, 0][inner, inner], expected[inner, inner], atol=1e-3, rtol=1e-3
    )
