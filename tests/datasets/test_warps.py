"""The warps of the warped shapes: invertible, growing with their strength, without folds."""

import numpy as np
import pytest

from mmdcn.datasets.warps import KINDS, draw_warp


def _grid(extent=1.2, steps=25):
    axis = np.linspace(-extent, extent, steps)
    return np.stack(np.meshgrid(axis, axis), axis=-1)


def _draw(kind, strength, seed):
    return draw_warp(np.random.default_rng(seed), kind, strength)


@pytest.mark.parametrize("kind", KINDS)
def test_strength_zero_is_the_identity(kind):
    np.testing.assert_allclose(_draw(kind, 0.0, seed=1).forward(_grid()), _grid(), atol=1e-12)


@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_inverse_undoes_forward(kind, strength):
    for seed in range(20):
        warp = _draw(kind, strength, seed)
        np.testing.assert_allclose(warp.inverse(warp.forward(_grid())), _grid(), atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_folds_over(kind):
    """The Jacobian's determinant stays positive, so an outline never crosses itself."""
    for seed in range(20):
        warp = _draw(kind, 3.0, seed)
        here, step = warp.forward(_grid()), 1e-5
        along_x = warp.forward(_grid() + [step, 0]) - here
        along_y = warp.forward(_grid() + [0, step]) - here
        determinant = along_x[..., 0] * along_y[..., 1] - along_x[..., 1] * along_y[..., 0]
        assert determinant.min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_displacement_grows_with_strength(kind):
    moved = [
        np.mean([np.abs(_draw(kind, s, seed).forward(_grid()) - _grid()) for seed in range(20)])
        for s in (0.5, 1.0, 2.0, 3.0)
    ]
    assert moved[0] > 0.02
    assert np.all(np.diff(moved) > 0.02)


def test_one_generator_state_gives_one_warp_at_every_strength():
    weak, strong = np.random.default_rng(5), np.random.default_rng(5)
    for kind in KINDS:
        draw_warp(weak, kind, 0.1)
        draw_warp(strong, kind, 3.0)
    assert weak.random() == strong.random()


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of affine, projective, elastic"):
        _draw("twirl", 1.0, seed=0)
