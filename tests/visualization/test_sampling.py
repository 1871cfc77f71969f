"""Sampling points: where they lie, how they stack, and how they are drawn."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import grid_sample

from mmdcn import layers
from mmdcn.layers import DeformConv2dPack, ModulatedDeformConv2dPack
from mmdcn.ops import deform_conv2d
from mmdcn.visualization import (
    SamplingPoints,
    StackedPoints,
    draw_sampling_points,
    draw_stacked_points,
    points_in_image,
    record_sampling,
    sampling_locations,
    stacked_points,
)


def test_known_offsets_give_known_points():
    """Kernel 2×3, two offset groups, output 2×2; everything differs between y and x."""
    offset = torch.zeros(1, 2 * 2 * 6, 2, 2)
    offset[0, 12 + 2 * 4, 1, 0] = 0.5  # second group, tap (1, 1), y
    offset[0, 12 + 2 * 4 + 1, 1, 0] = -3.25  # the same, x
    locations = sampling_locations(offset, (2, 3), stride=(2, 3), padding=(1, 0), dilation=(4, 5))
    assert locations.shape == (1, 2, 6, 2, 2, 2)
    # Output (1, 0) starts at y = 1 · 2 - 1 and x = 0; taps are 4 apart in y and 5 in x.
    regular = [[1, 0], [1, 5], [1, 10], [5, 0], [5, 5], [5, 10]]
    assert locations[0, 0, :, :, 1, 0].tolist() == regular
    regular[4] = [5.5, 1.75]
    assert locations[0, 1, :, :, 1, 0].tolist() == regular


def test_the_operator_samples_at_the_locations():
    """Interpolating at the locations and applying the weights is the deformable convolution."""
    geometry = {"stride": 2, "padding": 1, "dilation": 2}
    x, offset = torch.randn(2, 4, 9, 11).double(), torch.randn(2, 2 * 2 * 9, 4, 5).double()
    weight = torch.randn(3, 4, 3, 3).double()
    locations = sampling_locations(offset, 3, **geometry)  # (N, G, K, 2, Ho, Wo)
    samples = []
    for group, channels in enumerate(x.chunk(2, dim=1)):
        y, x_ = locations[:, group].unbind(dim=2)
        grid = torch.stack([(2 * x_ + 1) / 11 - 1, (2 * y + 1) / 9 - 1], dim=-1).flatten(1, 2)
        sampled = grid_sample(channels, grid, align_corners=False).unflatten(2, (9, 4))
        samples.append(sampled)  # (N, C / G, K, Ho, Wo)
    expected = torch.einsum("nckhw,ock->nohw", torch.cat(samples, 1), weight.flatten(2))
    torch.testing.assert_close(deform_conv2d(x, offset, weight, **geometry), expected)


@pytest.mark.parametrize("channels", [0, 9, 20])
def test_a_wrong_number_of_channels_is_refused(channels):
    with pytest.raises(ValueError, match=f"offset must have a multiple of 18 .* got {channels}"):
        sampling_locations(torch.zeros(1, channels, 2, 2), 3)


def _network():
    """Two strided convolutions, then two deformable layers with offsets that are not zero."""
    network = nn.Sequential()
    network.add_module("stem", nn.Conv2d(3, 4, 3, 2, 1))
    network.add_module("pool", nn.MaxPool2d(3, 2, 1))
    network.add_module("v1", DeformConv2dPack(4, 4, 3, stride=2, padding=1))
    network.add_module("v2", ModulatedDeformConv2dPack(4, 4, 3, padding=1, deform_groups=2))
    for layer in (network.v1, network.v2):
        nn.init.normal_(layer.conv_offset.bias)
    return network


def test_record_sampling_sees_what_the_layers_compute():
    network = _network()
    with record_sampling(network) as recorded:
        network(torch.randn(2, 3, 32, 48))
    assert list(recorded) == ["v1", "v2"]
    v1, v2 = recorded.values()
    assert v1.input_size == (8, 12)
    assert v2.input_size == (4, 6)
    assert v1.modulation is None
    assert v1.locations.shape == (2, 1, 9, 2, 4, 6)
    assert v2.locations.shape == (2, 2, 9, 2, 4, 6)
    assert v2.modulation.shape == (2, 2, 9, 4, 6)
    # The branch's weight is zero, so its output is its bias: y, x of each tap, then modulation.
    bias = network.v2.conv_offset.bias
    moved = (v2.locations - v2.regular)[1, :, :, :, 2, 3]
    torch.testing.assert_close(moved.flatten(), bias[:36].detach())
    torch.testing.assert_close(v2.modulation[0, :, :, 1, 1].flatten(), bias[36:].sigmoid().detach())


@pytest.mark.parametrize("version", [3, 4])
def test_modulations_that_are_weights_are_shown_as_shares(version):
    """Of the largest, in magnitude; those of DCNv4 have any sign and size."""
    layer = getattr(layers, f"DCNv{version}")(8, 8, 3, padding=1, deform_groups=2)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    with record_sampling(nn.Sequential(layer)) as recorded, torch.no_grad():
        layer(torch.randn(1, 8, 6, 7))
    modulation = recorded["0"].modulation
    assert modulation.shape == (1, 2, 9, 6, 7)
    assert modulation.min() >= 0
    assert modulation.max() == 1
    assert modulation.std() > 0.05


def test_a_second_pass_takes_the_place_of_the_first():
    """Also where it has fewer calls."""

    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = DeformConv2dPack(3, 3, 3, padding=1)

        def forward(self, levels):
            for x in levels:
                self.conv(x)

    model = Levels()
    with record_sampling(model) as recorded:
        model([torch.randn(1, 3, 8, 8), torch.randn(1, 3, 4, 4)])
        assert [s.input_size for s in recorded.values()] == [(8, 8), (4, 4)]
        model([torch.randn(1, 3, 6, 6)])
    assert {name: s.input_size for name, s in recorded.items()} == {"conv": (6, 6)}


def test_record_sampling_stops_with_its_context():
    network = _network()
    with record_sampling(network) as recorded:
        pass
    network(torch.randn(1, 3, 32, 32))
    assert not recorded


def test_points_lie_where_the_features_come_from():
    """Convolutions that copy their centre carry a dot of the image to the feature named for it."""
    network = _network()
    with torch.no_grad():
        network.stem.weight.zero_()[:, :, 1, 1] = 1
        network.stem.bias.zero_()
        network.v1.weight.zero_()[:, :, 1, 1] = 1
        nn.init.zeros_(network.v1.conv_offset.bias)
    with record_sampling(network) as recorded:
        network(torch.randn(1, 3, 64, 96))
    points = points_in_image(recorded["v1"], xy=(41.0, 22.0), image_size=(64, 96))
    assert points.center.tolist() == [40.5, 24.5]
    column, row = (points.center - 0.5).astype(int)
    image = torch.zeros(1, 3, 64, 96)
    image[..., row, column] = 1
    features = network.v1(network.pool(network.stem(image)))
    assert features[0, 0].argmax() == 3 * 12 + 5  # output stride 8: row 24, column 40
    # Taps are one input pixel apart, four in the image.
    expected = [[40.5 + 4 * dx, 24.5 + 4 * dy] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert points.regular.tolist() == expected
    assert points.points.tolist() == [expected]


def test_points_of_a_position_at_the_border_stay_in_the_output():
    network = _network()
    with record_sampling(network) as recorded:
        network(torch.randn(1, 3, 64, 64))
    points = points_in_image(recorded["v2"], xy=(64.0, 64.0), image_size=(64, 64))
    assert points.center.tolist() == [56.5, 56.5]
    assert points.points.shape == (2, 9, 2)
    assert points.modulation.shape == (2, 9)


def test_drawing_puts_dots_on_the_points_in_the_colour_of_their_modulation():
    points = SamplingPoints(
        center=np.array([10.0, 20.0]),
        points=np.array([[[11.0, 21.0], [14.0, 18.0]]]),
        regular=np.array([[9.0, 20.0], [11.0, 20.0]]),
        modulation=np.array([[0.25, 0.75]]),
    )
    axes = Figure().subplots()
    dots = draw_sampling_points(axes, points)
    assert dots.get_offsets().tolist() == [[11.0, 21.0], [14.0, 18.0]]
    assert dots.get_array().tolist() == [0.25, 0.75]
    assert dots.get_clim() == (0, 1)
    drawn = [c.get_offsets().tolist() for c in axes.collections]
    assert points.regular.tolist() in drawn
    assert [points.center.tolist()] in drawn


def test_stacked_points_carry_on_from_each_point():
    """Two layers at once against one by one, with points outside the first one's input."""
    network = _network()
    nn.init.normal_(network.v2.conv_offset.bias, std=3)
    with record_sampling(network) as recorded:
        network(torch.randn(2, 3, 64, 96))
    v1, v2 = recorded["v1"], recorded["v2"]
    size = (64, 96)
    stacked = stacked_points([v2, v1], (41.0, 22.0), size, index=1)
    last = points_in_image(v2, (41.0, 22.0), size, index=1)
    assert stacked.center.tolist() == last.center.tolist()

    ends, weights = [], []
    for point, weight in zip(last.points.reshape(-1, 2), last.modulation.ravel()):
        x, y = (point - 0.5) / 8  # in pixels of v2's input, which has 8×12 of them
        if -1 < x < 12 and -1 < y < 8:
            first = points_in_image(v1, tuple(point), size, index=1)
            ends.append(first.points.reshape(-1, 2))
            weights.append(np.full(9, weight))
    assert len(stacked.points[0]) == len(ends) < 18
    ends, weights = np.concatenate(ends), np.sqrt(np.concatenate(weights))
    inside = ((ends > 0.5 - 4) & (ends < np.array([24, 16]) * 4 + 0.5)).all(1)
    np.testing.assert_allclose(stacked.points[1], ends[inside])
    np.testing.assert_allclose(stacked.modulation[1], weights[inside], rtol=1e-6)


def test_stacking_nothing_is_refused():
    with pytest.raises(ValueError, match="samplings: expected those of at least one layer"):
        stacked_points([], (1.0, 1.0), (8, 8))


def test_half_precision_keeps_fractions_of_pixels():
    offset = torch.full((1, 18, 1, 2000), 0.3, dtype=torch.float16)
    locations = sampling_locations(offset, 3)
    assert locations[0, 0, 0, 1, 0, -1] == 1999 + torch.tensor(0.3).half().float()


def test_drawing_stacked_points_puts_the_strongest_on_top():
    stacked = StackedPoints(
        center=np.array([10.0, 20.0]),
        points=(np.array([[1.0, 2.0]]), np.array([[11.0, 21.0], [14.0, 18.0], [3.0, 4.0]])),
        modulation=(np.ones(1), np.array([0.75, 0.25, 0.5])),
    )
    dots = draw_stacked_points(Figure().subplots(), stacked)
    assert dots.get_offsets().tolist() == [[14.0, 18.0], [3.0, 4.0], [11.0, 21.0]]
    assert dots.get_array().tolist() == [0.25, 0.5, 0.75]
    assert dots.get_clim() == (0, 1)
