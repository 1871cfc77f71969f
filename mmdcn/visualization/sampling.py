"""Where deformable layers sample, as points on the image."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from mmdcn.layers import DeformConv2dPack, ModulatedDeformConv2dPack

Size = int | tuple[int, int]


@dataclass(frozen=True)
class Sampling:
    """What one deformable layer sampled in one forward pass.

    Args:
        locations: (N, G, K, 2, Ho, Wo), see :func:`sampling_locations`.
        regular: (K, 2, Ho, Wo), the locations of the kernel without offsets.
        modulation: (N, G, K, Ho, Wo) in [0, 1]; None in a layer without.
        input_size: height and width of the layer's input.
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
    """

    center: np.ndarray
    points: np.ndarray
    regular: np.ndarray
    modulation: np.ndarray | None


def sampling_locations(
    offset: Tensor, kernel_size: Size, stride: Size = 1, padding: Size = 0, dilation: Size = 1
) -> Tensor:
    """Where a deformable convolution samples its input: p0 + pn + Δpn (arXiv 1703.06211, eq. 2).

    Args:
        offset: (N, 2 * G * K, Ho, Wo) with G offset groups and K = kh * kw taps; per group and tap
            y then x, in pixels of the input.
        kernel_size, stride, padding, dilation: of the convolution, int or (vertical, horizontal).

    Returns:
        (N, G, K, 2, Ho, Wo): per offset group and tap y and x, in pixels of the input, whole
        numbers at the centres of pixels.

    Raises:
        ValueError: the channels of ``offset`` do not divide into groups of 2 * K.
    """
    kernel_size, stride, padding, dilation = map(_pair, (kernel_size, stride, padding, dilation))
    batch, channels, *output_size = offset.shape
    num_taps = kernel_size[0] * kernel_size[1]
    if channels == 0 or channels % (2 * num_taps):
        raise ValueError(
            f"offset must have a multiple of {2 * num_taps} channels for a kernel of "
            f"{kernel_size[0]}×{kernel_size[1]}, got {channels}"
        )
    # Along each of the two axes: first tap of each output position, and the other taps after it.
    y, x = (
        (torch.arange(k) * d)[:, None] + torch.arange(n) * s - p
        for k, n, s, p, d in zip(kernel_size, output_size, stride, padding, dilation)
    )
    height, width = output_size
    y = y[:, None, :, None].expand(*kernel_size, height, width)
    x = x[None, :, None, :].expand(*kernel_size, height, width)
    regular = torch.stack([y, x], dim=2).reshape(num_taps, 2, height, width)
    return offset.reshape(batch, -1, num_taps, 2, height, width) + regular.to(offset)


@contextmanager
def record_sampling(model: nn.Module) -> Iterator[dict[str, Sampling]]:
    """Record what the deformable layers of a model sample while the context lasts.

    Yields:
        From each layer's name to its latest forward pass, in the order of execution.
    """
    recorded: dict[str, Sampling] = {}

    def record(name: str, layer: nn.Module, branch_input: Tensor, branch_output: Tensor) -> None:
        recorded.pop(name, None)
        recorded[name] = _sampling(layer, branch_input, branch_output.detach())

    def hook(name: str, layer: nn.Module):
        return layer.conv_offset.register_forward_hook(
            lambda _, inputs, output: record(name, layer, inputs[0], output)
        )

    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, DeformConv2dPack | ModulatedDeformConv2dPack)
    }
    handles = [hook(name, layer) for name, layer in layers.items()]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def points_in_image(
    sampling: Sampling, xy: tuple[float, float], image_size: tuple[int, int], index: int = 0
) -> SamplingPoints:
    """The sampling points of the output position nearest to a point of the image.

    A feature at index i is taken to lie at pixel i · stride of the network's input: that is where
    padded convolutions and poolings of odd kernel size are centred, the ResNets' for one.

    Args:
        sampling: of one layer.
        xy: (x, y) in continuous image coordinates, pixel i covers [i, i + 1].
        image_size: height and width of the network's input, padding included.
        index: of the image in the batch.
    """
    height, width = sampling.locations.shape[-2:]
    input_stride = np.array(image_size) / sampling.input_size  # (y, x), pixels
    output_stride = np.array(image_size) / [height, width]
    position = np.round((np.array(xy)[::-1] - 0.5) / output_stride).astype(int)
    row, column = np.clip(position, 0, [height - 1, width - 1])

    def to_image(locations: Tensor) -> np.ndarray:
        return (locations[..., row, column].double().numpy() * input_stride + 0.5)[..., ::-1]

    modulation = sampling.modulation
    return SamplingPoints(
        center=(np.array([row, column]) * output_stride + 0.5)[::-1],
        points=to_image(sampling.locations[index].cpu()),
        regular=to_image(sampling.regular.cpu()),
        modulation=None
        if modulation is None
        else modulation[index, ..., row, column].cpu().numpy(),
    )


def draw_sampling_points(axes: Axes, sampling: SamplingPoints) -> ScalarMappable:
    """Draw sampling points over an image: a cross for the output position, small rings for the
    regular kernel, and from each a line to the dot where the layer samples instead.

    Args:
        axes: in continuous image coordinates.
        sampling: what to draw. Its modulation colours the dots; without one they are all as for 1.

    Returns:
        The colours, for a colour bar.
    """
    groups = len(sampling.points)
    starts = np.broadcast_to(sampling.regular, sampling.points.shape).reshape(-1, 2)
    ends = sampling.points.reshape(-1, 2)
    weights = np.ones(len(ends)) if sampling.modulation is None else sampling.modulation.ravel()
    outlined = dict(edgecolors="black", linewidths=0.8)

    axes.add_collection(LineCollection(np.stack([starts, ends], 1), colors="white", linewidths=0.9))
    axes.scatter(*sampling.regular.T, s=14, facecolors="none", edgecolors="white", linewidths=0.9)
    dots = axes.scatter(
        *ends.T, s=70 / groups**0.5, c=weights, cmap="plasma", vmin=0, vmax=1, zorder=3, **outlined
    )
    axes.scatter(*sampling.center, s=90, c="lime", marker="P", zorder=4, **outlined)
    return dots


def _sampling(layer: nn.Module, branch_input: Tensor, branch_output: Tensor) -> Sampling:
    geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    num_taps = layer.kernel_size[0] * layer.kernel_size[1]
    offset, modulation = branch_output, None
    if isinstance(layer, ModulatedDeformConv2dPack):
        samples = layer.deform_groups * num_taps
        offset, mask = branch_output.split([2 * samples, samples], dim=1)
        modulation = mask.sigmoid().unflatten(1, (layer.deform_groups, num_taps))
    no_offset = torch.zeros_like(offset[:1, : 2 * num_taps])
    return Sampling(
        locations=sampling_locations(offset, *geometry),
        regular=sampling_locations(no_offset, *geometry)[0, 0],
        modulation=modulation,
        input_size=tuple(branch_input.shape[-2:]),
    )
