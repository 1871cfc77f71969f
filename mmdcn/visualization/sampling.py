"""The points at which deformable layers sample, on the image."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from mmdcn.engine.sampled_calls import named_calls
from mmdcn.ops._observers import SampledCall, convolution

Size = int | tuple[int, int]

COLOR_MAP = "plasma"  # for the modulation, from 0 to 1


@dataclass(frozen=True)
class Sampling:
    """The samples that one deformable layer took in one forward pass.

    Args:
        locations: (N, G, K, 2, Ho, Wo), see :func:`sampling_locations`.
        regular: (K, 2, Ho, Wo), the locations of the kernel without offsets.
        modulation: (N, G, K, Ho, Wo) in [0, 1], as a share of the layer's ``modulation_scale``;
            that of DCNv3 and DCNv4, and others that are not in [0, 1], in magnitude and as a share
            of the largest; None in a layer without.
        input_size: height and width of the layer's input.

    Example:
        >>> model = nn.Sequential(DeformConv2dPack(3, 8, kernel_size=3, padding=1))
        >>> with record_sampling(model) as recorded:
        ...     _ = model(torch.randn(1, 3, 16, 16))
        >>> isinstance(recorded["0"], Sampling), recorded["0"].locations.shape
        (True, torch.Size([1, 1, 9, 2, 16, 16]))
    """

    locations: Tensor
    regular: Tensor
    modulation: Tensor | None
    input_size: tuple[int, int]


@dataclass(frozen=True)
class SamplingPoints:
    """The sampling points of one output position, in continuous image coordinates.

    Args:
        center: (2,), (x, y) of the output position.
        points: (G, K, 2), (x, y) of the sampling points.
        regular: (K, 2), (x, y) of the points of the kernel without offsets.
        modulation: (G, K) in [0, 1]; None in a layer without.

    Example:
        >>> points = np.random.rand(1, 9, 2)
        >>> SamplingPoints(np.array([8.5, 8.5]), points, points[0], modulation=None).points.shape
        (1, 9, 2)
    """

    center: np.ndarray
    points: np.ndarray
    regular: np.ndarray
    modulation: np.ndarray | None


@dataclass(frozen=True)
class StackedPoints:
    """The points that one output position of the last of several layers samples through them all.

    A point that a layer samples is an output position of the layer before, which samples points
    of its own: K^n for n layers of K taps, as in the papers' figures.

    Args:
        center: (2,), (x, y) of the output position, in continuous image coordinates.
        points: for each layer, the last one first, (n, 2): (x, y) of what it samples.
        modulation: for each layer, (n,) in [0, 1]: the geometric mean of the modulations from the
            output position to the point, 1 in layers without.

    Example:
        >>> points, modulation = np.random.rand(9, 2), np.ones(9)
        >>> StackedPoints(np.array([8.5, 8.5]), (points,), (modulation,)).points[0].shape
        (9, 2)
    """

    center: np.ndarray
    points: tuple[np.ndarray, ...]
    modulation: tuple[np.ndarray, ...]


def sampling_locations(
    offset: Tensor, kernel_size: Size, stride: Size = 1, padding: Size = 0, dilation: Size = 1
) -> Tensor:
    """The points where a deformable convolution samples: p0 + pn + Δpn (arXiv 1703.06211, eq. 2).

    Args:
        offset: (N, 2 * G * K, Ho, Wo) with G offset groups and K = kh * kw taps; per group and tap
            y then x, in pixels of the input.
        kernel_size, stride, padding, dilation: of the convolution, int or (vertical, horizontal).

    Returns:
        (N, G, K, 2, Ho, Wo): per offset group and tap y and x, in pixels of the input, whole
        numbers at the centres of pixels.

    Raises:
        ValueError: the channels of ``offset`` do not divide into groups of 2 * K.

    Example:
        >>> sampling_locations(torch.zeros(1, 18, 8, 8), kernel_size=3, padding=1).shape
        torch.Size([1, 1, 9, 2, 8, 8])
    """
    kernel_size, stride, padding, dilation = map(_pair, (kernel_size, stride, padding, dilation))
    channels, *output_size = offset.shape[1:]
    num_taps = kernel_size[0] * kernel_size[1]
    if channels == 0 or channels % (2 * num_taps):
        raise ValueError(
            f"offset must have a multiple of {2 * num_taps} channels for a kernel of "
            f"{kernel_size[0]}×{kernel_size[1]}, got {channels}"
        )
    geometry = (kernel_size, stride, padding, dilation)
    return convolution(offset, None, output_size, *geometry).locations


@contextmanager
def record_sampling(model: nn.Module) -> Iterator[dict[str, Sampling]]:
    """Record what the deformable operators sample in a model while the context lasts.

    That is every deformable convolution over two dimensions, DCNv3 and DCNv4 among them, whether
    a layer predicts its offsets or a head computes them. Compiled graphs are not seen.

    Yields:
        A map from the name of each module that calls an operator to what it sampled in its latest
        forward pass, in the order of execution. A module that makes several calls in one pass has
        an entry for each, ``name``, ``name#2``, ``name#3`` and so on.

    Example:
        >>> model = nn.Sequential(DeformConv2dPack(3, 8, kernel_size=3, padding=1))
        >>> with record_sampling(model) as recorded:
        ...     _ = model(torch.randn(1, 3, 16, 16))
        >>> recorded["0"].locations.shape
        torch.Size([1, 1, 9, 2, 16, 16])
    """
    recorded: dict[str, Sampling] = {}

    def record(name: str, module: nn.Module, describe: Callable[[], SampledCall]) -> None:
        if "#" not in name:  # a new pass, in which there may be fewer calls
            for former in [n for n in recorded if n.partition("#")[0] == name]:
                del recorded[former]
        call = describe()
        if len(call.size) == 2:
            modulation = _share(call, getattr(module, "modulation_scale", 1))
            recorded[name] = Sampling(call.locations, call.regular, modulation, call.size)

    with named_calls(model, record):
        yield recorded


def _share(call: SampledCall, scale: float) -> Tensor | None:
    """The modulation as numbers in [0, 1]."""
    if call.modulation is None:
        return None
    modulation = call.modulation.float() / scale
    if modulation.numel() == 0:
        return modulation
    if call.weighs or not 0 <= modulation.min() <= modulation.max() <= 1:
        modulation = modulation.nan_to_num().abs()
        modulation = modulation / modulation.amax().clamp(min=1e-12)
    return modulation


def points_in_image(
    sampling: Sampling, xy: tuple[float, float], image_size: tuple[int, int], index: int = 0
) -> SamplingPoints:
    """The sampling points of the output position nearest to a point of the image.

    A feature at index i is taken to lie at pixel i · stride of the network's input: that is where
    padded convolutions and poolings of odd kernel size are centred, the ResNets' for one.

    Args:
        sampling: the samples of one layer.
        xy: (x, y) in continuous image coordinates, pixel i covers [i, i + 1].
        image_size: height and width of the network's input, padding included.
        index: number of the image in the batch.

    Example:
        >>> model = nn.Sequential(DeformConv2dPack(3, 8, kernel_size=3, padding=1))
        >>> with record_sampling(model) as recorded:
        ...     _ = model(torch.randn(1, 3, 16, 16))
        >>> points_in_image(recorded["0"], (8.5, 8.5), image_size=(16, 16)).points.shape
        (1, 9, 2)
    """
    (row, column), center = _nearest_positions(sampling, np.array([xy]), image_size)
    points = sampling.locations[index][..., row, column]
    modulation = sampling.modulation
    return SamplingPoints(
        center=center[0],
        points=_to_image(sampling, points, image_size)[0],
        regular=_to_image(sampling, sampling.regular[None][..., row, column], image_size)[0, 0],
        modulation=None
        if modulation is None
        else modulation[index][..., row, column].cpu().numpy()[..., 0],
    )


def stacked_points(
    samplings: Sequence[Sampling],
    xy: tuple[float, float],
    image_size: tuple[int, int],
    index: int = 0,
) -> StackedPoints:
    """Follow the sampling points of one output position through stacked layers.

    Each point is carried on from the nearest output position of the layer before; points outside
    the input of their layer contribute nothing, and are left out.

    Args:
        samplings: those of the layers, the last one first, as :func:`record_sampling` gives them.
        xy, image_size, index: as in :func:`points_in_image`.

    Raises:
        ValueError: `samplings` is empty.

    Example:
        >>> layers = [DeformConv2dPack(3, 3, kernel_size=3, padding=1) for _ in range(2)]
        >>> with record_sampling(nn.Sequential(*layers)) as recorded:
        ...     _ = nn.Sequential(*layers)(torch.randn(1, 3, 16, 16))
        >>> last_first = [recorded["1"], recorded["0"]]
        >>> stacked = stacked_points(last_first, (8.5, 8.5), image_size=(16, 16))
        >>> [points.shape for points in stacked.points]
        [(9, 2), (81, 2)]
    """
    if not samplings:
        raise ValueError("samplings: expected those of at least one layer, got none")
    ends, weights, center = np.array([xy]), np.ones(1), None
    levels = []
    for sampling in samplings:
        (row, column), positions = _nearest_positions(sampling, ends, image_size)
        center = positions[0] if center is None else center
        points = sampling.locations[index][..., row, column].cpu()  # (G, K, 2, n)
        size = torch.tensor(sampling.input_size)[:, None]
        inside = ((points > -1) & (points < size)).all(dim=2).permute(2, 0, 1).numpy()
        ends = _to_image(sampling, points, image_size)[inside]
        modulation = np.ones(inside.shape)
        if sampling.modulation is not None:
            modulation = sampling.modulation[index][..., row, column].cpu().permute(2, 0, 1).numpy()
        weights = (weights[:, None, None] * modulation)[inside]
        levels.append((ends, weights ** (1 / (len(levels) + 1))))
    points, modulation = zip(*levels)
    return StackedPoints(center, points, modulation)


def _nearest_positions(
    sampling: Sampling, xy: np.ndarray, image_size: tuple[int, int]
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Rows and columns of the output positions nearest to points (n, 2), and their (x, y)."""
    size = np.array(sampling.locations.shape[-2:])
    stride = np.array(image_size) / size  # (y, x), pixels
    positions = np.round((xy[:, ::-1] - 0.5) / stride).astype(int).clip(0, size - 1)
    return tuple(positions.T), (positions * stride + 0.5)[:, ::-1]


def _to_image(sampling: Sampling, locations: Tensor, image_size: tuple[int, int]) -> np.ndarray:
    """Locations (G, K, 2, n), y and x in the input, as (n, G, K, 2), x and y in the image."""
    stride = np.array(image_size) / sampling.input_size
    return (locations.cpu().double().permute(3, 0, 1, 2).numpy() * stride + 0.5)[..., ::-1]


def draw_sampling_points(axes: Axes, sampling: SamplingPoints) -> ScalarMappable:
    """Draw sampling points over an image: a cross for the output position, small rings for the
    regular kernel, and from each a line to the dot where the layer samples instead.

    Args:
        axes: in continuous image coordinates.
        sampling: what to draw. Its modulation colours the dots; without one they are all as for 1.

    Returns:
        The colours, for a colour bar.

    Example:
        >>> points = np.random.rand(1, 9, 2)
        >>> sampling = SamplingPoints(np.array([0.5, 0.5]), points, points[0], modulation=None)
        >>> dots = draw_sampling_points(Figure().subplots(), sampling)
        >>> dots.get_offsets().shape
        (9, 2)
    """
    groups = len(sampling.points)
    starts = np.broadcast_to(sampling.regular, sampling.points.shape).reshape(-1, 2)
    ends = sampling.points.reshape(-1, 2)
    weights = np.ones(len(ends)) if sampling.modulation is None else sampling.modulation.ravel()
    outlined = dict(edgecolors="black", linewidths=0.8)

    axes.add_collection(LineCollection(np.stack([starts, ends], 1), colors="white", linewidths=0.9))
    axes.scatter(*sampling.regular.T, s=14, facecolors="none", edgecolors="white", linewidths=0.9)
    dots = axes.scatter(
        *ends.T, s=70 / groups**0.5, c=weights, cmap=COLOR_MAP, vmin=0, vmax=1, zorder=3, **outlined
    )
    axes.scatter(*sampling.center, s=90, c="lime", marker="P", zorder=4, **outlined)
    return dots


def draw_stacked_points(axes: Axes, stacked: StackedPoints) -> ScalarMappable:
    """Draw what the last of the levels samples over an image, and a cross for where it is seen.

    Args:
        axes: in continuous image coordinates.
        stacked: what to draw. Its modulation colours the dots.

    Returns:
        The colours, for a colour bar.

    Example:
        >>> stacked = StackedPoints(np.array([0.5, 0.5]), (np.random.rand(9, 2),), (np.ones(9),))
        >>> draw_stacked_points(Figure().subplots(), stacked).get_offsets().shape
        (9, 2)
    """
    points, modulation = stacked.points[-1], stacked.modulation[-1]
    order = np.argsort(modulation)  # The strongest are drawn last, on top.
    dots = axes.scatter(
        *points[order].T,
        s=max(16, 120 / len(points) ** 0.5),
        c=modulation[order],
        cmap=COLOR_MAP,
        vmin=0,
        vmax=1,
        edgecolors="black",
        linewidths=0.3,
    )
    axes.scatter(
        *stacked.center, s=90, c="lime", marker="P", edgecolors="black", linewidths=0.8, zorder=4
    )
    return dots
