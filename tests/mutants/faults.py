"""The faults that `make mutants` plants, one at a time."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
    """A change of a file, which some test must notice.

    Attributes:
        file: below mmdcn/.
        old: the text that is replaced, which is in the file exactly once.
        breaks: what is wrong then.
        tests: which should notice; those of the whole folder are run if they do not.
        objects: of the objects to compile, those with this in their names; all that include the
            file by default. The linker takes any object's copy of a function of a header.
    """

    name: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]
    objects: str = ""


CONV = ("tests/ops/test_deform_conv.py",)
ND = ("tests/ops/test_deform_conv_nd.py",)
AGGREGATE = ("tests/ops/test_deform_aggregate.py",)
POOL = ("tests/ops/test_deform_roi_pool.py",)
GUARDED = ("tests/sanitizers/test_guard_pages.py",)
COMPILED = ("tests/ops/test_compiled_calls.py",)
INPUTS = ("tests/ops/test_contract_inputs.py",)
CUDA_CONV = ("tests/cuda/test_deform_conv.py",)
CUDA_AGGREGATE = ("tests/cuda/test_deform_aggregate.py",)
CUDA_POOL = ("tests/cuda/test_deform_roi_pool.py",)

_SAMPLING, _AGGREGATE = "csrc/sampling.h", "csrc/cpu/deform_aggregate/kernel.cpp"
_LOCATOR, _POOL = "csrc/cpu/deform_aggregate/locator.h", "csrc/cpu/deform_roi_pool/kernel.cpp"
_BINS, _ND_FORWARD = "csrc/deform_roi_pool_shape.h", "csrc/cpu/deform_conv_nd/forward_pass.h"
_ND_BACK = "csrc/cpu/deform_conv_nd/backward_pass.h"
_ND_BATCH = "csrc/cpu/deform_conv_nd/operator.cpp"
_CONV = "csrc/cpu/deform_conv2d/"
_FORWARD = "deform_conv2d_forward"
_CUDA = "csrc/cuda/"

# One line for each would be four times as long.
# fmt: off
FAULTS = [
    # ------------------------------------------------------------------ the mathematics of sampling
    Fault("reaches-border", _SAMPLING, "p > coord_t(-1) && p < coord_t(size)",
          "p >= coord_t(0) && p < coord_t(size)",
          "a sample between -1 and 0 contributes nothing", AGGREGATE, "deform_aggregate"),
    Fault("reaches-last", _SAMPLING, "p < coord_t(size);", "p < coord_t(size - 1);",
          "a sample behind the last pixel contributes nothing", AGGREGATE, "deform_aggregate"),
    Fault("reaches-nan", _SAMPLING, "return p > coord_t(-1) && p < coord_t(size);",
          "return !(p <= coord_t(-1) || p >= coord_t(size));",
          "a coordinate that is NaN is converted to an integer", AGGREGATE, "deform_aggregate"),
    Fault("split-rounds-up", _SAMPLING, "low -= coord_t(low) > p ? 1 : 0;", "",
          "a coordinate just below an integer has a negative fraction",
          ("tests/csrc", *AGGREGATE), "deform_aggregate"),
    Fault("exists-one-more", _SAMPLING,
          "static_cast<unsigned_t>(position) < static_cast<unsigned_t>(size)",
          "static_cast<unsigned_t>(position) <= static_cast<unsigned_t>(size)",
          "one row beyond the image is read", AGGREGATE, "deform_aggregate"),
    Fault("slope-sign", _SAMPLING, "return high ? coord_t(1) : coord_t(-1);",
          "return high ? coord_t(-1) : coord_t(1);", "gradients of RoI offsets have the other sign",
          POOL, "deform_roi_pool"),
    Fault("pool-border-held", _SAMPLING, "held[d] = p[d] < coord_t(0) || p[d] >= last;",
          "held[d] = p[d] < coord_t(0);",
          "a sample that is clamped at the far border has a gradient", POOL, "deform_roi_pool"),
    # ------------------------------------------------------------------ rows of channels
    Fault("missing-corner", "csrc/cpu/row_corners.h", "(y1 | x0) < 0 ? none + 2 * step",
          "y1 < 0 ? none + 2 * step", "a corner to the left of the image is read", AGGREGATE,
          "deform_aggregate"),
    Fault("weight-of-corner", "csrc/cpu/row_corners.h", "weight[1][i] = low_y * high_x;",
          "weight[1][i] = low_y * low_x;", "a corner has another's weight", AGGREGATE,
          "deform_aggregate"),
    Fault("weights-unmodulated", "csrc/cpu/row_corners.h",
          "const A high_y = samples.modulation[i] * samples.weight_y(1, i);",
          "const A high_y = samples.weight_y(1, i);", "the lower corners are not modulated",
          AGGREGATE, "deform_aggregate"),
    Fault("gradient-of-y-sign", "csrc/cpu/row_gradients.h",
          "gradient[0] = modulation * (lower - upper);",
          "gradient[0] = modulation * (upper - lower);", "the gradient of y has the other sign",
          AGGREGATE, "deform_aggregate"),
    Fault("gradient-of-x-unmodulated", "csrc/cpu/row_gradients.h",
          "gradient[1] = modulation * (low_y", "gradient[1] = (low_y",
          "the gradient of x is not modulated", AGGREGATE, "deform_aggregate"),
    Fault("gradient-of-nothing", "csrc/cpu/row_gradients.h",
          "(low & last) != 0 ? dots.of[3][i] : A(0)};", "dots.of[3][i]};",
          "a corner that does not exist has a part in the gradient of coordinates", CONV,
          "deform_conv2d_backward"),
    Fault("ragged-tail-of-gradients", "csrc/cpu/row_gradients.h",
          "if constexpr (wants_input) sample.grad_corner[q][c] += sample.weight[q] * gradient;", "",
          "channels beyond the last whole register have no gradient", AGGREGATE,
          "deform_aggregate"),
    Fault("ragged-tail-of-sums", "csrc/cpu/row_sums.h",
          "start ? start[c] : A(0)));", "A(0)));",
          "the bias, or the taps before, are lost in the channels beyond the last register",
          (*AGGREGATE, *CONV), ""),
    Fault("dot-index", "csrc/cpu/row_gradients.h", "store_some(at.dots + q * at.quantity + first,",
          "store_some(at.dots + q * at.quantity + begin,",
          "the dot products of the samples after the first few land on theirs", AGGREGATE,
          "deform_aggregate"),
    # ------------------------------------------------------------------ aggregation on the CPU
    Fault("wrong-group", _AGGREGATE, "offset + group * tensors_.offset_layout.group_stride",
          "offset + 0 * group", "every group has the offsets of the first", AGGREGATE),
    Fault("mask-gradient-dropped", _AGGREGATE,
          "copy_few(gradients_->of[2] + j * taps, taps, tensors_.grad_mask + first);",
          "std::fill_n(tensors_.grad_mask + first, taps, A(0));",
          "modulations have no gradient", AGGREGATE),
    Fault("offset-order", _AGGREGATE, "scale * gradients_->of[1][s];",
          "scale * gradients_->of[0][s];", "x has the gradient of y", AGGREGATE),
    Fault("offset-scale-lost", _AGGREGATE, "const A scale = static_cast<A>(shape_.offset_scale);",
          "const A scale = 1;", "the gradient of offsets is not scaled", AGGREGATE),
    Fault("batches-of-taps", _AGGREGATE, "batch.tap > 0 ? sums : nullptr, sums);",
          "nullptr, sums);", "of a large kernel's taps only the last batch counts", AGGREGATE),
    Fault("second-image", _AGGREGATE, "const int64_t image = pixel / shape_.pixels();",
          "const int64_t image = 0 * pixel;", "every image is the first", AGGREGATE),
    Fault("scratch-too-small", _AGGREGATE, "sinks_(arena.take<A>(4 * shape.group_channels())),",
          "sinks_(arena.take<A>(shape.group_channels())),", "scratch memory is overrun",
          (*AGGREGATE, *GUARDED)),
    Fault("strip-not-cleared", _AGGREGATE, "clear_row(block, strip, reached.last++);",
          "++reached.last;", "what a strip adds to the next is added to what was in memory",
          AGGREGATE),
    Fault("strip-reach", _AGGREGATE, "std::min(low + 2, height)", "std::min(low + 1, height)",
          "the lower corners of samples in the next strip are forgotten", AGGREGATE),
    Fault("strip-not-added", "csrc/cpu/deform_aggregate/operator.cpp",
          "add_rows(strip.own.last, strip.reached[number].last);", "",
          "what a strip adds to the next is lost", AGGREGATE, "deform_aggregate"),
    Fault("strip-of-another-image", "csrc/cpu/deform_aggregate/operator.cpp",
          "const int64_t first = target.image * of_image_;", "const int64_t first = 0;",
          "what strips add to each other is that of the first image", AGGREGATE,
          "deform_aggregate"),
    Fault("tap-origin", _LOCATOR, "at_y = row % y.out_size,", "at_y = row,",
          "the rows of later images lie outside", AGGREGATE),
    Fault("scale-of-taps", _LOCATOR, "of.origin_x[s] + scale * (of.tap_x[s] + of.offset[2 * s])",
          "of.origin_x[s] + of.tap_x[s] + scale * of.offset[2 * s]",
          "the kernel itself is not scaled along x", AGGREGATE),
    Fault("thread-shares-output", _AGGREGATE, "const int64_t row = number * all +",
          "const int64_t row = 0 * number * all +", "the blocks of a group write to the same sums",
          AGGREGATE),
    # ------------------------------------------------------------------ RoI pooling on the CPU
    Fault("pool-gradient-not-cleared", _POOL,
          "tensors.grad_offset[roi_offset_index(shape, r, block.group, d, bin)] = 0;", "(void)d;",
          "bins outside the image have whatever was in memory as gradient", (*GUARDED, *POOL)),
    Fault("pool-rows-kept", _POOL, "if (tensors.offset || x == 0)", "if (x == 0)",
          "bins side by side have the rows of the first", POOL),
    Fault("pool-image", _POOL, "if (image_of_roi(shape, tensors.rois + 5 * r) != image) continue;",
          "if (image_of_roi(shape, tensors.rois + 5 * r) < image) continue;",
          "boxes add to the gradients of other images", POOL),
    Fault("pool-many-pixels", _POOL, "if (pixels.count == kMostRows) flush();",
          "if (pixels.count == kMostRows) pixels.count = 0;",
          "the gradients of bins of more than 64 pixels are lost", POOL),
    Fault("pool-slope", _POOL, "row.weight * column.slope;", "column.slope;",
          "the gradient along x is not weighted", POOL),
    Fault("pool-half-pixel", _BINS, "start = roi[2 - d] * scale - coord_t(0.5);",
          "start = roi[2 - d] * scale;", "boxes begin half a pixel too far", POOL,
          "deform_roi_pool"),
    Fault("pool-offset-order", _BINS, "* 2 + 1 - d)", "* 2 + d)", "x and y are swapped", POOL,
          "deform_roi_pool"),
    Fault("pool-samples", _BINS, "count += static_cast<coord_t>(count) < pixels ? 1 : 0;", "",
          "a bin of 2.5 pixels has two samples", POOL, "deform_roi_pool"),
    Fault("pool-listed-twice", _BINS, "list[k].slope += slope;", "",
          "only the first sample of a pixel counts in the gradient", POOL, "deform_roi_pool"),
    # ------------------------------------------------------------------ three dimensions on the CPU
    Fault("nd-bias", _ND_FORWARD, "(tensors_.bias ? tensors_.bias[o] : A(0))",
          "(tensors_.bias ? tensors_.bias[0] : A(0))",
          "all channels have the first one's bias", ND),
    Fault("nd-group-columns", _ND_FORWARD, "depth, columns_ + group * channels,",
          "depth, columns_,", "all groups multiply the first one's channels", ND),
    Fault("nd-planes", "csrc/cpu/deform_conv_nd/volume_blending.h",
          "return (q >> 2) * plane +", "return 0 * plane +",
          "the far plane of a volume is not sampled", ND),
    Fault("nd-added-column", _ND_BACK, "scatter<wants_input, Column::kAdded, wants_dots>",
          "scatter<wants_input, Column::kStored, wants_dots>",
          "the weight's gradient misses the near plane", ND),
    Fault("nd-weight-tap", _ND_BACK, "sums_ + (tap * width_ + column) * sum_row_, sum_row_);",
          "sums_ + column * sum_row_, sum_row_);", "all taps add to the first one's gradient", ND),
    Fault("nd-next-tap", _ND_BACK, "weight = next;", "(void)next;",
          "all taps are multiplied by the first one's weights", ND),
    Fault("nd-shares", _ND_BATCH, "for (int64_t k = 1; k < shares; ++k)",
          "for (int64_t k = 1; k < shares - 1; ++k)",
          "the weight's gradient misses the last images", ND),
    # ------------------------------------------------------------------ two dimensions on the CPU
    Fault("conv-missing-window", _CONV + "forward_depthwise.h", "if (missing_) replace_missing",
          "if (false) replace_missing", "samples outside the window read what lies there", CONV),
    Fault("conv-tile-first", _CONV + "tiles.h", "x = left + start % width;", "x = left;",
          "tiles begin at the left border", CONV, _FORWARD),
    Fault("conv-planar-border", _CONV + "corners.h",
          "down[i] = low_y < 0 ? 0 : low_y < height - 1 ? 1 : 0;",
          "down[i] = low_y < 0 ? 0 : 1;", "a row beyond the image is read", GUARDED, _FORWARD),
    Fault("conv-nowhere", _CONV + "plane_scatter.h",
          "if (samples.low_y[i] == samples.kNowhere) continue;", "",
          "a sample outside adds infinity times 0 to a pixel", INPUTS),
    Fault("conv-padding", "csrc/sampling.h", "position * stride - padding + tap * dilation",
          "position * stride - padding + tap", "kernels are not dilated", CONV,
          "deform_conv2d_forward"),
    Fault("nd-dilation", "csrc/cpu/deform_conv_nd/volume_samples.h",
          "tap % shape_.kernel[d] * shape_.axis[d].dilation", "tap % shape_.kernel[d]",
          "kernels are not dilated", ND),
    Fault("conv-grad-mask-aside", _CONV + "sample_gradients.h",
          "store_row(tensors_.grad_mask, row, 2, staged_mask_, skipped);", "",
          "modulations have no gradient", CONV),
    Fault("conv-tile-rotated", _CONV + "backward_kernel.cpp",
          "partial += (index - begin) * call_.tensors.partial_tile;",
          "partial += (k - begin) * call_.tensors.partial_tile;",
          "a block that begins in the middle leaves its sums at another tile's place", CONV,
          "deform_conv2d_backward"),
    Fault("conv-outputs-in-place", _CONV + "row_scatter.h", "(run.pixel + i) * tensors_",
          "(run.first + i) * tensors_", "every tile reads the gradients of the first", CONV,
          "deform_conv2d_backward"),
    Fault("conv-partial-order", _CONV + "backward_batch.h",
          "sum = first ? values[i] : sum + values[i];", "sum = values[i];",
          "of the blocks that share offsets only the last counts", CONV),
    Fault("conv-weights-kept", _CONV + "backward_batch.h",
          "ends || !plan_.kept)) {", "ends)) {",
          "large weights have the gradient of the last span only", CONV),
    Fault("conv-half-accumulates", _CONV + "backward_batch.h",
          "kept = !std::is_same_v<T, acc_t> || weight_bytes <= kKeptBytes;",
          "kept = weight_bytes <= kKeptBytes;",
          "half-precision sums are rounded after each span", CONV),
    # ------------------------------------------------------------------ the checks of direct calls
    Fault("unchecked-type", "csrc/tensors.h",
          "MMDCN_REQUIRE(grad_output.scalar_type() == input.scalar_type());", "",
          "a gradient of another type is read as it lies", COMPILED, "operator"),
    Fault("unchecked-size", "csrc/tensors.h",
          "MMDCN_REQUIRE(sizes_of(grad_output) == output_size);", "",
          "a gradient of another size is read beyond its end", COMPILED, "operator"),
    # ------------------------------------------------------------------ CUDA, as run on the host
    Fault("cuda-barrier", _CUDA + "deform_conv/scatter.h",
          "    if (!dots_wanted) continue;\n    ctx.sync();\n", "    if (!dots_wanted) continue;\n",
          "dot products are read before they are there", CUDA_CONV),
    Fault("cuda-first-barrier", _CUDA + "deform_conv/gather.h",
          "    ctx.sync();  // The previous samples have been read.\n", "",
          "samples are overwritten while they are read", CUDA_CONV),
    Fault("cuda-modulation", _CUDA + "deform_conv/scatter.h",
          "sample.modulation * by_coordinate[d]", "by_coordinate[d]",
          "the gradient of offsets is not modulated", CUDA_CONV),
    Fault("cuda-ragged", _CUDA + "deform_conv/samples.h", "exists = in_range < range.count;",
          "exists = true;", "pixels beyond the last have samples", CUDA_CONV),
    Fault("cuda-fixed-bias", _CUDA + "deform_conv/fixed_point.h",
          "std::ilogb(value) + 1 + kMagnitudeBias", "std::ilogb(value) - 40 + kMagnitudeBias",
          "sums in fixed point overflow", CUDA_CONV),
    Fault("cuda-aggregate-order", _CUDA + "deform_aggregate/backward.h",
          "scale * sample.modulation * by_coordinate[1]",
          "scale * sample.modulation * by_coordinate[0]", "x has the gradient of y",
          CUDA_AGGREGATE),
    Fault("cuda-aggregate-group", _CUDA + "deform_aggregate/backward.h",
          "shape.channels + point.group * channels;", "shape.channels;",
          "all groups have the first one's gradient of the output", CUDA_AGGREGATE),
    Fault("cuda-pool-reach", _CUDA + "deform_roi_pool/backward.h",
          "moved[i].y += row.slope * column.weight * dot;", "moved[i].y += row.slope * dot;",
          "the gradient along y is not weighted", CUDA_POOL),
    # ------------------------------------------------------------------ the functions in Python
    Fault("ops-bias-gradient", "ops/_registration.py",
          "grad_output.sum((0, *range(2, grad_output.dim())))",
          "grad_output[:1].sum((0, *range(2, grad_output.dim())))",
          "the bias has the gradient of the first image only", CONV),
    Fault("ops-output-mask", "ops/_registration.py",
          "output_mask = [wanted[i] for i in differentiated]",
          "output_mask = [True for i in differentiated]",
          "gradients are computed that nobody wants", COMPILED),
    Fault("ops-coordinates", "ops/_checks.py",
          "return torch.float64 if features == torch.float64 else torch.float32",
          "return torch.float32", "double precision has coordinates in single", CONV),
    Fault("ops-padded-channels", "ops/deform_aggregate.py",
          "padded = (channels + 7) // 8 * 8", "padded = channels",
          "channels that fill up DCNv4's offsets are refused", AGGREGATE),
]
