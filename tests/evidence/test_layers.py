"""What the layers do: the measures are right where the answer is known."""

import torch

from mmdcn.evidence import layers, receptive, training
from mmdcn.evidence.nets import ARMS
from mmdcn.evidence.training import Run

from . import examples

IMAGES = examples.digits(10).images


def network(arm: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return ARMS[arm].build().eval()


def test_features_of_a_digit_that_stays_are_equal():
    assert max(layers.equivariance(network("plain"), IMAGES, 0.0, 1.0)) < 1e-5


def test_a_network_that_only_blurs_evenly_is_nearly_equivariant():
    blurring, other = network("plain"), network("plain")
    for conv in blurring.convs:
        kernel = torch.tensor([1.0, 2.0, 1.0])
        conv.weight.data[:] = kernel[:, None] * kernel / 16 / conv.in_channels
    even = layers.equivariance(blurring, IMAGES, 0.5, 1.2)
    uneven = layers.equivariance(other, IMAGES, 0.5, 1.2)
    assert all(first < 0.5 * second for first, second in zip(even, uneven))


def test_fresh_layers_have_a_dilation_of_one_and_offsets_change_it():
    fresh = network("dcn")
    assert layers.effective_dilation(fresh, IMAGES, 1.6) == [1.0] * 4
    y, x = torch.meshgrid(torch.arange(3) - 1, torch.arange(3) - 1, indexing="ij")
    fresh.convs[2].conv_offset.bias.data[:] = torch.stack([y, x], -1).flatten().float()
    assert layers.effective_dilation(fresh, IMAGES, 1.0) == [1.0, 2.0, 1.0, 1.0]


def test_the_section_is_of_the_runs_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "COUNT", 1000)
    assert layers.section(layers.measure(tmp_path, examples.digits(250)), {}) == []
    assert layers.figures(tmp_path, examples.digits(250)) == {}
    for arm in ("plain", "dcn"):
        for seed in range(2):
            run = Run("scratch", arm, layers.EPOCHS, seed)
            training.save_weights(network(arm), training.weights_file(run, tmp_path))
    found = layers.measure(tmp_path, examples.digits(250))
    text = "\n".join(layers.section(found, {"receptive.png": "here/receptive.png"}))
    assert "| 30° | plain | 2 |" in text and "| ×1.6 | DCN − plain | 2 | +0.000 ± 0.000 |" in text
    assert "| DCN | ×1.60 | 1.00 | 1.00 | 1.00 | 1.00 |" in text
    assert "| ×1.60 | DCN | 2 |" in text and "](here/receptive.png)" in text
    assert layers.sentences(found) == []  # two seeds are too few
    (picture,) = layers.figures(tmp_path, examples.digits(250)).values()
    assert len(picture.axes) == 2 * len(receptive.MOVES)


def test_the_receptive_field_of_a_plain_network_is_within_its_reach():
    """The middle of five outputs lies at pixel 16 and sees 19 more on each side, as far as any."""
    images = torch.rand(10, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    field = receptive.fields(network("plain"), images)
    assert field.shape == (10, 40, 40)
    torch.testing.assert_close(field.sum(dim=(1, 2)), torch.ones(10))
    seen = (field > 0).any(dim=0)
    for along in (0, 1):
        assert seen.any(dim=along).nonzero().flatten().tolist() == list(range(16 + 19 + 1))


def test_offsets_that_shrink_the_kernel_shrink_the_receptive_field():
    """All taps of all layers at the middle one: a single pixel of the first stage is seen."""
    narrow = network("dcn")
    y, x = torch.meshgrid(1 - torch.arange(3), 1 - torch.arange(3), indexing="ij")
    for conv in narrow.convs[1:]:
        conv.conv_offset.bias.data[:] = torch.stack([y, x], -1).flatten().float()
    wide, small = (
        receptive.measure(net, IMAGES, 1.0)["radius"] for net in (network("dcn"), narrow)
    )
    assert small <= 2**0.5 * 1.01 < 5 < wide


def test_the_share_on_the_digit_is_that_of_the_field(monkeypatch):
    def on_the_digit(_, images):
        field = (torch.nn.functional.max_pool2d(images, 3, 1, 1)[:, 0] > 0.5).float()
        return field / field.sum(dim=(1, 2), keepdim=True)

    monkeypatch.setattr(receptive, "fields", on_the_digit)
    found = receptive.measure(None, IMAGES, 1.0)
    assert abs(found["on_digit"] - 1) < 1e-6
    monkeypatch.setattr(receptive, "fields", lambda _, images: torch.full((10, 40, 40), 1 / 1600))
    found = receptive.measure(None, IMAGES, 1.0)
    assert abs(found["on_digit"] - found["digit"]) < 1e-6
    assert abs(found["radius"] - (2 * (40**2 - 1) / 12) ** 0.5) < 1e-3
