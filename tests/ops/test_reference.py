"""The oracle of all operators, against sums over all integer positions, written out with loops."""

import itertools

import pytest
import torch

from mmdcn.ops import reference
from tests.ops.aggregate_problems import AggregateProblem
from tests.ops.problems import Problem
from tests.ops.roi_problems import RoIProblem


@pytest.mark.parametrize(
    "problem",
    [
        Problem(1, 2, (5,), 2, (3,), (2,), (1,), (1,), 1, 2),
        Problem(1, 2, (4, 5), 2, (2, 3), (2, 1), (1, 1), (1, 2), 1, 2),
        Problem(1, 2, (3, 2, 4), 2, (2, 1, 2), (1, 1, 2), (0, 1, 1), (1, 1, 2), 2, 2),
    ],
    ids=["1d", "2d", "3d"],
)
def test_deform_conv_is_equations_2_to_4(problem):
    """Offset channels are ordered by group, tap and dimension, the outermost first."""
    tensors = {name: t.detach() for name, t in problem.tensors().items()}
    x, offset, weight, bias, mask = tensors.values()
    actual = reference.deform_conv_nd(**tensors, **problem.arguments())
    grid = lambda sizes: itertools.product(*map(range, sizes))  # noqa: E731
    channels = problem.channels // problem.groups
    taps = len(list(grid(problem.kernel)))
    for out in range(problem.out_channels):
        first = out // (problem.out_channels // problem.groups) * channels
        for p0 in grid(problem.out_size):
            total = bias[out].clone()
            for c in range(channels):
                group = (first + c) // (problem.channels // problem.deform_groups)
                for n, pn in enumerate(grid(problem.kernel)):
                    sample = group * taps + n
                    p = [
                        p0[d] * problem.stride[d]
                        - problem.padding[d]
                        + pn[d] * problem.dilation[d]
                        + offset[(0, problem.rank * sample + d, *p0)]
                        for d in range(problem.rank)
                    ]
                    x_of_p = 0
                    for q in grid(problem.size):
                        g = 1
                        for q_d, p_d in zip(q, p):
                            g = g * max(0, 1 - abs(q_d - p_d))
                        x_of_p = x_of_p + g * x[(0, first + c, *q)]
                    total += weight[(out, c, *pn)] * x_of_p * mask[(0, sample, *p0)]
            torch.testing.assert_close(actual[(0, out, *p0)], total)


def test_dcnv3_is_the_papers_equation():
    problem = AggregateProblem(
        1, 4, (4, 5), (3, 3), (2, 1), (1, 2), (1, 2), 2, 0.5, remove_center=True
    )
    tensors = {name: t.detach() for name, t in problem.tensors().items()}
    x, offset, mask = tensors.values()
    actual = reference.dcnv3(**tensors, **problem.arguments())
    # Relative to the middle, column by column, as InternImage numbers the taps.
    taps = [(j - 1, 2 * (i - 1)) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    for c in range(4):
        g = c // 2
        for y0 in range(problem.out_size[0]):
            for x0 in range(problem.out_size[1]):
                total = 0
                for k, (p_k_y, p_k_x) in enumerate(taps):
                    delta_x, delta_y = offset[0, y0, x0, 16 * g + 2 * k : 16 * g + 2 * k + 2]
                    p_y = y0 * 2 - 1 + 1 + 0.5 * (p_k_y + delta_y)
                    p_x = x0 * 1 - 2 + 2 + 0.5 * (p_k_x + delta_x)
                    x_of_p = sum(
                        max(0, 1 - abs(q_y - p_y)) * max(0, 1 - abs(q_x - p_x)) * x[0, q_y, q_x, c]
                        for q_y in range(4)
                        for q_x in range(5)
                    )
                    total = total + mask[0, y0, x0, 8 * g + k] * x_of_p
                torch.testing.assert_close(actual[0, y0, x0, c], total)


def test_deform_roi_pool_is_the_papers_equation():
    problem = RoIProblem(
        1, 4, (4, 5), 1, (2, 3), 0.5, 2, deform_groups=2, position_sensitive=True, dyadic=False
    )
    tensors = {name: t.detach() for name, t in problem.tensors().items()}
    tensors["rois"] = torch.tensor([[0.0, 1.3, 0.4, 8.1, 6.9]], dtype=torch.float64)
    x, rois, offset = tensors.values()
    offset *= 0.1
    actual = reference.deform_roi_pool(**tensors, **problem.arguments())
    left, top, right, bottom = (rois[0, 1:] * 0.5 - 0.5).tolist()
    for c in range(4):
        for i in range(2):
            for j in range(3):
                total = 0
                delta_x, delta_y = offset[0, 2 * (c // 2) : 2 * (c // 2) + 2, i, j].tolist()
                for k in range(4):
                    p_y = top + (bottom - top) * (0.5 * delta_y + (i + (k // 2 + 0.5) / 2) / 2)
                    p_x = left + (right - left) * (0.5 * delta_x + (j + (k % 2 + 0.5) / 2) / 3)
                    p_y, p_x = min(max(p_y, 0), 3), min(max(p_x, 0), 4)
                    total = total + sum(
                        max(0, 1 - abs(q_y - p_y))
                        * max(0, 1 - abs(q_x - p_x))
                        * x[0, 6 * c + 3 * i + j, q_y, q_x]
                        for q_y in range(4)
                        for q_x in range(5)
                    )
                torch.testing.assert_close(actual[0, c, i, j], total / 4)
