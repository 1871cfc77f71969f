"""The equations of the deformable operators in plain PyTorch, written to be read.

Nothing here is fast. The compiled operators are tested against these functions in float64, and the
functions are differentiable any number of times.

Notation: R is the regular grid of the kernel's N taps, p0 an output position, pn the n-th tap,
Δpn its offset, Δmn its modulation, and q the integer positions of the input.

    (2) Y(p0)   = Σ_n W(pn) · X(p) · Δmn + b,   p = p0 + pn + Δpn
    (3) X(p)    = Σ_q G(q, p) · X(q)
    (4) G(q, p) = max(0, 1 - |q_y - p_y|) · max(0, 1 - |q_x - p_x|)

(4) has one factor for each dimension, here of two.

Sources: Deformable Convolutional Networks (arXiv 1703.06211), eq. (2)-(4); Deformable ConvNets v2
(arXiv 1811.11168), eq. (1), for the modulation. The other operators' equations are where they are
computed.
"""

import itertools
import math

import torch
from torch import Tensor
from torch.nn.modules.utils import _ntuple, _pair


def sample(input: Tensor, *p: Tensor) -> Tensor:
    """X(p) of equations (3) and (4), at any number of points, over any number of dimensions.

    Args:
        input: X, of shape (B, C, H, W), or with another number of dimensions after the channels.
        p: coordinates in pixels along each of these, here p_y and p_x, of shape (B, P).

    Returns:
        Tensor of shape (B, C, P). A point with a coordinate that is not finite, or that lies
        outside (-1, H) × (-1, W), gives 0 and passes no gradient.
    """
    size = input.shape[2:]
    if 0 in size:
        return input.new_zeros(*input.shape[:2], p[0].shape[1])
    # Comparisons with NaN are false, so `inside` also excludes what is not finite.
    inside = torch.stack([(p_d > -1) & (p_d < size_d) for p_d, size_d in zip(p, size)]).all(0)

    # G(q, p) vanishes unless q is one of the two integer positions around p in every dimension. At
    # integer coordinates, where (4) has a kink, this takes the derivative towards the higher one.
    around = []
    for p_d in p:
        p_d = torch.where(inside, p_d, 0.0)
        low = p_d.detach().floor()
        around.append([(low, 1 - (p_d - low)), (low + 1, p_d - low)])
    x_of_p = 0
    for corner in itertools.product(*around):
        exists, flat, g = inside, 0, 1
        for (q_d, g_d), size_d in zip(corner, size):
            exists = exists & (q_d >= 0) & (q_d < size_d)
            flat, g = flat * size_d + q_d, g * g_d
        g = torch.where(exists, g, 0.0)
        q = torch.where(exists, flat, 0.0).long()
        x_of_q = input.flatten(2).gather(2, q.unsqueeze(1).expand(-1, input.shape[1], -1))
        # g * x_of_q alone would not do: 0 · inf is NaN where the position does not exist.
        x_of_p = x_of_p + torch.where(exists.unsqueeze(1), g.unsqueeze(1) * x_of_q, 0.0)
    return x_of_p


def sample_with_border(input: Tensor, p_y: Tensor, p_x: Tensor) -> Tensor:
    """X(p) as RoI pooling defines it: the input's border goes on for one more pixel on every side.

    Arguments and result are those of :func:`sample`. A point outside [-1, H] × [-1, W], or with a
    coordinate that is not finite, gives 0 and passes no gradient; any other point is moved to the
    nearest one in [0, H - 1] × [0, W - 1], and no gradient passes through a coordinate that moved.
    """
    height, width = input.shape[-2:]
    inside = (p_y >= -1) & (p_y <= height) & (p_x >= -1) & (p_x <= width)

    def moved(p: Tensor, size: int) -> Tensor:
        p = torch.where(p < 0, 0.0, p)
        return torch.where(p >= size - 1, size - 1.0, p)

    nowhere = -2.0  # `sample` takes this to be outside.
    p_y = torch.where(inside, moved(p_y, height), nowhere)
    p_x = torch.where(inside, moved(p_x, width), nowhere)
    return sample(input, p_y, p_x)


def deform_conv_nd(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Equation (2) over any number of dimensions.

    Arguments and result are those of :func:`mmdcn.ops.deform_conv2d`, and of its counterparts for
    one and three dimensions. The arguments are not checked.
    """
    batch, channels, *size = input.shape
    out_channels, channels_per_group, *kernel = weight.shape
    out_size = offset.shape[2:]
    rank, taps, pixels = len(size), math.prod(kernel), math.prod(out_size)
    groups = channels // channels_per_group
    deform_groups = offset.shape[1] // (rank * taps)
    to_each = _ntuple(rank)

    # p0 + pn, of shape (rank, taps, pixels), for all output positions and taps in row-major order.
    def positions(lengths: list[int]) -> Tensor:
        axes = [torch.arange(n, dtype=offset.dtype, device=offset.device) for n in lengths]
        return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)

    def per_axis(numbers: int | tuple[int, ...]) -> Tensor:
        return offset.new_tensor(to_each(numbers)).unsqueeze(1)

    p0 = positions(out_size) * per_axis(stride) - per_axis(padding)
    pn = positions(kernel) * per_axis(dilation)
    # p = p0 + pn + Δpn, of shape (batch, deform_groups, rank, taps, pixels).
    delta = offset.reshape(batch, deform_groups, taps, rank, pixels).transpose(2, 3)
    p = p0.unsqueeze(1) + pn.unsqueeze(2) + delta

    # X(p) · Δmn: the channels of an offset group are sampled at the same points.
    sampled = sample(
        input.reshape(batch * deform_groups, channels // deform_groups, *size),
        *p.reshape(batch * deform_groups, rank, taps * pixels).unbind(1),
    ).view(batch, deform_groups, channels // deform_groups, taps, pixels)
    if mask is not None:
        sampled = sampled * mask.reshape(batch, deform_groups, 1, taps, pixels)

    # Σ_n W(pn) · …, over the taps and over the input channels of each group.
    output = torch.einsum(
        "bgcnp,gocn->bgop",
        sampled.reshape(batch, groups, channels_per_group, taps, pixels),
        weight.reshape(groups, out_channels // groups, channels_per_group, taps),
    ).reshape(batch, out_channels, *out_size)
    return output if bias is None else output + bias.view(-1, *[1] * rank)


# The public operators have their references under their own names.
deform_conv1d = deform_conv2d = deform_conv3d = deform_conv_nd


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    position_sensitive: bool = False,
) -> Tensor:
    """RoI pooling at moved bins: arguments and result as of :func:`mmdcn.ops.deform_roi_pool`.

    y(i, j) = Σ_p X(p0 + p + Δp_ij) / n_ij, over the n_ij points p of bin (i, j) of a RoI whose top
    left corner is p0 (arXiv 1703.06211, eq. (6)); where position_sensitive, X is another map for
    each bin.
    """
    batch, channels, height, width = input.shape
    bins_h, bins_w = _pair(output_size)
    bins = bins_h * bins_w
    if offset is None:
        offset = rois.new_zeros(len(rois), 2, bins_h, bins_w)
    groups = offset.shape[1] // 2

    # X, of shape (batch, groups, maps, channels of a group, height, width): a map for each bin, or
    # one for all.
    if position_sensitive:
        channels //= bins
        maps = input.reshape(batch, groups, channels // groups, bins, height, width).transpose(2, 3)
    else:
        maps = input.reshape(batch, groups, 1, channels // groups, height, width)

    def bin_points(start: Tensor, end: Tensor, number: int, delta: Tensor) -> Tensor:
        """The points of bins along one dimension, from the bins' offsets (groups, number, …)."""
        length = (end - start) / number
        # If no number is given, there are as many points as pixels. A length that is NaN gives 0,
        # and so may one that is infinite, as no point of it would be finite.
        adaptive = min(math.ceil(length), 2**24) if 0 < length < math.inf else 0
        points = sampling_ratio if sampling_ratio > 0 else adaptive
        bin = torch.arange(number, dtype=rois.dtype, device=rois.device).unsqueeze(1)
        point = torch.arange(points, dtype=rois.dtype, device=rois.device) + 0.5
        # Where the length is infinite, no point is finite, wherever offsets move it; multiplied by
        # it, a gradient of zero would be NaN.
        extent = torch.where(length.isfinite(), end - start, 0.0)
        first = start + gamma * extent * delta + bin * length
        return first + point * length / max(points, 1)

    if len(rois) == 0:  # The empty result hangs together with what it is differentiated for.
        return input.new_zeros(0, channels, bins_h, bins_w) + 0 * (input.sum() + offset.sum())
    pooled = []
    for roi, delta in zip(rois.detach(), offset):
        # The coordinates are in pixels of the features, whose centres are at whole numbers.
        x1, y1, x2, y2 = roi[1:] * spatial_scale - 0.5
        delta_x, delta_y = delta.view(groups, 2, bins_h, bins_w).unbind(1)
        # (groups, bins_w, bins_h, points) and (groups, bins_h, bins_w, points).
        p_y = bin_points(y1, y2, bins_h, delta_y.transpose(1, 2).unsqueeze(-1)).transpose(1, 2)
        p_x = bin_points(x1, x2, bins_w, delta_x.unsqueeze(-1))
        count = max(p_y.shape[-1] * p_x.shape[-1], 1)
        p_y, p_x = torch.broadcast_tensors(p_y.unsqueeze(-1), p_x.unsqueeze(-2))

        own = maps[int(roi[0])]
        number = own.shape[1]  # the number of maps
        sampled = sample_with_border(
            own.flatten(0, 1),
            p_y.reshape(groups * number, -1),
            p_x.reshape(groups * number, -1),
        ).view(groups, number, channels // groups, bins // number, -1)
        mean = sampled.sum(-1) / count
        pooled.append(mean.transpose(1, 2).reshape(1, channels, bins_h, bins_w))
    return torch.cat(pooled)


def deform_aggregate(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    offset_scale: float,
    remove_center: bool,
) -> Tensor:
    """The sum that DCNv3 and DCNv4 compute in each group of channels, with scale s:

    Y(p0) = Σ_k m_k · X(p0 + s · (p_k + Δp_k)), where p0 is the middle of the kernel.

    Sources: InternImage (arXiv 2211.05778), eq. (2); Efficient Deformable ConvNets (arXiv
    2401.06197), eq. (1).

    Args:
        input: X, of shape (N, H, W, C).
        offset: Δp, of shape (N, Ho, Wo, groups, 2 · K): x then y of each tap, column by column.
        mask: m, of shape (N, Ho, Wo, groups, K).

    Returns:
        Tensor of shape (N, Ho, Wo, C).
    """
    batch, out_h, out_w, groups, _ = offset.shape
    channels = input.shape[3] // groups

    def axis(length: int, d: int) -> tuple[Tensor, Tensor]:
        """p0 of every output position and p_k of every tap, along dimension d."""
        middle = dilation[d] * (kernel_size[d] - 1) // 2
        position = torch.arange(length, dtype=offset.dtype, device=offset.device)
        tap = torch.arange(kernel_size[d], dtype=offset.dtype, device=offset.device)
        return position * stride[d] - padding[d] + middle, tap * dilation[d] - middle

    (p0_y, tap_y), (p0_x, tap_x) = axis(out_h, 0), axis(out_w, 1)
    p_k = torch.cartesian_prod(tap_x, tap_y).view(-1, 2)
    if remove_center:
        center = len(p_k) // 2
        p_k = torch.cat([p_k[:center], p_k[center + 1 :]])
    delta = offset.unflatten(-1, (-1, 2))
    # (N, Ho, Wo, groups, K)
    p_y = p0_y.view(-1, 1, 1, 1) + offset_scale * (p_k[:, 1] + delta[..., 1])
    p_x = p0_x.view(-1, 1, 1) + offset_scale * (p_k[:, 0] + delta[..., 0])

    def by_group(points: Tensor) -> Tensor:
        return points.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1)

    sampled = sample(
        input.permute(0, 3, 1, 2).reshape(batch * groups, channels, *input.shape[1:3]),
        by_group(p_y),
        by_group(p_x),
    )
    modulated = sampled * by_group(mask).unsqueeze(1)
    total = modulated.view(batch, groups, channels, out_h, out_w, mask.shape[-1]).sum(-1)
    return total.permute(0, 3, 4, 1, 2).reshape(batch, out_h, out_w, groups * channels)


def dcnv3(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    group: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Tensor:
    """DCNv3. Arguments and result are those of :func:`mmdcn.ops.dcnv3`; nothing is checked."""
    geometry = (_pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation))
    offset, mask = offset.unflatten(3, (group, -1)), mask.unflatten(3, (group, -1))
    return deform_aggregate(input, offset, mask, *geometry, offset_scale, remove_center)


def dcnv4(
    input: Tensor,
    offset_mask: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    group: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Tensor:
    """DCNv4. Arguments and result are those of :func:`mmdcn.ops.dcnv4`; nothing is checked."""
    geometry = (_pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation))
    taps = geometry[0][0] * geometry[0][1] - remove_center
    points = offset_mask[..., : 3 * taps * group].unflatten(3, (group, 3 * taps))
    offset, mask = points.split([2 * taps, taps], dim=-1)
    return deform_aggregate(input, offset, mask, *geometry, offset_scale, remove_center)
