"""Figures and pages of what is sampled; the page runs in a headless Chromium."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from torch import nn

from mmdcn.layers import DeformConv2dPack, ModulatedDeformConv2dPack
from mmdcn.visualization import (
    SampledImage,
    choose_layers,
    figure_image,
    object_centers,
    of_images,
    record_sampling,
    sampling_figure,
    sampling_page,
    stacked_points,
)

HEIGHT, WIDTH = 60, 90
SCALE = (2.0, 1.5)  # The network's input is 180 wide and 90 high, padded to 192×96.


@pytest.fixture(scope="module")
def sampled():
    torch.manual_seed(3)
    network = nn.Sequential()
    network.add_module("stem", nn.Conv2d(3, 4, 3, 4, 1))
    network.add_module("neck", DeformConv2dPack(4, 4, 3, stride=2, padding=1))
    network.add_module("backbone", nn.Sequential())
    for name, groups in (("a", 1), ("b", 2)):
        layer = ModulatedDeformConv2dPack(4, 4, 3, padding=1, deform_groups=groups)
        nn.init.normal_(layer.conv_offset.weight, std=0.3)
        nn.init.normal_(layer.conv_offset.bias, std=2)
        network.backbone.add_module(name, layer)
    nn.init.normal_(network.neck.conv_offset.bias, std=2)
    with record_sampling(network) as layers:
        network(torch.randn(1, 3, 96, 192))
    image = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return SampledImage(image, layers, (96, 192), SCALE)


def test_the_backbones_last_layers_are_chosen(sampled):
    assert choose_layers(sampled) == ["backbone.b", "backbone.a"]
    assert choose_layers(sampled, count=1) == ["backbone.b"]
    headless = SampledImage(sampled.image, {"neck": sampled.layers["neck"]}, (96, 192))
    assert choose_layers(headless) == ["neck"]
    names = ["neck", "backbone.b"]
    assert choose_layers(sampled, names) == names[::-1]
    with pytest.raises(ValueError, match=r"some of neck, backbone.a, backbone.b, got 'head'"):
        choose_layers(sampled, ["head"])


def test_outside_the_backbone_one_layer_is_chosen_the_last_of_the_largest():
    """The same convolution on three levels, and two convolutions side by side on the first."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.other = (DeformConv2dPack(3, 3, 3, padding=1) for _ in range(2))

        def forward(self, x):
            self.shared(x), self.other(x)
            self.shared(x[..., ::2, ::2]), self.shared(x[..., ::4, ::4])

    head = Head()
    with record_sampling(head) as layers:
        head(torch.randn(1, 3, 32, 32))
    assert list(layers) == ["shared", "other", "shared#2", "shared#3"]
    sampled = SampledImage(np.zeros((32, 32, 3), np.uint8), layers, (32, 32))
    assert choose_layers(sampled) == ["other"]
    assert choose_layers(sampled, ["shared#2"]) == ["shared#2"]


def test_layers_that_do_not_see_whole_images_are_left_out():
    model = nn.Sequential()
    model.add_module("backbone", DeformConv2dPack(3, 3, 3, padding=1))
    model.add_module("roi", DeformConv2dPack(3, 3, 3, padding=1))
    with record_sampling(model) as recorded:
        rois = model.backbone(torch.randn(1, 3, 8, 8)).expand(5, -1, -1, -1)
        model.roi(rois)
    assert list(recorded) == ["backbone", "roi"]
    assert list(of_images(recorded, 1)) == ["backbone"]
    with pytest.raises(ValueError, match=r"whole images, got roi, which sample parts cut out"):
        of_images({"roi": recorded["roi"]}, 1)
    with pytest.raises(ValueError, match=r"got none: RoI pooling, sequences and volumes"):
        of_images({}, 1)


def test_centres_of_certain_objects():
    instances = InstanceData(
        bboxes=torch.tensor([[0.0, 0, 10, 20], [4, 4, 8, 8], [1, 1, 3, 3], [5, 5, 7, 7]]),
        scores=torch.tensor([0.5, 0.9, 0.2, 0.4]),
    )
    assert object_centers(instances, 0.3, 4) == [(6, 6), (5, 10), (6, 6)]
    assert object_centers(instances, 0.3, 1) == [(6, 6)]
    assert object_centers(instances, 0.95, 4) == []


@pytest.mark.parametrize("layers", [["neck"], ["backbone.b", "backbone.a", "neck"]])
def test_figure_has_a_panel_for_each_point(sampled, layers):
    figure = sampling_figure(sampled, layers, [(45.0, 30.0), (10.0, 50.0)])
    *panels, colors = figure.axes
    assert [ax.get_title() for ax in panels] == ["x 45, y 30", "x 10, y 50"]
    assert colors.get_ylabel() == "modulation"
    picture = figure_image(figure)
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert picture.std() > 20


# -------------------------------------------------------------------------------------------- page


def browse(tmp_path, page: str, script: str) -> str:
    """The document that a browser makes of a page, after a script has run in it."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium: install Debian's package of that name")
    path = tmp_path / "page.html"
    path.write_text(page.replace("</html>", f"<script>{script}</script></html>"))
    run = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--window-size=800,700",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


MOVE = """
function send(type, x, y) {
  const box = scene.getBoundingClientRect(), view = scene.viewBox.baseVal;
  const zoom = Math.min(box.width / view.width, box.height / view.height);
  scene.dispatchEvent(new PointerEvent(type, {
    clientX: box.x + (box.width - zoom * view.width) / 2 + x * zoom,
    clientY: box.y + (box.height - zoom * view.height) / 2 + y * zoom, bubbles: true }));
}
"""
LAYERS = ["backbone.b", "backbone.a", "neck"]


def circles(document: str) -> np.ndarray:
    found = re.findall(r'<circle cx="([^"]+)" cy="([^"]+)"', document)
    return np.array(found, dtype=float)


def expected(sampled, layers, xy) -> np.ndarray:
    at = tuple(np.array(xy) * SCALE)
    stacked = stacked_points([sampled.layers[name] for name in layers], at, sampled.input_size)
    return stacked.points[-1] / SCALE


def assert_same_points(mine: np.ndarray, theirs: np.ndarray) -> None:
    assert len(mine) == len(theirs)
    # The page draws the strongest last; its modulation is rounded, so the orders may differ.
    mine, theirs = (p[np.lexsort(np.round(p, 3).T)] for p in (mine, theirs))
    np.testing.assert_allclose(mine, theirs, atol=2e-3)


def test_the_page_needs_nothing_else(sampled):
    page = sampling_page(sampled, LAYERS, (45.0, 30.0))
    assert "{{" not in page
    assert not re.search(r"""(src|href)=["']""", page)
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}


def test_the_page_shows_the_start(sampled, tmp_path):
    document = browse(tmp_path, sampling_page(sampled, LAYERS, (45.2, 30.1)), "")
    points = expected(sampled, LAYERS, (45.2, 30.1))
    assert len(points) > 500
    assert_same_points(circles(document), points)
    assert f"{len(points)} points from x 45.2, y 30.1, through {', '.join(LAYERS)}" in document
    fills = set(re.findall(r'<circle[^>]* fill="(#\w+)"', document))
    assert len(fills) > 20


def test_hovering_shows_the_points_of_that_position(sampled, tmp_path):
    # Held by the first click: the second move changes nothing until the second click.
    script = MOVE + 'send("pointermove", 20.3, 12.2); send("click", 70.2, 41.3);'
    script += 'send("pointermove", 5, 5);'
    document = browse(tmp_path, sampling_page(sampled, LAYERS, (45.0, 30.0)), script)
    assert_same_points(circles(document), expected(sampled, LAYERS, (70.2, 41.3)))


def test_fewer_layers_can_be_chosen(sampled, tmp_path):
    script = MOVE + "document.querySelectorAll('[name=depth]')[0].click();"
    script += 'send("pointermove", 20.3, 12.2);'
    document = browse(tmp_path, sampling_page(sampled, LAYERS, (45.0, 30.0)), script)
    points = expected(sampled, LAYERS[:1], (20.3, 12.2))
    assert 9 <= len(points) <= 18
    assert_same_points(circles(document), points)
