"""The samples that a detector's deformable layers take of an image, as a figure and as a page."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from mmdet.apis import inference_detector
from mmengine.structures import InstanceData
from torch import nn

from mmdcn.errors import did_you_mean
from mmdcn.files import read_image
from mmdcn.visualization.sampling import (
    COLOR_MAP,
    Sampling,
    draw_sampling_points,
    draw_stacked_points,
    points_in_image,
    record_sampling,
    stacked_points,
)

Point = tuple[float, float]


@dataclass(frozen=True)
class SampledImage:
    """An image, and what the deformable layers sampled as a detector looked at it.

    Args:
        image: (H, W, 3) uint8, RGB.
        layers: what each layer sampled, by its name, in the order of execution.
        input_size: height and width of the network's input, padding included.
        scale: (x, y), by which the image was enlarged on its way into the network.
        instances: what was detected, in pixels of the image.

    Example:
        >>> model = nn.Sequential(DeformConv2dPack(3, 8, kernel_size=3, padding=1))
        >>> with record_sampling(model) as recorded:
        ...     _ = model(torch.randn(1, 3, 16, 16))
        >>> sampled = SampledImage(np.zeros((16, 16, 3), np.uint8), recorded, input_size=(16, 16))
        >>> list(sampled.layers)
        ['0']
    """

    image: np.ndarray
    layers: dict[str, Sampling]
    input_size: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    instances: InstanceData | None = None


def sample_image(model: nn.Module, path: str) -> SampledImage:
    """Let a detector look at an image.

    Args:
        model: as made by ``mmdet.apis.init_detector``.
        path: path of the image file.

    Raises:
        ValueError: the file is not an image, or the model called no deformable operator of which
            anything can be drawn on it.

    Example:
        >>> model = init_detector("config.py", "checkpoint.pth")  # doctest: +SKIP
        >>> list(sample_image(model, "image.jpg").layers)  # doctest: +SKIP
        ['backbone.layer2.0.conv2', 'backbone.layer2.1.conv2']
    """
    image = read_image(path)
    if image is None:
        raise ValueError(f"image: expected an image file, got {path!r}")
    with record_sampling(model) as layers:
        sample = inference_detector(model, path)
    return SampledImage(
        image=cv2.cvtColor(image, cv2.COLOR_BGR2RGB),
        layers=of_images(layers, 1),
        input_size=tuple(sample.batch_input_shape),
        scale=tuple(float(factor) for factor in sample.get("scale_factor", (1, 1))),
        instances=sample.pred_instances.cpu(),
    )


def of_images(layers: dict[str, Sampling], batch: int) -> dict[str, Sampling]:
    """Those of the layers that sampled maps of whole images, of which there are `batch`.

    Raises:
        ValueError: there are none.

    Example:
        >>> model = nn.Sequential(DeformConv2dPack(3, 8, kernel_size=3, padding=1))
        >>> with record_sampling(model) as recorded:
        ...     _ = model(torch.randn(2, 3, 16, 16))
        >>> list(of_images(recorded, 2))
        ['0']
    """
    chosen = {name: layer for name, layer in layers.items() if len(layer.locations) == batch}
    if chosen:
        return chosen
    if layers:
        raise ValueError(
            f"model: expected deformable convolutions of whole images, got {', '.join(layers)}, "
            "which sample parts cut out of them: these cannot be drawn on the image"
        )
    raise ValueError(
        "model: expected deformable convolutions (DCN, DCNv2, DCNv3, DCNv4, or a head that "
        "computes offsets of its own), got none: RoI pooling, sequences and volumes cannot be "
        "drawn on the image, and compiled models are not seen"
    )


def check_layers(model: nn.Module, names: Sequence[str]) -> None:
    """Check that a model has modules of some names, before it looks at an image.

    Args:
        model: the detector.
        names: as :func:`choose_layers` takes them: ``NAME#2`` is the second call of NAME.

    Raises:
        ValueError: it has not.

    Example:
        >>> check_layers(nn.Sequential(nn.ReLU()), ["0", "0#2"])
    """
    there = dict(model.named_modules())
    for name in names:
        if name.partition("#")[0] not in there:
            hint = did_you_mean(name, there)
            raise ValueError(f"layers: the model has no module {name!r}{hint}")


def choose_layers(
    sampled: SampledImage, names: Sequence[str] | None = None, count: int = 3
) -> list[str]:
    """The layers to follow points through, the last one first.

    Args:
        sampled: has the layers.
        names: the choice, in the order of execution or any other; None for the last layers of the
            backbone. Where that has none, for the one that ran last among those with the largest
            output: necks and heads have layers side by side, which are not each other's input.
        count: how many of these, at most.

    Raises:
        ValueError: the model has no layer of such a name.

    Example:
        >>> model = nn.Sequential(DeformConv2dPack(3, 8, kernel_size=3, padding=1))
        >>> with record_sampling(model) as recorded:
        ...     _ = model(torch.randn(1, 3, 16, 16))
        >>> sampled = SampledImage(np.zeros((16, 16, 3), np.uint8), recorded, input_size=(16, 16))
        >>> choose_layers(sampled)
        ['0']
    """
    available = list(sampled.layers)
    if names is None:
        last = [name for name in available if name.startswith("backbone.")]
        if last:
            return last[: -count - 1 : -1]
        pixels = {name: sampled.layers[name].locations[0, 0, 0, 0].numel() for name in available}
        return [name for name in available if pixels[name] == max(pixels.values())][-1:]
    for name in names:
        if name not in available:
            raise ValueError(f"layers: expected some of {', '.join(available)}, got {name!r}")
    return sorted(names, key=available.index, reverse=True)


def object_centers(instances: InstanceData, min_score: float, count: int) -> list[Point]:
    """The centres of the most certain detections, with at least a minimum score.

    Example:
        >>> boxes, scores = torch.tensor([[2.0, 4.0, 10.0, 8.0]]), torch.tensor([0.9])
        >>> object_centers(InstanceData(bboxes=boxes, scores=scores), min_score=0.5, count=3)
        [(6.0, 6.0)]
    """
    best = instances.scores.argsort(descending=True)[:count]
    boxes = instances.bboxes[best[instances.scores[best] >= min_score]]
    return [tuple(center) for center in ((boxes[:, :2] + boxes[:, 2:]) / 2).tolist()]


def sampling_figure(
    sampled: SampledImage, layers: Sequence[str], points: Sequence[Point]
) -> Figure:
    """The image once for each point, with what is sampled from there.

    With one layer, lines lead from the regular kernel to the sampling points; with several, the
    points are those of the first layer, through all of them.

    Args:
        sampled: the image.
        layers: names, the last one first, see :func:`choose_layers`.
        points: (x, y) in pixels of the image.

    Example:
        >>> model = nn.Sequential(DeformConv2dPack(3, 8, kernel_size=3, padding=1))
        >>> with record_sampling(model) as recorded:
        ...     _ = model(torch.randn(1, 3, 16, 16))
        >>> sampled = SampledImage(np.zeros((16, 16, 3), np.uint8), recorded, input_size=(16, 16))
        >>> figure_image(sampling_figure(sampled, ["0"], points=[(8, 8)])).shape
        (560, 600, 3)
    """
    height, width = sampled.image.shape[:2]
    scale = np.array(sampled.scale)
    panel = 5 * np.array([width, height]) / max(width, height)
    figure = Figure(
        figsize=(panel[0] * len(points) + 1, panel[1] + 0.6), layout="constrained", dpi=100
    )
    axes = figure.subplots(1, len(points), squeeze=False)[0]
    samplings = [sampled.layers[name] for name in layers]
    for ax, point in zip(axes, points):
        ax.imshow(sampled.image, extent=(0, width * scale[0], height * scale[1], 0))
        at = tuple(np.array(point) * scale)
        if len(layers) == 1:
            colors = draw_sampling_points(ax, points_in_image(*samplings, at, sampled.input_size))
        else:
            stacked = stacked_points(samplings, at, sampled.input_size)
            colors = draw_stacked_points(ax, stacked)
        ax.set(xlim=(0, width * scale[0]), ylim=(height * scale[1], 0), xticks=[], yticks=[])
        ax.set_title(f"x {point[0]:.0f}, y {point[1]:.0f}", fontsize=9)
    figure.colorbar(colors, ax=axes, label="modulation", shrink=0.8)
    figure.suptitle(", ".join(layers), fontsize=9)
    return figure


def figure_image(figure: Figure) -> np.ndarray:
    """A figure as an image, (H, W, 3) uint8, RGB.

    Example:
        >>> figure_image(Figure(figsize=(3, 2), dpi=100)).shape
        (200, 300, 3)
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def sampling_page(sampled: SampledImage, layers: Sequence[str], start: Point) -> str:
    """A self-contained HTML page: moving over the image shows what that position samples.

    Args:
        sampled: the image.
        layers: names, the last one first, see :func:`choose_layers`.
        start: (x, y) in pixels of the image, shown at first.

    Example:
        >>> model = nn.Sequential(DeformConv2dPack(3, 8, kernel_size=3, padding=1))
        >>> with record_sampling(model) as recorded:
        ...     _ = model(torch.randn(1, 3, 16, 16))
        >>> sampled = SampledImage(np.zeros((16, 16, 3), np.uint8), recorded, input_size=(16, 16))
        >>> sampling_page(sampled, ["0"], start=(8, 8)).startswith("<!doctype html>")
        True
    """
    height, width = sampled.image.shape[:2]
    colors = matplotlib.colormaps[COLOR_MAP](np.linspace(0, 1, 256))
    data = {
        "image": _data_url(sampled.image),
        "width": width,
        "height": height,
        "scale": sampled.scale,
        "inputSize": sampled.input_size,
        "layers": [_layer_data(name, sampled.layers[name]) for name in layers],
        "colors": [to_hex(color) for color in colors],
        "start": start,
    }
    template = files(__package__).joinpath("sampling_page.html").read_text(encoding="utf-8")
    # In a script element nothing but its end tag could end the data.
    return template.replace("{{data}}", json.dumps(data).replace("</", "<\\/"))


def _data_url(image: np.ndarray) -> str:
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return f"data:image/jpeg;base64,{base64.b64encode(encoded).decode()}"


def _layer_data(name: str, sampling: Sampling, index: int = 0) -> dict:
    """A layer's samples for the page: those of each output position in turn, y before x."""
    locations = sampling.locations[index].permute(3, 4, 0, 1, 2).cpu().numpy()
    groups, taps = locations.shape[2:4]
    modulation = None
    if sampling.modulation is not None:
        values = sampling.modulation[index].permute(2, 3, 0, 1).cpu().numpy()
        modulation = base64.b64encode((values * 255).round().astype(np.uint8).tobytes()).decode()
    return {
        "name": name,
        "size": locations.shape[:2],
        "inputSize": sampling.input_size,
        "samples": groups * taps,
        "locations": base64.b64encode(locations.astype("<f4").tobytes()).decode(),
        "modulation": modulation,
    }
