// The CPU kernels of deform_conv2d, equations (2)-(4) of the design and their gradients. Compiled
// once for each instruction set, with MMDCN_CPU_CAPABILITY naming the namespace.
//
// Forward: for a tile of output pixels and one tap at a time, whole channel vectors are sampled
// from the channels-last input into `columns` (pixels × C), and multiplied by that tap's packed
// weights into the tile of the output, all of it in the second-level cache.
//
// Backward, for a block of channels, again by tile and tap:
//   grad_columns = grad_output · Wᵀ            the gradient of W(pn)'s left neighbour, X(p)·Δm
//   grad_input(q)  += G(q, p) Δm grad_columns
//   grad_offset     = Δm Σ_c grad_columns Σ_q dG(q, p)/dp X(q)
//   grad_mask       =    Σ_c grad_columns Σ_q G(q, p) X(q)
//   grad_weight    += columnsᵀ · grad_output, with the columns sampled again
#include "deform_conv2d_kernel.h"

#include "matmul.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

template <typename A>
struct Sample {
  Corners<A, 2> corners;
  A modulation;
};

// Locates the sample of one output pixel, tap and offset group. `offset` and `mask` are those of
// the image. Returns false where the sample contributes nothing.
template <typename A>
inline bool locate(const DeformConv2dShape& shape, const A* offset, const A* mask, int64_t d,
                   int64_t tap, int64_t pixel, Sample<A>& sample) {
  const int64_t row = d * shape.taps() + tap;
  const int64_t pixels = shape.pixels();
  const A p[2] = {A(shape.y.base(pixel / shape.out_width, tap / shape.kernel_width)) +
                      offset[2 * row * pixels + pixel],
                  A(shape.x.base(pixel % shape.out_width, tap % shape.kernel_width)) +
                      offset[(2 * row + 1) * pixels + pixel]};
  const int64_t size[2] = {shape.height, shape.width};
  sample.modulation = mask ? mask[row * pixels + pixel] : A(1);
  return sample.corners.locate(p, size);
}

// column[c] = Δm Σ_q G(q, p) X(q)[c] for `count` channels from `x` on.
template <typename T, typename A>
inline void blend(const Sample<A>& sample, const T* x, int64_t channels, int64_t count, A* column) {
  const T* corner[4];
  A weight[4];
  int existing = 0;
  for (int q = 0; q < 4; ++q) {
    if (sample.corners.position[q] < 0) continue;
    corner[existing] = x + sample.corners.position[q] * channels;
    weight[existing++] = sample.modulation * sample.corners.weight[q];
  }
  const int64_t whole = count - count % kLanes<A>;
  if (existing == 4) {
    for (int64_t c = 0; c < whole; c += kLanes<A>) {
      store_register(column + c, weight[0] * load_register(corner[0] + c) +
                                     weight[1] * load_register(corner[1] + c) +
                                     weight[2] * load_register(corner[2] + c) +
                                     weight[3] * load_register(corner[3] + c));
    }
  } else {
    for (int64_t c = 0; c < whole; c += kLanes<A>) {
      register_t<A> sum = {};
      for (int q = 0; q < existing; ++q) sum += weight[q] * load_register(corner[q] + c);
      store_register(column + c, sum);
    }
  }
  for (int64_t c = whole; c < count; ++c) {
    A sum = 0;
    for (int q = 0; q < existing; ++q) sum += weight[q] * load(corner[q] + c);
    column[c] = sum;
  }
}

template <typename A>
inline void fill_zero(A* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = 0;
}

// Rows of channels lie this far apart in scratch memory: an odd number of cache lines, so that the
// rows of a register block do not compete for the same cache set.
template <typename A>
inline int64_t row_stride(int64_t channels) {
  const int64_t line = 64 / static_cast<int64_t>(sizeof(A));
  return ((channels + line - 1) / line | 1) * line;
}

template <typename T, typename A = accumulator_t<T>>
void forward(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors, int64_t begin,
             int64_t end, A* scratch) {
  const int64_t pixels = shape.pixels();
  const int64_t tiles = (pixels + kForwardTile - 1) / kForwardTile;
  const int64_t stride = row_stride<A>(shape.channels);
  const int64_t out_channels = shape.group_out_channels();
  const int64_t padded_out = padded<A>(out_channels);
  const int64_t tile_stride = shape.groups * padded_out;
  const int64_t weight_stride = packed_size<A>(shape.group_channels(), out_channels);
  const int64_t part = shape.deform_group_channels();
  A* columns = scratch;
  A* tile = scratch + kForwardTile * stride;

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / tiles;
    const int64_t first = unit % tiles * kForwardTile;
    const int64_t count = pixels - first < kForwardTile ? pixels - first : kForwardTile;
    const T* input = tensors.input + image * shape.height * shape.width * shape.channels;
    const int64_t samples = image * shape.deform_groups * shape.taps() * pixels;
    const A* offset = tensors.offset + 2 * samples;
    const A* mask = tensors.mask ? tensors.mask + samples : nullptr;

    for (int64_t i = 0; i < count; ++i) {
      for (int64_t g = 0; g < shape.groups; ++g) {
        A* row = tile + i * tile_stride + g * padded_out;
        fill_zero(row, padded_out);
        if (tensors.bias == nullptr) continue;
        for (int64_t o = 0; o < out_channels; ++o) row[o] = tensors.bias[g * out_channels + o];
      }
    }
    for (int64_t tap = 0; tap < shape.taps(); ++tap) {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t d = 0; d < shape.deform_groups; ++d) {
          A* column = columns + i * stride + d * part;
          Sample<A> sample;
          if (locate(shape, offset, mask, d, tap, first + i, sample)) {
            blend(sample, input + d * part, shape.channels, part, column);
          } else {
            fill_zero(column, part);
          }
        }
      }
      for (int64_t g = 0; g < shape.groups; ++g) {
        const A* weight = tensors.weight + (g * shape.taps() + tap) * weight_stride;
        multiply<A>(count, out_channels, shape.group_channels(),
                    columns + g * shape.group_channels(), stride, 1,
                    packed(weight, shape.group_channels()), tile + g * padded_out, tile_stride);
      }
    }
    T* output =
        tensors.output + image * shape.out_channels * pixels + first * tensors.output_pixel_stride;
    for (int64_t g = 0; g < shape.groups; ++g) {
      for (int64_t o = 0; o < out_channels; ++o) {
        T* target = output + (g * out_channels + o) * tensors.output_channel_stride;
        for (int64_t i = 0; i < count; ++i) {
          store(target + i * tensors.output_pixel_stride,
                tile[i * tile_stride + g * padded_out + o]);
        }
      }
    }
  }
}

template <typename A>
int64_t forward_scratch(const DeformConv2dShape& shape) {
  return kForwardTile *
         (row_stride<A>(shape.channels) + shape.groups * padded<A>(shape.group_out_channels()));
}

// What one sample sends back for `count` channels: adds to the gradient of the input, recomputes
// the column, and returns in `dots` Σ_c grad_column[c] X(q)[c] for each corner q.
template <typename T, typename A>
inline void blend_backward(const Sample<A>& sample, const T* x, int64_t channels, int64_t count,
                           const A* grad_column, A* grad_input, A* column, A (&dots)[4]) {
  const int64_t whole = count - count % kLanes<A>;
  if (column) fill_zero(column, count);
  for (int q = 0; q < 4; ++q) {
    dots[q] = 0;
    if (sample.corners.position[q] < 0) continue;
    const int64_t start = sample.corners.position[q] * channels;
    const T* x_q = x + start;
    const A weight = sample.modulation * sample.corners.weight[q];
    register_t<A> sum = {};
    for (int64_t c = 0; c < whole; c += kLanes<A>) {
      const register_t<A> value = load_register(x_q + c);
      const register_t<A> gradient = load_register(grad_column + c);
      sum += value * gradient;
      if (column) store_register(column + c, load_register(column + c) + weight * value);
      if (grad_input) {
        A* target = grad_input + start + c;
        store_register(target, load_register(target) + weight * gradient);
      }
    }
    for (int lane = 0; lane < kLanes<A>; ++lane) dots[q] += sum[lane];
    for (int64_t c = whole; c < count; ++c) {
      const A value = load(x_q + c);
      dots[q] += value * grad_column[c];
      if (column) column[c] += weight * value;
      if (grad_input) grad_input[start + c] += weight * grad_column[c];
    }
  }
}

template <typename T, typename A = accumulator_t<T>>
void backward(const DeformConv2dShape& shape, const BackwardTensors<T>& tensors,
              const ChannelBlock* blocks, int64_t block_index, A* scratch) {
  const ChannelBlock& block = blocks[block_index];
  const int64_t pixels = shape.pixels();
  const int64_t channels = block.end - block.begin;
  const int64_t out_channels = shape.group_out_channels();
  const int64_t padded_out = padded<A>(out_channels);
  const int64_t out_stride = row_stride<A>(padded_out);
  const int64_t stride = row_stride<A>(padded<A>(channels));
  const int64_t weight_stride = packed_size<A>(out_channels, channels);
  const int64_t part = shape.deform_group_channels();
  const int64_t span = tensors.pixel_end - tensors.pixel_begin;
  A* grad_tile = scratch;
  A* grad_columns = grad_tile + kBackwardTile * out_stride;
  A* columns = tensors.grad_weight ? grad_columns + kBackwardTile * stride : nullptr;
  const bool shifts = tensors.grad_offset || tensors.grad_mask;

  for (int64_t first = tensors.pixel_begin; first < tensors.pixel_end; first += kBackwardTile) {
    const int64_t rest = tensors.pixel_end - first;
    const int64_t count = rest < kBackwardTile ? rest : kBackwardTile;
    for (int64_t i = 0; i < count; ++i) {
      const T* source =
          tensors.grad_output + (first + i) * shape.out_channels + block.group * out_channels;
      A* target = grad_tile + i * out_stride;
      for (int64_t o = 0; o < out_channels; ++o) target[o] = load(source + o);
      fill_zero(target + out_channels, padded_out - out_channels);
    }
    for (int64_t tap = 0; tap < shape.taps(); ++tap) {
      fill_zero(grad_columns, count * stride);
      multiply<A>(count, channels, out_channels, grad_tile, out_stride, 1,
                  packed(tensors.weight + block.weight_begin + tap * weight_stride, out_channels),
                  grad_columns, stride);

      for (int64_t d = block.begin / part; d * part < block.end; ++d) {
        const int64_t begin = d * part > block.begin ? d * part : block.begin;
        const int64_t end = (d + 1) * part < block.end ? (d + 1) * part : block.end;
        const int64_t row = d * shape.taps() + tap;
        A* part_sums = nullptr;
        if (!owns_deform_group(shape, block, d)) {
          const int64_t index = partial_index(shape, block, block_index, d);
          part_sums = tensors.partial + (index * shape.taps() + tap) * 3 * span;
        }
        for (int64_t i = 0; i < count; ++i) {
          const int64_t pixel = first + i;
          const int64_t column_begin = i * stride + (begin - block.begin);
          A* column = columns ? columns + column_begin : nullptr;
          A gradient[3] = {0, 0, 0};  // of y, x and the modulation
          Sample<A> sample;
          if (locate(shape, tensors.offset, tensors.mask, d, tap, pixel, sample)) {
            A dots[4];
            blend_backward(sample, tensors.input + begin, shape.channels, end - begin,
                           grad_columns + column_begin,
                           tensors.grad_input ? tensors.grad_input + begin : nullptr, column, dots);
            for (int q = 0; q < 4; ++q) {
              gradient[0] += sample.corners.weight_gradient[0][q] * dots[q];
              gradient[1] += sample.corners.weight_gradient[1][q] * dots[q];
              gradient[2] += sample.corners.weight[q] * dots[q];
            }
            gradient[0] *= sample.modulation;
            gradient[1] *= sample.modulation;
          } else if (column) {
            fill_zero(column, end - begin);
          }
          if (!shifts) continue;
          if (part_sums) {
            for (int k = 0; k < 3; ++k) {
              part_sums[k * span + pixel - tensors.pixel_begin] = gradient[k];
            }
          } else {
            if (tensors.grad_offset) {
              tensors.grad_offset[2 * row * pixels + pixel] = gradient[0];
              tensors.grad_offset[(2 * row + 1) * pixels + pixel] = gradient[1];
            }
            if (tensors.grad_mask) tensors.grad_mask[row * pixels + pixel] = gradient[2];
          }
        }
      }
      if (columns) {
        multiply<A>(channels, out_channels, count, columns, 1, stride,
                    row_major(grad_tile, out_stride),
                    tensors.grad_weight + (block.begin * shape.taps() + tap) * padded_out,
                    shape.taps() * padded_out);
      }
    }
  }
}

template <typename A>
int64_t backward_scratch(const DeformConv2dShape& shape, int64_t block_channels) {
  return kBackwardTile * (row_stride<A>(padded<A>(shape.group_out_channels())) +
                          2 * row_stride<A>(padded<A>(block_channels)));
}

}  // namespace

template <typename T>
DeformConv2dKernels<T> deform_conv2d_kernels() {
  using A = accumulator_t<T>;
  return {padded<A>,           packed_size<A>, pack<T, A>, forward_scratch<A>,
          backward_scratch<A>, forward<T>,     backward<T>};
}

template DeformConv2dKernels<double> deform_conv2d_kernels<double>();
template DeformConv2dKernels<float> deform_conv2d_kernels<float>();
template DeformConv2dKernels<Half> deform_conv2d_kernels<Half>();
template DeformConv2dKernels<BFloat16> deform_conv2d_kernels<BFloat16>();

}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
