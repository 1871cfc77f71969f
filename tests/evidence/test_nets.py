"""The arms: what they have in common, and what each differs in."""

import pytest
import torch

from mmdcn.evidence import cost, nets
from mmdcn.evidence.transforms import CANVAS

IMAGES = torch.rand(4, 1, CANVAS, CANVAS, generator=torch.Generator().manual_seed(0))


def build(arm: str) -> torch.nn.Module:
    torch.manual_seed(3)
    return nets.ARMS[arm].build()


@pytest.mark.parametrize(
    "arm", ["transformer", "modulation", "dcn", "dcnv2", "dcnv2-groups", "branch", "norm"]
)
def test_arms_start_as_the_plain_network(arm):
    torch.testing.assert_close(build(arm)(IMAGES), build("plain")(IMAGES), atol=1e-4, rtol=1e-4)


def parameters(arm: str) -> int:
    return sum(p.numel() for p in build(arm).parameters())


@pytest.mark.parametrize("arm", ["plain-size", "branch", "transformer"])
def test_controls_have_the_parameters_of_dcnv2(arm):
    assert parameters(arm) == pytest.approx(parameters("dcnv2"), rel=0.03)


def test_the_widened_network_is_within_two_percent():
    assert parameters("plain-size") == pytest.approx(parameters("dcnv2"), rel=0.02)


@pytest.mark.parametrize("arm", nets.ARMS)
def test_what_is_added_is_all_that_the_plain_network_lacks(arm):
    if not nets.ARMS[arm].added:
        return
    added = sum(
        p.numel() for n, p in build(arm).named_parameters() if nets.is_added(nets.ARMS[arm], n)
    )
    assert added == parameters(arm) - parameters("plain")


def test_the_last_features_see_what_is_said():
    image = IMAGES[:1].clone().requires_grad_()
    network = build("plain").eval()
    for conv in network.convs:
        torch.nn.init.ones_(conv.weight)
    last = network.features(image)[-1]
    last[0, :, 2, 2].sum().backward()
    seen = image.grad[0, 0].nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).max() <= 39
    assert last.shape[-1] == 5


def test_operations_are_those_of_the_convolutions():
    sizes = [20, 10, 10, 5, 5]
    widths = (1, *nets.WIDTHS)
    expected = sum(9 * a * b * s * s for a, b, s in zip(widths, widths[1:], sizes)) + 960
    assert cost.multiply_adds(build("plain")) == expected
    assert cost.multiply_adds(build("dcnv2")) > 1.2 * expected
