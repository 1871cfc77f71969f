// The CPU kernels of deform_conv_nd. Compiled once for each instruction set, with
// MMDCN_CPU_CAPABILITY naming the namespace.
//
// A tile of output pixels is sampled into columns, which have a row for each pixel, and the columns
// are multiplied by the weights.
#include "kernel.h"

#include "../../integers.h"
#include "../arena.h"
#include "../channel_rows.h"
#include "../matmul.h"
#include "../transpose.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// The size that a tile's columns have at most in the forward pass, unless one register block of
// pixels takes more, and the most pixels of a tile.
constexpr int64_t kColumnBytes = 512 << 10;
constexpr int64_t kMostPixels = 8 * kBlockRows;

// ------------------------------------------------------------------------------ images as rows

// Calls function(image, first, count) for the positions of each image within [begin, end), in
// chunks that stay in the first-level cache.
template <typename F>
inline void for_positions(int64_t positions, int64_t begin, int64_t end, const F& function) {
  constexpr int64_t chunk = 64;
  for (int64_t at = begin; at < end;) {
    const int64_t image = at / positions, first = at - image * positions;
    const int64_t count = smaller(smaller(chunk, positions - first), end - at);
    function(image, first, count);
    at += count;
  }
}

template <typename T, typename A = accumulator_t<T>>
void to_rows(const T* planes, int64_t channels, int64_t positions, int64_t begin, int64_t end,
             A* rows) {
  for_positions(positions, begin, end, [&](int64_t image, int64_t first, int64_t count) {
    transpose<A>(planes + image * channels * positions + first, positions, channels, count,
                 rows + (image * positions + first) * channels, channels);
  });
}

template <typename T, typename A = accumulator_t<T>>
void from_rows(const A* rows, int64_t channels, int64_t positions, int64_t begin, int64_t end,
               T* planes) {
  for_positions(positions, begin, end, [&](int64_t image, int64_t first, int64_t count) {
    transpose<A>(rows + (image * positions + first) * channels, channels, count, channels,
                 planes + image * channels * positions + first, positions);
  });
}

// ------------------------------------------------------------------------------ packed weights

// Packs a matrix of depth × columns, whose elements are element(k, j), into panels.
template <typename A, typename F>
inline void pack(int64_t depth, int64_t columns, const F& element, A* packed) {
  for (int64_t first = 0; first < columns; first += kPanelWidth<A>) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = first; j < first + kPanelWidth<A>; ++j) {
        *packed++ = j < columns ? element(k, j) : A(0);
      }
    }
  }
}

template <int R, typename A>
int64_t tap_packed_size(const DeformConvNdShape<R>& shape) {
  return mmdcn::packed_size<A>(shape.group_channels(), shape.group_out_channels());
}

template <int R, typename A>
int64_t packed_size(const DeformConvNdShape<R>& shape) {
  return shape.groups * shape.taps() * tap_packed_size<R, A>(shape);
}

template <int R, typename T, typename A = accumulator_t<T>>
void pack_weight(const DeformConvNdShape<R>& shape, const T* weight, int64_t begin, int64_t end,
                 A* packed) {
  const int64_t channels = shape.group_channels(), outs = shape.group_out_channels();
  const int64_t taps = shape.taps(), size = tap_packed_size<R, A>(shape);
  for (int64_t number = begin; number < end; ++number) {
    const int64_t group = number / taps, tap = number - group * taps;
    pack<A>(
        channels, outs,
        [&](int64_t c, int64_t o) {
          return A(load(weight + ((group * outs + o) * channels + c) * taps + tap));
        },
        packed + number * size);
  }
}

// Splits a range at the borders of groups of `channels` channels, and calls
// function(group, begin, end) for each group's share in order.
template <typename F>
inline void for_groups(const ChannelRange& range, int64_t channels, const F& function) {
  for (int64_t begin = range.begin; begin < range.end;) {
    const int64_t group = begin / channels;
    const int64_t end = smaller(range.end, (group + 1) * channels);
    function(group, begin, end);
    begin = end;
  }
}

template <int R, typename A>
int64_t range_packed_size(const DeformConvNdShape<R>& shape, const ChannelRange& range) {
  int64_t size = 0;
  for_groups(range, shape.group_channels(), [&](int64_t, int64_t begin, int64_t end) {
    size += shape.taps() * mmdcn::packed_size<A>(shape.group_out_channels(), end - begin);
  });
  return size;
}

// The packed weights are in order of the taps, and those of a tap in order of the groups.
template <int R, typename T, typename A = accumulator_t<T>>
void pack_range(const DeformConvNdShape<R>& shape, const T* weight, const ChannelRange& range,
                A* packed) {
  const int64_t channels = shape.group_channels(), outs = shape.group_out_channels();
  const int64_t taps = shape.taps();
  for (int64_t tap = 0; tap < taps; ++tap) {
    for_groups(range, channels, [&](int64_t group, int64_t begin, int64_t end) {
      const T* first = weight + (group * outs * channels + begin - group * channels) * taps + tap;
      pack<A>(
          outs, end - begin,
          [&](int64_t o, int64_t c) { return A(load(first + (o * channels + c) * taps)); }, packed);
      packed += mmdcn::packed_size<A>(outs, end - begin);
    });
  }
}

// ------------------------------------------------------------------------------ sampling

// The rows of a sample's corners, from channel `channel` on, with their weights times `modulation`.
template <typename A, int R>
inline WeightedRows<A> corner_rows(const Corners<A, R>& corners, A modulation, int64_t channels,
                                   int64_t channel) {
  WeightedRows<A> rows;
  for (int q = 0; q < corners.kCount; ++q) {
    if (corners.position[q] < 0) continue;
    rows.add(corners.position[q] * channels + channel, modulation * corners.weight[q]);
  }
  return rows;
}

// Samples a range's channels for one tap and output pixel into `columns`.
template <int R, typename A, typename Tensors>
inline void sample(const DeformConvNdShape<R>& shape, const Tensors& tensors,
                   const ChannelRange& range, int64_t tap, int64_t image, int64_t pixel,
                   A* columns) {
  const int64_t pixels = shape.pixels();
  const A* source = tensors.input + image * shape.positions() * shape.channels;
  for (int64_t c = 0; c < range.end - range.begin; ++c) columns[c] = 0;
  for_groups(range, shape.deform_group_channels(), [&](int64_t group, int64_t begin, int64_t end) {
    const int64_t number = group * shape.taps() + tap, first = image * shape.samples();
    Corners<A, R> corners;
    if (!shape.locate(pixel, number, tensors.offset + first * R * pixels, corners)) return;
    const A modulation = tensors.mask ? tensors.mask[(first + number) * pixels + pixel] : A(1);
    add_rows(source, corner_rows(corners, modulation, shape.channels, begin), end - begin,
             columns + begin - range.begin);
  });
}

// ------------------------------------------------------------------------------ forward

template <int R, typename A>
int64_t forward_tile(const DeformConvNdShape<R>& shape) {
  const int64_t fitting =
      kColumnBytes / (shape.taps() * shape.channels * static_cast<int64_t>(sizeof(A)));
  const int64_t blocks = smaller(fitting, kMostPixels) / kBlockRows;
  return blocks > 1 ? blocks * kBlockRows : kBlockRows;
}

// Elements of a row of products. Those of each group are padded to whole registers, and those of
// the next group are written over the padding.
template <int R, typename A>
int64_t product_row(const DeformConvNdShape<R>& shape) {
  return shape.out_channels + kLanes<A>;
}

template <int R, typename A>
struct ForwardScratch {
  A* columns;  // pixels × taps × channels
  A* product;  // pixels × product_row

  ForwardScratch(const DeformConvNdShape<R>& shape, Arena& arena)
      : columns(arena.take<A>(forward_tile<R, A>(shape) * shape.taps() * shape.channels)),
        product(arena.take<A>(forward_tile<R, A>(shape) * product_row<R, A>(shape))) {}
};

template <int R, typename A>
int64_t forward_scratch_bytes(const DeformConvNdShape<R>& shape) {
  Arena arena(nullptr);
  ForwardScratch<R, A>(shape, arena);
  return arena.used();
}

template <int R, typename A>
void forward(const DeformConvNdShape<R>& shape, const ConvNdForward<A>& tensors, int64_t begin,
             int64_t end, std::byte* memory) {
  const int64_t pixels = shape.pixels(), taps = shape.taps();
  const int64_t tile = forward_tile<R, A>(shape), row = taps * shape.channels;
  const int64_t channels = shape.group_channels(), outs = shape.group_out_channels();
  const int64_t weights = tap_packed_size<R, A>(shape), out_row = product_row<R, A>(shape);
  Arena arena(memory);
  const ForwardScratch<R, A> scratch(shape, arena);
  A* const columns = scratch.columns;
  A* const product = scratch.product;
  const ChannelRange all = {0, shape.channels};
  for (int64_t first = begin; first < end; first += tile) {
    const int64_t count = smaller(tile, end - first);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t image = (first + i) / pixels, pixel = first + i - image * pixels;
      for (int64_t tap = 0; tap < taps; ++tap) {
        sample(shape, tensors, all, tap, image, pixel, columns + i * row + tap * shape.channels);
      }
    }
    NoWork none;
    const Depth depth = {channels, taps, shape.channels, weights};
    for (int64_t group = 0; group < shape.groups; ++group) {
      const A* weight = tensors.weight + group * taps * weights;
      multiply<Order::kRows, Into::kSet>(count, outs, depth, columns + group * channels, row,
                                         packed(weight, channels), product + group * outs, out_row,
                                         none);
    }
    for (int64_t i = 0; i < count; ++i) {
      A* output = tensors.output + (first + i) * shape.out_channels;
      for (int64_t o = 0; o < shape.out_channels; ++o) {
        output[o] = product[i * out_row + o] + (tensors.bias ? tensors.bias[o] : A(0));
      }
    }
  }
}

// ------------------------------------------------------------------------------ backward

template <int R, typename A>
struct BackwardScratch {
  A* columns;  // pixels × channels of a range, each row padded by a register
  A* sums;     // channels of a range × padded Co/groups

  BackwardScratch(const DeformConvNdShape<R>& shape, int64_t channels, Arena& arena)
      : columns(arena.take<A>(kMostPixels * (channels + kLanes<A>))),
        sums(arena.take<A>(channels * padded<A>(shape.group_out_channels()))) {}
};

template <int R, typename A>
int64_t backward_scratch_bytes(const DeformConvNdShape<R>& shape, int64_t widest_range) {
  Arena arena(nullptr);
  BackwardScratch<R, A>(shape, widest_range, arena);
  return arena.used();
}

// Adds the gradients of one sample's channels [begin, end), given the gradient of the modulated
// sample: to that of the input, and into those of the offset and the modulation.
template <bool wants_sampling, int R, typename A>
inline void sample_backward(const DeformConvNdShape<R>& shape, const ConvNdBackward<A>& tensors,
                            int64_t image, int64_t pixel, int64_t number, int64_t begin,
                            int64_t end, const A* grad) {
  const int64_t pixels = shape.pixels(), first = image * shape.samples();
  const int64_t start = image * shape.positions() * shape.channels;
  const int64_t index = (first + number) * pixels + pixel;
  Corners<A, R> corners;
  const bool inside = shape.locate(pixel, number, tensors.offset + first * R * pixels, corners);
  A grad_position[R] = {}, grad_modulation = 0;
  if (inside) {
    const A modulation = tensors.mask ? tensors.mask[index] : A(1);
    const WeightedRows<A> rows = corner_rows(corners, modulation, shape.channels, begin);
    A products[corners.kCount];
    A* grad_image = tensors.grad_input ? tensors.grad_input + start : nullptr;
    add_rows_backward<wants_sampling>(tensors.input + start, rows, end - begin, grad, grad_image,
                                      products);
    if constexpr (wants_sampling) {
      const A* product = products;
      for (int q = 0; q < corners.kCount; ++q) {
        if (corners.position[q] < 0) continue;
        grad_modulation += corners.weight[q] * *product;
        for (int d = 0; d < R; ++d) grad_position[d] += corners.weight_gradient[d][q] * *product;
        ++product;
      }
      for (int d = 0; d < R; ++d) grad_position[d] *= modulation;
    }
  }
  if constexpr (wants_sampling) {
    if (tensors.grad_offset) {
      A* target = tensors.grad_offset + (first + number) * R * pixels + pixel;
      for (int d = 0; d < R; ++d) target[d * pixels] = grad_position[d];
    }
    if (tensors.grad_mask) tensors.grad_mask[index] = grad_modulation;
  }
}

template <int R, typename A>
void backward_data(const DeformConvNdShape<R>& shape, const ConvNdBackward<A>& tensors,
                   const ChannelRange& range, int64_t image, std::byte* memory) {
  const int64_t pixels = shape.pixels(), outs = shape.group_out_channels();
  const int64_t row = range.end - range.begin + kLanes<A>;
  const bool wants_sampling = tensors.grad_offset || tensors.grad_mask;
  Arena arena(memory);
  A* const columns = BackwardScratch<R, A>(shape, range.end - range.begin, arena).columns;
  for (int64_t first = 0; first < pixels; first += kMostPixels) {
    const int64_t count = smaller(kMostPixels, pixels - first);
    const A* grad_output = tensors.grad_output + (image * pixels + first) * shape.out_channels;
    const A* weight = tensors.weight;
    for (int64_t tap = 0; tap < shape.taps(); ++tap) {
      for_groups(range, shape.group_channels(), [&](int64_t group, int64_t begin, int64_t end) {
        multiply<Order::kRows, Into::kSet>(count, end - begin, outs, grad_output + group * outs,
                                           shape.out_channels, packed(weight, outs),
                                           columns + begin - range.begin, row);
        weight += mmdcn::packed_size<A>(outs, end - begin);
      });
      const auto scatter = [&](auto wanted) {
        for (int64_t i = 0; i < count; ++i) {
          for_groups(
              range, shape.deform_group_channels(), [&](int64_t group, int64_t begin, int64_t end) {
                sample_backward<decltype(wanted)::value>(shape, tensors, image, first + i,
                                                         group * shape.taps() + tap, begin, end,
                                                         columns + i * row + begin - range.begin);
              });
        }
      };
      if (wants_sampling) {
        scatter(std::true_type{});
      } else {
        scatter(std::false_type{});
      }
    }
  }
}

template <int R, typename T, typename A = accumulator_t<T>>
void backward_weight(const DeformConvNdShape<R>& shape, const ConvNdBackward<A>& tensors,
                     const ChannelRange& range, int64_t tap, T* grad_weight, std::byte* memory) {
  const int64_t pixels = shape.pixels(), all_pixels = shape.batch * pixels;
  const int64_t outs = shape.group_out_channels(), channels = shape.group_channels();
  const int64_t width = range.end - range.begin, sum_row = padded<A>(outs);
  Arena arena(memory);
  const BackwardScratch<R, A> scratch(shape, width, arena);
  A* const columns = scratch.columns;
  A* const sums = scratch.sums;
  for (int64_t i = 0; i < width * sum_row; ++i) sums[i] = 0;
  for (int64_t first = 0; first < all_pixels; first += kMostPixels) {
    const int64_t count = smaller(kMostPixels, all_pixels - first);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t image = (first + i) / pixels, pixel = first + i - image * pixels;
      sample(shape, tensors, range, tap, image, pixel, columns + i * width);
    }
    for_groups(range, channels, [&](int64_t group, int64_t begin, int64_t end) {
      const A* grad_output = tensors.grad_output + first * shape.out_channels + group * outs;
      const int64_t column = begin - range.begin;
      multiply<Order::kColumns, Into::kAdd>(end - begin, outs, count, columns + column, width,
                                            row_major(grad_output, shape.out_channels),
                                            sums + column * sum_row, sum_row);
    });
  }
  for (int64_t c = range.begin; c < range.end; ++c) {
    const int64_t group = c / channels, channel = c - group * channels;
    for (int64_t o = 0; o < outs; ++o) {
      store(grad_weight + ((group * outs + o) * channels + channel) * shape.taps() + tap,
            sums[(c - range.begin) * sum_row + o]);
    }
  }
}

}  // namespace

template <int R, typename T>
ConvNdKernel<R, T> deform_conv_nd() {
  using A = accumulator_t<T>;
  ConvNdKernel<R, T> kernel = {};
  kernel.to_rows = &to_rows<T>;
  kernel.from_rows = &from_rows<T>;
  kernel.packed_size = &packed_size<R, A>;
  kernel.pack_weight = &pack_weight<R, T>;
  kernel.forward_scratch_bytes = &forward_scratch_bytes<R, A>;
  kernel.forward = &forward<R, A>;
  kernel.range_packed_size = &range_packed_size<R, A>;
  kernel.pack_range = &pack_range<R, T>;
  kernel.backward_scratch_bytes = &backward_scratch_bytes<R, A>;
  kernel.backward_data = &backward_data<R, A>;
  kernel.backward_weight = &backward_weight<R, T>;
  return kernel;
}

template ConvNdKernel<3, double> deform_conv_nd<3, double>();
template ConvNdKernel<3, float> deform_conv_nd<3, float>();
template ConvNdKernel<3, Half> deform_conv_nd<3, Half>();
template ConvNdKernel<3, BFloat16> deform_conv_nd<3, BFloat16>();

}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
