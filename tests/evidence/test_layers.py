"""What the layers do: the measures are right where the answer is known."""

import torch

from mmdcn.evidence import layers, training
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
    assert layers.section(layers.measure(tmp_path, examples.digits(250))) == []
    for arm in ("plain", "dcn"):
        for seed in range(2):
            run = Run("scratch", arm, layers.EPOCHS, seed)
            training.save_weights(network(arm), training.weights_file(run, tmp_path))
    found = layers.measure(tmp_path, examples.digits(250))
    text = "\n".join(layers.section(found))
    assert "| 30° | plain | 2 |" in text and "| ×1.6 | DCN − plain | 2 | +0.000 ± 0.000 |" in text
    assert "| DCN | ×1.60 | 1.00 | 1.00 | 1.00 | 1.00 |" in text
    assert layers.sentences(found) == []  # two seeds are too few
