"""The benchmark's measurement of memory."""

from dataclasses import replace

import pytest
import torch

from mmdcn.benchmark import cases, memory
from mmdcn.benchmark.implementations import Bound, Mmdcn

CPU = torch.device("cpu")
MEGABYTE = 2**20

pytestmark = pytest.mark.skipif(not memory.can_measure(CPU), reason="needs Linux's /proc")


def take(megabytes: int) -> torch.Tensor:
    return torch.ones(megabytes * MEGABYTE, dtype=torch.uint8)


def test_peak_is_what_was_taken_at_the_same_time():
    def call():
        take(160)  # freed before the next
        first, second = take(96), take(96)
        return first, second

    peak = memory.resident_peak(call)
    assert 190 * MEGABYTE < peak < 210 * MEGABYTE


def test_results_are_not_counted():
    leaf = torch.ones(48 * MEGABYTE // 4, requires_grad=True)

    def forward():
        with torch.no_grad():
            take(64)
        return leaf * 2

    # Forward, the output and 64 MB are there at the same time at most if the latter is freed late.
    bound = Bound(forward, {"leaf": leaf}, torch.ones_like(leaf))
    assert 10 * MEGABYTE < memory.extra_bytes(bound, "forward", CPU) < 30 * MEGABYTE
    assert leaf.grad is None


def test_an_implementation_in_its_own_process_which_dies_over_its_last_case():
    small, large = cases.find_shapes("1x32x16x16")[0], cases.find_shapes("1x32x200x200")[0]
    impossible = replace(small, layout="none")
    found = memory.measure_on_cpu(Mmdcn.name, [small, large, impossible], 2.0, threads=2)
    assert [set(answer) for answer in found[:2]] == [{"forward", "forward_backward"}] * 2
    # Far less than columns of samples would take, which are nine times the input.
    assert found[1]["forward"] < 6 * torch.Size(large.shapes()["input"]).numel() * 4
    assert found[2:] == [{"cannot": "its process ended with 1: KeyError: 'none'"}]
