"""The benchmark's cases: what they cost by hand, their tensors, and how shapes are named."""

import pytest
import torch
import torch.nn.functional as F

from mmdcn.benchmark import BenchmarkError, cases
from mmdcn.benchmark.cases import Case


def test_flops_and_bytes_by_hand():
    case = Case("", 2, 8, 12, 6, 5, kernel=3, stride=2, groups=2, deform_groups=4)
    assert case.out_size == (3, 3)
    # 2 images, 12 channels and 3 × 3 positions of 4 channels and 9 taps, two for each.
    assert case.flops == 2 * 12 * 9 * (4 * 9) * 2
    sizes = {
        "input": 2 * 8 * 6 * 5,
        "offset": 2 * 4 * 18 * 9,
        "mask": 2 * 4 * 9 * 9,
        "weight": 12 * 4 * 9,
        "output": 2 * 12 * 9,
    }
    assert {n: torch.Size(s).numel() for n, s in case.shapes().items()} == sizes
    assert case.bytes_moved("forward") == 4 * sum(sizes.values())
    once = sum(sizes.values())
    assert case.bytes_moved("forward_backward") == 4 * (once + once + once - sizes["output"])


def test_offsets_are_wide_beside_half_precision():
    narrow = 2 * (8 * 30 + 8 * 8 * 9 + 8 * 30)
    for version, per_tap in (("v1", 2), ("v2", 3)):
        case = Case("", 1, 8, 8, 6, 5, version=version, dtype="bfloat16")
        assert case.bytes_moved("forward") == narrow + per_tap * 9 * 30 * 4
        assert ("mask" in case.shapes()) == (version == "v2")


@pytest.mark.parametrize("name", cases.SHAPES)
def test_tensors_have_the_shapes_that_a_convolution_has(name):
    for case in cases.find_shapes(name):
        shapes = case.shapes()
        with torch.device("meta"):
            output = F.conv2d(
                torch.empty(shapes["input"]),
                torch.empty(shapes["weight"]),
                groups=case.groups,
                **case.arguments(),
            )
        assert output.shape == shapes["output"]


def test_tensors_repeat_and_follow_the_offsets_size():
    case = cases.find_shapes("1x8x9x10")[0]
    device = torch.device("cpu")
    one, two = (cases.make_tensors(case, device, std) for std in (1.0, 2.0))
    assert torch.equal(2 * one["offset"], two["offset"])
    assert all(torch.equal(one[n], two[n]) for n in ("input", "weight", "mask", "grad_output"))
    assert not cases.make_tensors(case, device, 0.0)["offset"].any()
    assert one["mask"].min() > 0 and one["mask"].max() < 1


def test_expand_gives_every_combination_once():
    found = cases.expand(
        ["r50", "1x4x8x8:6", "r50"], ["v1", "v2"], ["nchw", "channels_last"], ["float32"], [1, 8]
    )
    assert len(found) == len(set(found)) == 4 * 2 * 2 * 2
    assert {case.batch for case in found} == {1, 8}
    assert {case.label for case in found if case.channels in (4, 128)} == {
        "1, 128→128, 100×168, c3",
        "8, 128→128, 100×168, c3",
        "1, 4→6, 8×8",
        "8, 4→6, 8×8",
    }


@pytest.mark.parametrize("name", ["r18", "1x2x3", "0x4x8x8", "1x4x8x8:0", ""])
def test_unknown_shapes_are_named(name):
    with pytest.raises(BenchmarkError, match=f"design, variants, r50.*got '{name}'"):
        cases.find_shapes(name)
