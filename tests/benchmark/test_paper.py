"""The budget on paper: its arithmetic by hand, its block in the documentation."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mmdcn.benchmark import BenchmarkError
from mmdcn.benchmark.cases import SHAPES
from mmdcn.benchmark.paper import counts, ours, page, peer
from mmdcn.benchmark.paper.device import H100, Step, total
from mmdcn.benchmark.paper.problem import Problem, distinct_sectors, product_time

ROOT = Path(__file__).parents[2]


def problem(shape: str, batch: int, arithmetic: str) -> Problem:
    (case,) = (case for case in SHAPES["r50"] if case.name == shape)
    return Problem.of(replace(case, batch=batch), arithmetic)


def step(steps: list[Step], name: str) -> Step:
    (found,) = (step for step in steps if step.name == name)
    return found


def test_the_documentation_has_this_budget():
    assert page.block() in (ROOT / "docs" / "performance.md").read_text()


def test_the_block_says_that_nothing_was_measured():
    heading = page.block().splitlines()[1]
    assert heading.startswith("**Computed on paper, not measured.**")
    assert H100.name in heading and "torchvision has no kernels for bfloat16" in heading


def test_a_step_takes_as_long_as_what_takes_longest():
    step = Step("any", launches=3, l2=H100.l2 * 5, memory=H100.memory * 7)
    assert step.microseconds(H100) == pytest.approx(7 + 3 * H100.launch)
    assert step.bound_by(H100) == "memory"
    assert total([step, step], H100) == pytest.approx(2 * (7 + 3 * H100.launch))


@pytest.mark.parametrize(
    "shape,batch,arithmetic,pixels",
    [
        # 25 MB hold 11377 pixels of 1152 halves: half an image at a time.
        ("c3", 2, "float16", [8400] * 4),
        # 5688 pixels in float32: a third of an image.
        ("c3", 1, "float32", [5600] * 3),
        # 2844 pixels of 4608 halves: two images.
        ("c5", 8, "float16", [2100] * 4),
    ],
)
def test_chunks_are_those_of_the_operator(shape, batch, arithmetic, pixels):
    convolution = problem(shape, batch, arithmetic)
    assert ours.Chunks.of(H100, convolution, image_bytes=1).pixels == pixels


def test_sizes_are_those_of_the_kernels():
    source = (ROOT / "mmdcn" / "csrc" / "cuda" / "deform_conv" / "kernels.cu").read_text()
    limits = re.search(r"kLeast = INT64_C\((\d+)\) << 20, kMost = INT64_C\((\d+)\) << 20", source)
    copies = re.search(r"copy_bytes\(\) { return INT64_C\((\d+)\) << 20; }", source)
    expected = [int(limits[1]), int(limits[2]), int(copies[1])]
    assert expected == [ours.LEAST_CHUNK >> 20, ours.LARGEST_CHUNK >> 20, ours.COPIES >> 20]


def test_copies_limit_the_images_of_a_chunk():
    # Two images of 3 MB fit into 8 MB, so the third is a span of its own.
    chunks = ours.Chunks.of(H100, problem("c5", 3, "float16"), image_bytes=3 << 20)
    assert (chunks.pixels, chunks.spans) == ([2100, 1050], 2)


def test_gather_by_hand():
    # 16 vectors of a sample's 128 halves: 16 lanes, half a warp, each with one of them.
    count = counts.GATHER["float16"]
    samples = 2 * 16800 * 9
    warps = samples * (count.sample + count.vector) / 2
    warps += samples / 256 * 8 * (count.block + count.locate)
    gather = step(ours.forward(H100, problem("c3", 2, "float16")), "gather")
    assert gather.instructions == pytest.approx(warps)
    columns = samples * 128 * 2  # bytes
    assert gather.l1 == 5 * columns
    assert gather.l2 == 4 * columns * (1 - H100.l1_hits) + columns


def test_scatter_by_hand():
    # 128 vectors of four of a sample's 512 channels: each lane of a warp has four of them.
    count = counts.SCATTER["float32"]
    samples = 1050 * 9
    exchanges = 5  # of the four dots, over 32 lanes
    warps = samples * (count.sample + 4 * count.vector + exchanges * count.shuffle)
    warps += samples / 128 * (8 * count.block + 4 * (count.locate + count.finish))
    scatter = step(ours.backward(H100, problem("c5", 1, "float32")), "scatter")
    assert scatter.instructions == pytest.approx(warps)
    assert scatter.sectors == samples * 512 * 4 * 4 / 32


@pytest.mark.parametrize("element", [2, 4])
def test_distinct_sectors_against_draws(element):
    draws = random.Random(0)
    touched = []
    for _ in range(2000):
        lanes = [
            (draws.gauss(0, 2) // 1, (lane + draws.gauss(0, 2)) // 1 * element // 32)
            for lane in range(32)
        ]
        touched.append(len(set(lanes)))
    assert distinct_sectors(element) == pytest.approx(sum(touched) / len(touched), rel=0.02)


def test_products_wait_for_the_last_round():
    rate = H100.flops["float16"] * H100.product["float16"]
    full = 128 * H100.multiprocessors
    at_once = product_time(H100, "float16", full, 128, 255)
    assert at_once == pytest.approx(2 * full * 128 * 255 / rate)
    # One pixel more is another round of all multiprocessors, as so short a sum is not split.
    assert product_time(H100, "float16", full + 1, 128, 255) > 1.4 * at_once


def test_split_sums_fill_the_device():
    whole = replace(H100, split=0.0)
    taken = [product_time(device, "float32", 128, 1152, 8400) for device in (H100, whole)]
    assert taken[0] < taken[1] / 4


def test_half_types_and_training_are_below_torchvision():
    for row in page.rows(H100):
        assert row.is_below(H100, "with backward"), row.label
        if row.arithmetic in ("float16", "bfloat16"):
            assert row.is_below(H100, "forward"), row.label


def test_a_row_that_is_not_below_says_why():
    above = [row for row in page.rows(H100) if not row.is_below(H100, "forward")]
    lines = page.reasons(H100)
    assert len(lines) == len(above) > 0
    for row, line in zip(above, lines):
        assert line.startswith(f"- {row.arithmetic}, {row.label}, batch {row.batch}, forward: ")
        assert " against " in line.partition("forward, ")[2]


def test_torchvision_writes_columns_to_memory_where_they_do_not_stay():
    convolution = problem("c3", 8, "float32")
    columns = 4 * convolution.columns
    forward = peer.forward(H100, convolution)
    assert step(forward, "im2col").memory > columns and step(forward, "product").memory > columns
    small = peer.forward(H100, problem("c5", 1, "float16"))
    assert step(small, "im2col").memory == 0


def test_publishing_keeps_the_rest_of_the_page(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(f"before\n{page.START}\nold\n{page.END}\nafter\n")
    page.publish(file)
    assert file.read_text() == f"before\n{page.block()}\nafter\n"
    file.write_text("neither\n")
    with pytest.raises(BenchmarkError, match="--page: expected <!-- paper -->"):
        page.publish(file)
    assert file.read_text() == "neither\n"
