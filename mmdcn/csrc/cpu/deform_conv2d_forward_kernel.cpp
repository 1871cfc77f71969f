// The CPU forward kernel of deform_conv2d, equations (2)-(4) of the design. Compiled once for each
// instruction set, with MMDCN_CPU_CAPABILITY naming the namespace.
//
// For a tile of output pixels and one tap at a time, the input is sampled into `columns`
// (pixels × C), and multiplied by that tap's packed weights into the tile of the output, all of it
// in the second-level cache. Channels are sampled as vectors, from channels-last rows; where an
// offset group has few channels, one by one, over the pixels of the tile.
#include "deform_conv2d_samples.h"
#include "matmul.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

using ForwardTile = Tile<kForwardTile>;
template <typename A>
using ForwardSamples = Samples<A, kForwardTile>;

// Whether samples are rounded to bfloat16 and multiplied in pairs of channels.
template <typename T>
inline bool in_pairs(const DeformConv2dShape& shape) {
#ifdef __AVX512BF16__
  return std::is_same_v<T, BFloat16> && !is_planar(shape) &&
         (shape.groups == 1 || shape.group_channels() % 2 == 0);
#else
  (void)shape;
  return false;
#endif
}

inline int64_t pairs(int64_t channels) { return (channels + 1) / 2; }

// ------------------------------------------------------------------------------ weights

// Bytes of the packed weights of one group and tap.
template <typename T, typename A = accumulator_t<T>>
inline int64_t tap_bytes(const DeformConv2dShape& shape) {
  const int64_t in = shape.group_channels(), out = shape.group_out_channels();
  if (in_pairs<T>(shape)) return packed_size<A>(2 * pairs(in), out) * sizeof(BFloat16);
  return packed_size<A>(in, out) * sizeof(A);
}

template <typename T>
int64_t packed_bytes(const DeformConv2dShape& shape) {
  return shape.groups * shape.taps() * tap_bytes<T>(shape);
}

// A unit is a register's width of output channels.
template <typename A>
inline int64_t group_units(const DeformConv2dShape& shape) {
  return packed_size<A>(1, shape.group_out_channels()) / kLanes<A>;
}

template <typename T>
int64_t pack_units(const DeformConv2dShape& shape) {
  return shape.groups * group_units<accumulator_t<T>>(shape);
}

template <typename T, typename A = accumulator_t<T>>
void pack_weight(const DeformConv2dShape& shape, const T* weight, int64_t begin, int64_t end,
                 std::byte* packed) {
  constexpr int64_t lanes = kLanes<A>, width = kPanelWidth<A>;
  const int64_t in = shape.group_channels(), out = shape.group_out_channels();
  const int64_t taps = shape.taps(), per_tap = tap_bytes<T>(shape);
  const bool paired = in_pairs<T>(shape);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t group = unit / group_units<A>(shape), part = unit % group_units<A>(shape);
    const int64_t count = std::clamp<int64_t>(out - part * lanes, 0, lanes);
    const T* source = weight + (group * out + part * lanes) * in * taps;
    std::byte* target = packed + group * taps * per_tap;
    // Where this unit's panel begins, for each channel of the depth, and its half of the panel.
    const int64_t panel = part / 2 * width, half = part % 2 * lanes;
    for_weight_chunks(in, taps, [&](int64_t c, int64_t channels, int64_t t, int64_t some_taps) {
      A rows[kWeightChunk * kWeightChunk * lanes];
      if (count < lanes) fill_zero(rows, channels * some_taps * lanes);
      load_weight_rows(source, in * taps, count, taps, c, channels, t, some_taps, rows);
      for (int64_t tap = 0; tap < some_taps; ++tap) {
        std::byte* place = target + (t + tap) * per_tap;
        const auto value = [&](int64_t k) { return rows + (k * some_taps + tap) * lanes; };
        if (!paired) {
          A* values = reinterpret_cast<A*>(place) + panel * in + c * width + half;
          for (int64_t k = 0; k < channels; ++k) {
            store_register(values + k * width, load_register(value(k)));
          }
          continue;
        }
        BFloat16* values =
            reinterpret_cast<BFloat16*>(place) + 2 * (panel * pairs(in) + c / 2 * width + half);
        for (int64_t k = 0; k < channels; k += 2) {
          for (int64_t lane = 0; lane < lanes; ++lane) {
            BFloat16* pair = values + k * width + 2 * lane;
            store(pair, value(k)[lane]);
            store(pair + 1, k + 1 < channels ? value(k + 1)[lane] : A(0));
          }
        }
      }
    });
  }
}

// ------------------------------------------------------------------------------ sampling

// column[c] = Σ_q weight[q] corner[q][c] for `count` channels.
template <typename S, typename A, typename L>
inline void blend(const S* const (&corner)[4], const A (&weight)[4], int64_t count, L* column) {
  const S *c0 = corner[0], *c1 = corner[1], *c2 = corner[2], *c3 = corner[3];
  int64_t c = 0;
  for (; c + kLanes<A> <= count; c += kLanes<A>) {
    store_register(column + c,
                   weight[0] * load_register(c0 + c) + weight[1] * load_register(c1 + c) +
                       weight[2] * load_register(c2 + c) + weight[3] * load_register(c3 + c));
  }
  for (; c < count; ++c) {
    store(column + c, weight[0] * load(c0 + c) + weight[1] * load(c1 + c) +
                          weight[2] * load(c2 + c) + weight[3] * load(c3 + c));
  }
}

// A sample at the border of the image, or beyond the window on it: corners that do not exist are
// left out, and those that the window does not show are read from `planes`. `strays` has room for
// the channels of four corners.
template <typename T, typename S, typename A, typename L>
__attribute__((noinline)) void blend_stray(const DeformConv2dShape& shape,
                                           const ForwardSamples<A>& samples, int64_t i,
                                           const Rows<S>& rows, int64_t channel, const T* planes,
                                           int64_t count, std::remove_const_t<S>* strays,
                                           L* column) {
  Corners<A, 2> corners;
  if (!corners_of(shape, samples, i, corners)) return fill_zero(column, count);
  const S* corner[4];
  A weight[4];
  for (int q = 0; q < 4; ++q) {
    const int64_t y = samples.low_y[i] + (q >> 1), x = samples.low_x[i] + (q & 1);
    weight[q] = samples.modulation[i] * corners.weight[q];
    std::remove_const_t<S>* stray = strays + q * count;
    corner[q] = stray;
    if (corners.position[q] < 0) {
      fill_zero(stray, count);
    } else if (rows.has(y, x)) {
      corner[q] = rows.row(y) + (x - rows.left) * rows.pixel_stride + channel;
    } else if constexpr (std::is_same_v<S, A>) {
      // Rows of S other than A are those of a whole image: nothing is missing from them.
      const T* source = planes + corners.position[q];
      for (int64_t c = 0; c < count; ++c) stray[c] = load(source + c * shape.height * shape.width);
    }
  }
  blend(corner, weight, count, column);
}

// The columns of one tap: for each pixel of the tile, a row of the channels of all offset groups.
template <typename T, typename S, typename A, typename L>
inline void sample_rows(const DeformConv2dShape& shape, const ForwardTile& tile, const A* offset,
                        const A* mask, int64_t tap, const Rows<S>& rows, const T* planes,
                        ForwardSamples<A>& samples, std::remove_const_t<S>* strays, L* columns,
                        int64_t stride) {
  const int64_t part = shape.deform_group_channels();
  for (int64_t d = 0; d < shape.deform_groups; ++d) {
    locate_samples(shape, tile, offset, mask, d, tap, samples);
    const int64_t channel = d * part;
    for (int64_t i = 0; i < tile.count; ++i) {
      L* column = columns + i * stride + channel;
      CornerRows<S> corners;
      if (!corners_in(rows, samples.low_y[i], samples.low_x[i], corners)) {
        blend_stray(shape, samples, i, rows, channel, planes + channel * shape.height * shape.width,
                    part, strays, column);
        continue;
      }
      const A high_y = samples.modulation[i] * samples.fraction_y[i];
      const A low_y = samples.modulation[i] * (A(1) - samples.fraction_y[i]);
      const A high_x = samples.fraction_x[i], low_x = A(1) - high_x;
      const A weight[4] = {low_y * low_x, low_y * high_x, high_y * low_x, high_y * high_x};
      const S* const corner[4] = {corners.corner[0] + channel, corners.corner[1] + channel,
                                  corners.corner[2] + channel, corners.corner[3] + channel};
      blend(corner, weight, part, column);
    }
  }
}

// The columns of one tap, channel by channel: a row of the tile's pixels for each channel.
template <typename T, typename A>
inline void sample_planes(const DeformConv2dShape& shape, const ForwardTile& tile, const A* offset,
                          const A* mask, int64_t tap, const T* input, ImageLayout layout,
                          ForwardSamples<A>& samples, A* columns) {
  const int64_t part = shape.deform_group_channels();
  int64_t position[4][kForwardTile];
  A weight[4][kForwardTile];
  for (int64_t d = 0; d < shape.deform_groups; ++d) {
    locate_samples(shape, tile, offset, mask, d, tap, samples);
    set_planar_corners(shape, samples, tile.count, layout.pixel_stride, position, weight);
    for (int64_t c = d * part; c < (d + 1) * part; ++c) {
      const T* plane = input + c * layout.channel_stride;
      A* row = columns + c * kForwardTile;
      for (int64_t i = 0; i < tile.count; ++i) {
        const A value = weight[0][i] * load(plane + position[0][i]) +
                        weight[1][i] * load(plane + position[1][i]) +
                        weight[2][i] * load(plane + position[2][i]) +
                        weight[3][i] * load(plane + position[3][i]);
        // Not 0 · value, which is no 0 for an infinite value.
        row[i] = samples.low_y[i] == samples.kNowhere ? A(0) : value;
      }
    }
  }
}

// ------------------------------------------------------------------------------ the pass

// Scratch memory of one thread.
template <typename T, typename A = accumulator_t<T>>
struct Scratch {
  ForwardTile* tile;
  ForwardSamples<A>* samples;
  A* sums;             // pixels × groups × padded out channels
  std::byte* columns;  // see column_bytes
  A* strays;
  A* window;

  Scratch(const DeformConv2dShape& shape, ImageLayout layout, const WindowPlan& plan, Arena& arena)
      : tile(arena.take<ForwardTile>(1)), samples(arena.take<ForwardSamples<A>>(1)) {
    sums = arena.take<A>(kForwardTile * shape.groups * padded<A>(shape.group_out_channels()));
    columns = arena.take<std::byte>(is_planar(shape)
                                        ? kForwardTile * shape.channels * sizeof(A)
                                        : kForwardTile * row_stride<A>(shape.channels) * sizeof(A));
    strays = arena.take<A>(4 * shape.deform_group_channels());
    window = arena.take<A>(
        layout.channels_last() ? 0 : window_size<A>(shape.channels, plan.rows, plan.columns));
  }
};

template <typename A>
inline WindowPlan plan_forward(const DeformConv2dShape& shape) {
  // The same for both layouts, so that the number of tiles is.
  return is_planar(shape) ? no_windows(shape)
                          : plan_windows<A>(shape, shape.channels, kForwardTile);
}

template <typename T, typename A = accumulator_t<T>>
int64_t tiles(const DeformConv2dShape& shape) {
  return shape.batch * tiles_of_image(shape, plan_forward<A>(shape), kForwardTile);
}

template <typename T, typename A = accumulator_t<T>>
int64_t scratch_bytes(const DeformConv2dShape& shape, ImageLayout layout) {
  Arena arena(nullptr);
  Scratch<T>(shape, layout, plan_forward<A>(shape), arena);
  return arena.used();
}

// tile += columns · weights of one tap.
template <Order order, typename L, typename A>
inline void multiply_tap(const DeformConv2dShape& shape, int64_t count, const L* columns,
                         int64_t stride, const std::byte* weight, int64_t group_bytes, A* sums) {
  constexpr bool paired = !std::is_same_v<L, A>;
  const int64_t in = shape.group_channels(), out = shape.group_out_channels();
  const int64_t steps = paired ? pairs(in) : in;
  for (int64_t g = 0; g < shape.groups; ++g) {
    const L* values = reinterpret_cast<const L*>(weight + g * group_bytes);
    const Panels<L> panels = {values, steps * kPanelWidth<A> * (paired ? 2 : 1), kPanelWidth<A>};
    multiply<order, Into::kAdd>(
        count, out, steps, columns + (order == Order::kRows ? g * in : g * in * stride), stride,
        panels, sums + g * padded<A>(out), shape.groups * padded<A>(out));
  }
}

template <typename T, typename A = accumulator_t<T>>
inline void start_tile(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors,
                       int64_t count, A* sums) {
  const int64_t out = shape.group_out_channels();
  for (int64_t g = 0; g < shape.groups; ++g) {
    for (int64_t i = 0; i < count; ++i) {
      A* row = sums + (i * shape.groups + g) * padded<A>(out);
      fill_zero(row, padded<A>(out));
      if (tensors.bias) copy_row<A>(tensors.bias + g * out, out, row);
    }
  }
}

template <typename T, typename A = accumulator_t<T>>
inline void store_tile(const DeformConv2dShape& shape, const ForwardTile& tile, const A* sums,
                       T* output, ImageLayout layout) {
  const int64_t out = shape.group_out_channels(), stride = shape.groups * padded<A>(out);
  for (int64_t r = 0; r < tile.runs; ++r) {
    const auto& run = tile.run[r];
    for (int64_t g = 0; g < shape.groups; ++g) {
      const A* source = sums + run.first * stride + g * padded<A>(out);
      T* target = output + run.pixel * layout.pixel_stride + g * out * layout.channel_stride;
      if (!layout.channels_last()) {
        transpose<A>(source, stride, run.count, out, target, layout.channel_stride);
        continue;
      }
      for (int64_t i = 0; i < run.count; ++i) {
        copy_row<A>(source + i * stride, out, target + i * layout.pixel_stride);
      }
    }
  }
}

template <typename T, typename A = accumulator_t<T>>
void run(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors, int64_t begin,
         int64_t end, std::byte* memory) {
  const WindowPlan plan = plan_forward<A>(shape);
  const int64_t per_image = tiles_of_image(shape, plan, kForwardTile);
  const int64_t group_bytes = shape.taps() * tap_bytes<T>(shape);
  const bool direct = tensors.input_layout.channels_last();
  Arena arena(memory);
  const Scratch<T> scratch(shape, tensors.input_layout, plan, arena);
  ForwardTile& tile = *scratch.tile;

  // Calls `tap_columns(columns, stride, tap)` and multiplies, for each tap, with columns of the
  // type of the first argument.
  const auto each_tap = [&](auto* columns, int64_t stride, auto order, const auto& tap_columns) {
    for (int64_t tap = 0; tap < shape.taps(); ++tap) {
      tap_columns(columns, stride, tap);
      multiply_tap<decltype(order)::value>(shape, tile.count, columns, stride,
                                           tensors.weight + tap * tap_bytes<T>(shape), group_bytes,
                                           scratch.sums);
    }
  };
  using RowOrder = std::integral_constant<Order, Order::kRows>;
  using ColumnOrder = std::integral_constant<Order, Order::kColumns>;

  Rows<A> window = {};
  int64_t image = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    if (unit / per_image != image) {
      image = unit / per_image;
      window = empty_window(scratch.window, shape.channels, plan.rows, plan.columns);
    }
    set_tile(shape, plan, unit % per_image, tile);
    const T* input = tensors.input + image * shape.channels * shape.height * shape.width;
    const int64_t points = image * shape.deform_groups * shape.taps() * shape.pixels();
    const A* offset = tensors.offset + 2 * points;
    const A* mask = tensors.mask ? tensors.mask + points : nullptr;
    start_tile(shape, tensors, tile.count, scratch.sums);

    const auto from_planes = [&](A* columns, int64_t, int64_t tap) {
      sample_planes(shape, tile, offset, mask, tap, input, tensors.input_layout, *scratch.samples,
                    columns);
    };
    const auto from_rows = [&](auto* columns, int64_t stride, int64_t tap) {
      if (direct) {
        sample_rows(shape, tile, offset, mask, tap, whole_image(shape, input), input,
                    *scratch.samples, reinterpret_cast<T*>(scratch.strays), columns, stride);
      } else {
        sample_rows(shape, tile, offset, mask, tap, window, input, *scratch.samples, scratch.strays,
                    columns, stride);
      }
    };
    if (is_planar(shape)) {
      each_tap(reinterpret_cast<A*>(scratch.columns), kForwardTile, ColumnOrder{}, from_planes);
    } else {
      if (!direct) {
        roll_input(shape, range_around(shape, tile, plan, plan.rows, plan.columns), input,
                   shape.channels, window);
      }
#ifdef __AVX512BF16__
      if constexpr (std::is_same_v<T, BFloat16>) {
        if (in_pairs<T>(shape)) {
          BFloat16* columns = reinterpret_cast<BFloat16*>(scratch.columns);
          const int64_t stride = row_stride<BFloat16>(2 * pairs(shape.channels));
          // The second half of the last pair, where the number of channels is odd.
          for (int64_t i = 0; i < tile.count; ++i) columns[i * stride + shape.channels] = {0};
          each_tap(columns, stride, RowOrder{}, from_rows);
          store_tile(shape, tile, scratch.sums,
                     tensors.output + image * shape.out_channels * shape.pixels(),
                     tensors.output_layout);
          continue;
        }
      }
#endif
      each_tap(reinterpret_cast<A*>(scratch.columns), row_stride<A>(shape.channels), RowOrder{},
               from_rows);
    }
    store_tile(shape, tile, scratch.sums,
               tensors.output + image * shape.out_channels * shape.pixels(), tensors.output_layout);
  }
}

}  // namespace

template <typename T>
ForwardKernel<T> deform_conv2d_forward() {
  return {pack_units<T>, packed_bytes<T>, pack_weight<T>, tiles<T>, scratch_bytes<T>, run<T>};
}

template ForwardKernel<double> deform_conv2d_forward<double>();
template ForwardKernel<float> deform_conv2d_forward<float>();
template ForwardKernel<Half> deform_conv2d_forward<Half>();
template ForwardKernel<BFloat16> deform_conv2d_forward<BFloat16>();

}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
