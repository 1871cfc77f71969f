// The CPU backward kernel of deform_conv2d. Compiled once for each instruction set, with
// MMDCN_CPU_CAPABILITY naming the namespace.
//
// For a block of channels, by tiles of output pixels and one tap at a time:
//   grad_columns = grad_output · Wᵀ            the gradient of W(pn)'s left neighbour, X(p)·Δm
//   grad_input(q)  += G(q, p) Δm grad_columns
//   grad_offset     = Δm Σ_c grad_columns Σ_q dG(q, p)/dp X(q)
//   grad_mask       =    Σ_c grad_columns Σ_q G(q, p) X(q)
//   grad_weight    += columnsᵀ · grad_output, with the columns sampled again
#include "../matmul.h"
#include "samples.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

using BackwardTile = Tile<kBackwardTile>;
template <typename A>
using BackwardSamples = Samples<A, kBackwardTile>;

template <typename T, typename A = accumulator_t<T>>
int64_t packed_size_of_tap(const DeformConv2dShape& shape, const ChannelBlock& block) {
  return packed_size<A>(shape.group_out_channels(), block.end - block.begin);
}

template <typename T, typename A = accumulator_t<T>>
int64_t packed_block_size(const DeformConv2dShape& shape, const ChannelBlock& block) {
  return shape.taps() * packed_size_of_tap<T>(shape, block);
}

// packed: for each tap, Co/groups × the block's channels in panels.
template <typename T, typename A = accumulator_t<T>>
void pack_weight(const DeformConv2dShape& shape, const T* weight, const WeightLayout& layout,
                 const ChannelBlock& block, A* packed) {
  constexpr int64_t lanes = kLanes<A>, width = kPanelWidth<A>;
  const int64_t taps = shape.taps(), in = shape.group_channels(), out = shape.group_out_channels();
  const int64_t channels = block.end - block.begin;
  const int64_t tap_size = packed_size_of_tap<T>(shape, block);
  const T* source = weight + block.group * out * layout.out_stride +
                    (block.begin - block.group * in) * layout.channel_stride;
  if (channels % width != 0) fill_zero(packed, taps * tap_size);
  for (int64_t o = 0; o < out; o += lanes) {
    const int64_t count = std::min(lanes, out - o);
    for_weight_chunks(channels, taps, [&](int64_t c, int64_t some, int64_t t, int64_t some_taps) {
      A rows[kWeightChunk * kWeightChunk * lanes];
      load_weight_rows(source + o * layout.out_stride, layout, count, c, some, t, some_taps, rows);
      for (int64_t tap = 0; tap < some_taps; ++tap) {
        A* target = packed + (t + tap) * tap_size + o * width;
        for (int64_t k = 0; k < some; k += width) {
          const int64_t panel = (c + k) / width * width;
          transpose<A>(rows + (k * some_taps + tap) * lanes, some_taps * lanes,
                       std::min(width, some - k), count, target + panel * out + c + k - panel,
                       width);
        }
      }
    });
  }
}

template <typename T, typename A = accumulator_t<T>>
int64_t sums_size(const DeformConv2dShape& shape, const ChannelBlock& block) {
  return (block.end - block.begin) * shape.taps() * padded<A>(shape.group_out_channels());
}

template <bool add, typename T, typename A>
void unpack_sums_with(const DeformConv2dShape& shape, const A* sums, const ChannelBlock& block,
                      T* grad_weight, const WeightLayout& layout) {
  const int64_t out = shape.group_out_channels(), taps = shape.taps(), row = padded<A>(out);
  const int64_t channels = block.end - block.begin;
  T* target = grad_weight + block.group * out * layout.out_stride +
              (block.begin - block.group * shape.group_channels()) * layout.channel_stride;
  if (layout.tap_stride == 1) {
    return transpose<A, add>(sums, row, channels * taps, out, target, layout.out_stride);
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    transpose<A, add>(sums + tap * row, taps * row, channels, out, target + tap * layout.tap_stride,
                      layout.out_stride);
  }
}

template <typename T, typename A = accumulator_t<T>>
void unpack_sums(const DeformConv2dShape& shape, const A* sums, const ChannelBlock& block, bool add,
                 T* grad_weight, const WeightLayout& layout) {
  add ? unpack_sums_with<true>(shape, sums, block, grad_weight, layout)
      : unpack_sums_with<false>(shape, sums, block, grad_weight, layout);
}

// ------------------------------------------------------------------------------ samples

// What one sample takes and gives, for channels of one block and offset group. Pointers of what is
// not asked for are null.
template <typename S, typename A>
struct Scatter {
  const S* corner[4];
  A* grad_corner[4];
  A weight[4];  // G(q, p) Δm
  const A* grad_column;
  A* column;
};

// Adds to the gradient of the input, recomputes the column, and gives in `dots`, still to be added
// up over their lanes, Σ_c grad_column[c] X(q)[c] for each corner q.
template <bool wants_input, bool wants_column, bool wants_dots, typename S, typename A>
inline void scatter(const Scatter<S, A>& sample, int64_t count, register_t<A> (&dots)[4]) {
  const A* grad_column = sample.grad_column;
  A* column = sample.column;
  register_t<A> sums[4] = {};
  int64_t c = 0;
  for (; c + kLanes<A> <= count; c += kLanes<A>) {
    const register_t<A> gradient = load_register(grad_column + c);
    register_t<A> blended = {};
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      if constexpr (wants_column || wants_dots) {
        const register_t<A> value = load_register(sample.corner[q] + c);
        if constexpr (wants_column) blended += sample.weight[q] * value;
        if constexpr (wants_dots) sums[q] += value * gradient;
      }
      if constexpr (wants_input) {
        A* target = sample.grad_corner[q] + c;
        store_register(target, load_register(target) + sample.weight[q] * gradient);
      }
    }
    if constexpr (wants_column) store_register(column + c, blended);
  }
  for (; c < count; ++c) {
    A blended = 0;
    for (int q = 0; q < 4; ++q) {
      const A value = load(sample.corner[q] + c);
      blended += sample.weight[q] * value;
      sums[q][0] += value * grad_column[c];
      if constexpr (wants_input) sample.grad_corner[q][c] += sample.weight[q] * grad_column[c];
    }
    if constexpr (wants_column) column[c] = blended;
  }
  for (int q = 0; q < 4; ++q) dots[q] = sums[q];
}

// The gradients of y, x and the modulation, from the dots of the corners and their weights.
template <typename A>
inline void point_gradients(const A (&dots)[4], A fraction_y, A fraction_x, A modulation,
                            A (&gradient)[3]) {
  const A low_y = A(1) - fraction_y, low_x = A(1) - fraction_x;
  const A upper = low_x * dots[0] + fraction_x * dots[1];
  const A lower = low_x * dots[2] + fraction_x * dots[3];
  gradient[0] = modulation * (lower - upper);
  gradient[1] = modulation * (low_y * (dots[1] - dots[0]) + fraction_y * (dots[3] - dots[2]));
  gradient[2] = low_y * upper + fraction_y * lower;
}

template <typename T, typename A = accumulator_t<T>>
struct Scratch {
  using Addresses = CornerAddresses<kBackwardTile>;
  struct Weights {
    A of[4][kBackwardTile];  // G(q, p) Δm
  };

  // The samples of one offset group, for work on its channels one by one.
  struct Planar {
    int64_t read[4][kBackwardTile], added[4][kBackwardTile];
    A weight[4][kBackwardTile], value[4][kBackwardTile];
  };

  BackwardTile* tile;
  BackwardSamples<A>* samples;
  Addresses* read;   // where corners are read
  Addresses* added;  // and where their gradients are added up
  Weights* weights;
  Planar* planar;
  A* grad_tile;       // pixels × Co/groups
  A* grad_columns;    // pixels × channels of the block
  A* columns;         // likewise
  A* planar_grad;     // grad_columns as channels × pixels
  A* planar_columns;  // columns as channels × pixels
  A* dots;            // 4 × pixels: Σ_c grad_column[c] X(q)[c] for each corner q
  A* gradients;       // 3 × pixels: of y, x and the modulation
  A* zeros;           // the channels of corners that do not exist
  A* sinks;           // 4 × channels: what would go to them
  A* strays;          // 4 × channels: corners that no window shows
  A* grad_strays;     // 4 × channels: what goes to them
  A* points;          // staged offsets and modulations
  A* staged_offset;   // channels × pixels: gradients of offsets that go to pixels of channels
  A* staged_mask;     // and of modulations

  Scratch(const DeformConv2dShape& shape, const BackwardTensors<T>& tensors, int64_t channels,
          Arena& arena)
      : tile(arena.take<BackwardTile>(1)),
        samples(arena.take<BackwardSamples<A>>(1)),
        read(arena.take<Addresses>(1)),
        added(arena.take<Addresses>(1)),
        weights(arena.take<Weights>(1)),
        planar(arena.take<Planar>(is_planar(shape) ? 1 : 0)) {
    grad_tile = arena.take<A>(kBackwardTile * grad_tile_stride(shape));
    grad_columns = arena.take<A>(kBackwardTile * row_stride<A>(channels));
    columns = arena.take<A>(kBackwardTile * row_stride<A>(channels));
    planar_grad = arena.take<A>(is_planar(shape) ? channels * kBackwardTile : 0);
    planar_columns = arena.take<A>(is_planar(shape) ? channels * kBackwardTile : 0);
    dots = arena.take<A>(4 * kBackwardTile);
    gradients = arena.take<A>(3 * kBackwardTile);
    zeros = arena.take<A>(channels);
    sinks = arena.take<A>(4 * channels);
    strays = arena.take<A>(4 * channels);
    grad_strays = arena.take<A>(4 * channels);
    points = arena.take<A>(staged_size<kBackwardTile>(
        shape, tensors.offset, tensors.mask,
        std::min(shape.deform_groups, channels / shape.deform_group_channels() + 2)));
    const int64_t owned = channels / shape.deform_group_channels() * shape.taps() * kBackwardTile;
    staged_offset = arena.take<A>(tensors.grad_offset.in_planes() ? 0 : 2 * owned);
    staged_mask = arena.take<A>(tensors.grad_mask.in_planes() ? 0 : owned);
  }
  static int64_t grad_tile_stride(const DeformConv2dShape& shape) {
    return row_stride<A>(padded<A>(shape.group_out_channels()));
  }
};

// One block's call of the kernel.
template <typename T, typename A = accumulator_t<T>>
struct Pass {
  const DeformConv2dShape& shape;
  const BackwardTensors<T>& tensors;
  const ChannelBlock& block;
  BlockWindows<T>& windows;
  Scratch<T> scratch;
  bool wants_points;
  PointRows<A> points;  // of the tile at work

  int64_t channels() const { return block.end - block.begin; }
  int64_t plane() const { return shape.height * shape.width; }
  const T* planes() const {
    return tensors.input + block.begin * tensors.input_layout.channel_stride;
  }
  T* grad_planes() const {
    return tensors.grad_input + block.begin * tensors.input_layout.channel_stride;
  }

  // Sample number i, for `count` channels of the block from its channel number `channel` on, where
  // it needs pixels beyond the windows: those are read from and added to the planes.
  template <bool wants_input, bool wants_column, bool wants_dots>
  __attribute__((noinline)) void stray(int64_t i, int64_t channel, int64_t count,
                                       Scatter<A, A>& sample, register_t<A> (&dots)[4]) {
    Corners<A, 2> corners;
    if (!corners_of(shape, *scratch.samples, i, corners)) {
      if (wants_column) fill_zero(sample.column, count);
      return;
    }
    bool far[4] = {};
    for (int q = 0; q < 4; ++q) {
      const int64_t y = scratch.samples->low_y[i] + (q >> 1);
      const int64_t x = scratch.samples->low_x[i] + (q & 1);
      const bool exists = corners.position[q] >= 0;
      if (exists && !windows.input.has(y, x)) {
        A* values = scratch.strays + q * count;
        const T* source = planes() + channel * plane() + corners.position[q];
        for (int64_t c = 0; c < count; ++c) values[c] = load(source + c * plane());
        sample.corner[q] = values;
      }
      if (wants_input && exists && !windows.grad_input.has(y, x)) {
        sample.grad_corner[q] = scratch.grad_strays + q * count;
        fill_zero(sample.grad_corner[q], count);
        far[q] = true;
      }
    }
    scatter<wants_input, wants_column, wants_dots>(sample, count, dots);
    for (int q = 0; q < 4; ++q) {
      if (!far[q]) continue;
      T* target = grad_planes() + channel * plane() + corners.position[q];
      for (int64_t c = 0; c < count; ++c) {
        store(target + c * plane(), load(target + c * plane()) + sample.grad_corner[q][c]);
      }
    }
  }

  // The samples of a tile, for one offset group's channels [begin, end) of the block. `row_channel`
  // is where the block's channels begin in `rows`.
  template <bool wants_input, bool wants_column, bool wants_dots, typename S>
  void scatter_rows(const Rows<S>& rows, const Rows<A>& grad_rows, int64_t row_channel,
                    int64_t begin, int64_t end) {
    using V = std::remove_const_t<S>;
    const BackwardSamples<A>& samples = *scratch.samples;
    const auto& weights = scratch.weights->of;
    const int64_t stride = row_stride<A>(channels()), count = end - begin;
    const int64_t pixels = scratch.tile->count;
    set_corners<S>(shape, rows, row_channel + begin, samples, pixels,
                   reinterpret_cast<const V*>(scratch.zeros), 0, *scratch.read);
    if (wants_input) {
      set_corners<A>(shape, grad_rows, begin, samples, pixels, scratch.sinks, count,
                     *scratch.added);
    }
    set_weights(samples, pixels, scratch.weights->of);
    constexpr int64_t lanes = kLanes<A>;
    register_t<A> dots[4][lanes] = {};
    for (int64_t first = 0; first < pixels; first += lanes) {
      const int64_t some = std::min(lanes, pixels - first);
      for (int64_t k = 0; k < some; ++k) {
        const int64_t i = first + k;
        Scatter<V, A> sample;
        sample.grad_column = scratch.grad_columns + i * stride + begin;
        sample.column = scratch.columns + i * stride + begin;
        bool missing = scratch.read->missing[i];
        for (int q = 0; q < 4; ++q) {
          sample.corner[q] = reinterpret_cast<const V*>(scratch.read->corner[q][i]);
          sample.weight[q] = weights[q][i];
          if (!wants_input) continue;
          sample.grad_corner[q] = reinterpret_cast<A*>(scratch.added->corner[q][i]);
        }
        if (wants_input) missing = missing || scratch.added->missing[i];
        register_t<A> sums[4] = {};
        // Only from windows of A can anything be missing.
        if (std::is_same_v<V, A> && missing) {
          if constexpr (std::is_same_v<V, A>) {
            stray<wants_input, wants_column, wants_dots>(i, begin, count, sample, sums);
          }
        } else {
          scatter<wants_input, wants_column, wants_dots>(sample, count, sums);
        }
        if constexpr (wants_dots) {
          for (int q = 0; q < 4; ++q) dots[q][k] = sums[q];
        }
      }
      if constexpr (wants_dots) {
        for (int q = 0; q < 4; ++q) {
          store_register(scratch.dots + q * kBackwardTile + first, sums_of<A>(dots[q]));
        }
      }
    }
    if constexpr (wants_dots) set_point_gradients();
  }

  // The same for offset groups of few channels, straight from and to the planes. Whatever can be
  // done for a register of the tile's pixels at a time is, and apart from what cannot.
  void scatter_planes(int64_t begin, int64_t end) {
    const BackwardSamples<A>& samples = *scratch.samples;
    auto& planar = *scratch.planar;
    const int64_t count = scratch.tile->count;
    const ImageLayout layout = tensors.input_layout;
    const bool in_window = windows.grad_input.capacity > 0;
    A* grad_base = nullptr;
    if (tensors.grad_input) {
      if constexpr (std::is_same_v<T, A>) grad_base = grad_planes();
      if (in_window) grad_base = windows.grad_input.data;
    }
    const int64_t grad_pixel = in_window ? windows.grad_input.pixel_stride : layout.pixel_stride;
    const int64_t grad_channel = in_window ? 1 : layout.channel_stride;
    set_planar_corners(shape, samples, count, layout.pixel_stride, planar.read, planar.weight);
    if (grad_pixel != layout.pixel_stride) {
      set_planar_corners(shape, samples, count, grad_pixel, planar.added, planar.weight);
    }
    const auto& added = grad_pixel != layout.pixel_stride ? planar.added : planar.read;
    if (wants_points) fill_zero(scratch.dots, 4 * kBackwardTile);
    for (int64_t c = begin; c < end; ++c) {
      const T* source = planes() + c * layout.channel_stride;
      const A* grad = scratch.planar_grad + c * kBackwardTile;
      for (int64_t i = 0; i < count; ++i) {
        for (int q = 0; q < 4; ++q) planar.value[q][i] = load(source + planar.read[q][i]);
      }
      if (tensors.grad_weight) {
        A* column = scratch.planar_columns + c * kBackwardTile;
        for (int64_t i = 0; i < count; ++i) {
          const A blended =
              planar.weight[0][i] * planar.value[0][i] + planar.weight[1][i] * planar.value[1][i] +
              planar.weight[2][i] * planar.value[2][i] + planar.weight[3][i] * planar.value[3][i];
          // Not 0 · value, which is no 0 for an infinite value.
          column[i] = samples.low_y[i] == samples.kNowhere ? A(0) : blended;
        }
      }
      if (wants_points) {
        for (int q = 0; q < 4; ++q) {
          A* dots = scratch.dots + q * kBackwardTile;
          for (int64_t i = 0; i < count; ++i) dots[i] += planar.value[q][i] * grad[i];
        }
      }
      if (grad_base == nullptr) continue;
      A* target = grad_base + c * grad_channel;
      for (int64_t i = 0; i < count; ++i) {
        if (samples.low_y[i] == samples.kNowhere) continue;
        for (int q = 0; q < 4; ++q) target[added[q][i]] += planar.weight[q][i] * grad[i];
      }
    }
    if (wants_points) set_point_gradients();
  }

  // scratch.gradients, from scratch.dots.
  void set_point_gradients() {
    const BackwardSamples<A>& samples = *scratch.samples;
    const int32_t bottom = static_cast<int32_t>(shape.height) - 1;
    const int32_t right = static_cast<int32_t>(shape.width) - 1;
    const A* const dots = scratch.dots;
    A* const gradients = scratch.gradients;
    for (int64_t i = 0; i < scratch.tile->count; ++i) {
      // Whatever a corner that does not exist was taken for counts for nothing.
      const int32_t y = samples.low_y[i], x = samples.low_x[i];
      const int32_t top = y >= 0, low = (y >= -1) & (y < bottom);
      const int32_t first = x >= 0, last = x < right;
      const A dot[4] = {(top & first) != 0 ? dots[i] : A(0),
                        (top & last) != 0 ? dots[kBackwardTile + i] : A(0),
                        (low & first) != 0 ? dots[2 * kBackwardTile + i] : A(0),
                        (low & last) != 0 ? dots[3 * kBackwardTile + i] : A(0)};
      A gradient[3];
      point_gradients(dot, samples.fraction_y[i], samples.fraction_x[i], samples.modulation[i],
                      gradient);
      gradients[i] = gradient[0];
      gradients[kBackwardTile + i] = gradient[1];
      gradients[2 * kBackwardTile + i] = gradient[2];
    }
  }

  template <bool wants_input, bool wants_column, bool wants_dots>
  void scatter_with(int64_t begin, int64_t end) {
    if (tensors.input_layout.channels_last()) {
      const Rows<const T> rows = whole_image(shape, tensors.input);
      if constexpr (std::is_same_v<T, A>) {
        // The gradient's image is laid out as the input's is, and added to in place.
        Rows<A> grad_rows = {};
        if (wants_input) {
          grad_rows = {grad_planes(), rows.pixel_stride, rows.row_stride, rows.capacity, rows.begin,
                       rows.end,      rows.left,         rows.right,      rows.origin};
        }
        return scatter_rows<wants_input, wants_column, wants_dots>(rows, grad_rows, block.begin,
                                                                   begin, end);
      }
      return scatter_rows<wants_input, wants_column, wants_dots>(rows, windows.grad_input,
                                                                 block.begin, begin, end);
    }
    scatter_rows<wants_input, wants_column, wants_dots>(windows.input, windows.grad_input, 0, begin,
                                                        end);
  }

  void scatter_samples(int64_t begin, int64_t end) {
    if (is_planar(shape)) return scatter_planes(begin, end);
    const bool column = tensors.grad_weight;
    if (tensors.grad_input && wants_points) {
      column ? scatter_with<true, true, true>(begin, end)
             : scatter_with<true, false, true>(begin, end);
    } else if (tensors.grad_input) {
      column ? scatter_with<true, true, false>(begin, end)
             : scatter_with<true, false, false>(begin, end);
    } else if (wants_points) {
      column ? scatter_with<false, true, true>(begin, end)
             : scatter_with<false, false, true>(begin, end);
    } else {
      scatter_with<false, true, false>(begin, end);
    }
  }

  // Where the gradients of the tile's points go: to planes, to where those of a pixel are put
  // together, or aside.
  void store_points(int64_t d, int64_t tap, A* aside) {
    if (aside) {
      for (int k = 0; k < 3; ++k) {
        const A* source = scratch.gradients + k * kBackwardTile;
        std::copy(source, source + scratch.tile->count, aside + k * kBackwardTile);
      }
      return;
    }
    const int64_t row = d * shape.taps() + tap, skipped = first_owned(shape, block) * shape.taps();
    store_row(tensors.grad_offset, 2 * row, 0, scratch.staged_offset, 2 * skipped);
    store_row(tensors.grad_offset, 2 * row + 1, 1, scratch.staged_offset, 2 * skipped);
    store_row(tensors.grad_mask, row, 2, scratch.staged_mask, skipped);
  }

  // One channel of a tensor of gradients, from row number `from` of scratch.gradients; the staged
  // ones begin with channel number `first_staged`.
  void store_row(const PointGradients<A>& target, int64_t channel, int64_t from, A* staged,
                 int64_t first_staged) {
    if (target.data == nullptr) return;
    const A* source = scratch.gradients + from * kBackwardTile;
    if (!target.in_planes()) {
      std::copy(source, source + scratch.tile->count,
                staged + (channel - first_staged) * kBackwardTile);
      return;
    }
    for (int64_t r = 0; r < scratch.tile->runs; ++r) {
      const auto& run = scratch.tile->run[r];
      std::copy(source + run.first, source + run.first + run.count, target.at(channel, run.pixel));
    }
  }

  // Once those of all taps are staged, `per_sample` channels for each.
  void store_staged(const PointGradients<A>& target, const A* staged, int64_t per_sample) {
    const int64_t begin = first_owned(shape, block), owned = last_owned(shape, block) - begin;
    const int64_t rows = per_sample * shape.taps();
    if (target.data == nullptr || target.in_planes() || owned < 1) return;
    for (int64_t r = 0; r < scratch.tile->runs; ++r) {
      const auto& run = scratch.tile->run[r];
      transpose<A>(staged + run.first, kBackwardTile, owned * rows, run.count,
                   target.at(begin * rows, run.pixel), target.pixel_stride);
    }
  }

  void load_grad_tile() {
    const ImageLayout layout = tensors.output_layout;
    const int64_t out = shape.group_out_channels(), stride = scratch.grad_tile_stride(shape);
    const T* gradients = tensors.grad_output + block.group * out * layout.channel_stride;
    for (int64_t r = 0; r < scratch.tile->runs; ++r) {
      const auto& run = scratch.tile->run[r];
      const T* source = gradients + run.pixel * layout.pixel_stride;
      A* target = scratch.grad_tile + run.first * stride;
      if (!layout.channels_last()) {
        transpose<A>(source, layout.channel_stride, out, run.count, target, stride);
        continue;
      }
      for (int64_t i = 0; i < run.count; ++i) {
        copy_row<A>(source + i * layout.pixel_stride, out, target + i * stride);
      }
    }
    for (int64_t i = 0; i < scratch.tile->count; ++i) {
      fill_zero(scratch.grad_tile + i * stride + out, padded<A>(out) - out);
    }
  }

  // `partial` is this block's, for this tile.
  void tap(int64_t tap, int64_t block_index, A* partial) {
    const int64_t out = shape.group_out_channels(), count = scratch.tile->count;
    const int64_t out_stride = scratch.grad_tile_stride(shape), stride = row_stride<A>(channels());
    const A* weight = tensors.weight + tap * packed_size_of_tap<T>(shape, block);
    multiply<Order::kRows, Into::kSet>(count, channels(), out, scratch.grad_tile, out_stride,
                                       packed(weight, out), scratch.grad_columns, stride);
    if (is_planar(shape)) {
      transpose<A>(scratch.grad_columns, stride, count, channels(), scratch.planar_grad,
                   kBackwardTile);
    }
    const int64_t part = shape.deform_group_channels();
    for (int64_t d = block.begin / part; d * part < block.end; ++d) {
      const int64_t begin = std::max(d * part, block.begin) - block.begin;
      const int64_t end = std::min((d + 1) * part, block.end) - block.begin;
      if (is_planar(shape)) {
        prefetch_points(*scratch.tile, points, points.row(shape, d + 1, tap));
      }
      locate_samples(shape, *scratch.tile, points, d, tap, *scratch.samples);
      scatter_samples(begin, end);
      if (!wants_points) continue;
      A* aside = nullptr;
      if (!owns_deform_group(shape, block, d)) {
        aside = partial + partial_position(shape, block, block_index, d) + tap * 3 * kBackwardTile;
      }
      store_points(d, tap, aside);
    }
    if (tensors.grad_weight == nullptr) return;
    const Panels<A> grad_tile = row_major<A>(scratch.grad_tile, out_stride);
    A* sums = tensors.grad_weight + tap * padded<A>(out);
    const int64_t row = shape.taps() * padded<A>(out);
    if (is_planar(shape)) {
      multiply<Order::kRows, Into::kAdd>(channels(), out, count, scratch.planar_columns,
                                         kBackwardTile, grad_tile, sums, row);
    } else {
      multiply<Order::kColumns, Into::kAdd>(channels(), out, count, scratch.columns, stride,
                                            grad_tile, sums, row);
    }
  }
};

// ------------------------------------------------------------------------------ the pass

// Windows that a block needs: on the input where its channels lie in planes, and on its gradient
// where that cannot be added to in place. A gradient that is stored in 16 bits is kept whole, as it
// must not be rounded before all is added.
template <typename T, typename A = accumulator_t<T>>
struct WindowSizes {
  int64_t input_rows = 0, grad_rows = 0, grad_columns = 0;

  WindowSizes(const DeformConv2dShape& shape, const BackwardTensors<T>& tensors,
              const WindowPlan& plan) {
    const bool planes = !tensors.input_layout.channels_last();
    if (planes && !is_planar(shape)) input_rows = plan.rows;
    if (tensors.grad_input == nullptr) return;
    if (!std::is_same_v<T, A>) {
      grad_rows = shape.height;
      grad_columns = shape.width;
    } else if (planes && !is_planar(shape)) {
      grad_rows = plan.rows;
      grad_columns = plan.columns;
    }
  }
};

template <typename A>
inline WindowPlan plan_backward(const DeformConv2dShape& shape) {
  return is_planar(shape) ? no_windows(shape)
                          : plan_windows<A>(shape, shape.channels, kBackwardTile);
}

template <typename T, typename A = accumulator_t<T>>
int64_t tiles(const DeformConv2dShape& shape) {
  return tiles_of_image(shape, plan_backward<A>(shape), kBackwardTile);
}

template <typename T, typename A = accumulator_t<T>>
void tile_at(const DeformConv2dShape& shape, int64_t index, BackwardTile& tile) {
  set_tile(shape, plan_backward<A>(shape), index, tile);
}

template <typename T, typename A = accumulator_t<T>>
int64_t window_bytes(const DeformConv2dShape& shape, const BackwardTensors<T>& tensors,
                     int64_t channels) {
  const WindowPlan plan = plan_backward<A>(shape);
  const WindowSizes<T> sizes(shape, tensors, plan);
  return (window_size<A>(channels, sizes.input_rows, plan.columns) +
          window_size<A>(channels, sizes.grad_rows, sizes.grad_columns)) *
         sizeof(A);
}

template <typename T, typename A = accumulator_t<T>>
void open(const DeformConv2dShape& shape, const BackwardTensors<T>& tensors,
          const ChannelBlock& block, std::byte* memory, BlockWindows<T>& windows) {
  const WindowPlan plan = plan_backward<A>(shape);
  const WindowSizes<T> sizes(shape, tensors, plan);
  const int64_t channels = block.end - block.begin;
  A* input = reinterpret_cast<A*>(memory);
  A* gradient = input + window_size<A>(channels, sizes.input_rows, plan.columns);
  windows.input = empty_window(input, channels, sizes.input_rows, plan.columns);
  windows.grad_input = empty_window(gradient, channels, sizes.grad_rows, sizes.grad_columns);
  if (sizes.grad_rows == shape.height && sizes.grad_columns == shape.width) {
    windows.grad_input.right = shape.width;
    windows.grad_input.set_rows(0, shape.height);
    fill_zero(gradient, window_size<A>(channels, sizes.grad_rows, sizes.grad_columns));
  }
}

template <typename T, typename A = accumulator_t<T>>
void close(const DeformConv2dShape& shape, const BackwardTensors<T>& tensors,
           const ChannelBlock& block, BlockWindows<T>& windows) {
  const Rows<A>& window = windows.grad_input;
  if (tensors.grad_input == nullptr || window.capacity == 0) return;
  flush_gradient(shape, window, window.begin, window.end,
                 tensors.grad_input + block.begin * tensors.input_layout.channel_stride,
                 tensors.input_layout, block.end - block.begin);
}

template <typename T, typename A = accumulator_t<T>>
int64_t scratch_bytes(const DeformConv2dShape& shape, const BackwardTensors<T>& tensors,
                      int64_t block_channels) {
  Arena arena(nullptr);
  Scratch<T>(shape, tensors, block_channels, arena);
  return arena.used();
}

template <typename T, typename A = accumulator_t<T>>
void run(const DeformConv2dShape& shape, const BackwardTensors<T>& tensors,
         const ChannelBlock* blocks, int64_t block_index, int64_t begin, int64_t end,
         BlockWindows<T>& windows, std::byte* memory) {
  const ChannelBlock& block = blocks[block_index];
  const WindowPlan plan = plan_backward<A>(shape);
  Arena arena(memory);
  const int64_t channels = block.end - block.begin;
  Pass<T> pass = {shape,
                  tensors,
                  block,
                  windows,
                  Scratch<T>(shape, tensors, channels, arena),
                  tensors.grad_offset.data != nullptr || tensors.grad_mask.data != nullptr,
                  {}};
  const int64_t part = shape.deform_group_channels();
  const int64_t first_group = block.begin / part, last_group = (block.end - 1) / part;
  fill_zero(pass.scratch.zeros, channels);
  fill_zero(pass.scratch.sinks, 4 * channels);
  const bool rolls = windows.grad_input.capacity > 0 && windows.grad_input.capacity < shape.height;
  const bool strips = plan.columns < shape.width;
  for (int64_t index = begin; index < end; ++index) {
    set_tile(shape, plan, index, *pass.scratch.tile);
    if (windows.input.capacity > 0) {
      roll_input(
          shape,
          range_around(shape, *pass.scratch.tile, plan, windows.input.capacity, plan.columns),
          pass.planes(), pass.channels(), windows.input);
    }
    if (std::is_same_v<T, A> && windows.grad_input.capacity > 0 && (rolls || strips)) {
      roll_gradient(
          shape,
          range_around(shape, *pass.scratch.tile, plan, windows.grad_input.capacity, plan.columns),
          pass.grad_planes(), tensors.input_layout, pass.channels(), windows.grad_input);
    }
    pass.points = point_rows(shape, *pass.scratch.tile, tensors.offset, tensors.mask, first_group,
                             last_group - first_group + 1, pass.scratch.points);
    pass.load_grad_tile();
    A* partial = tensors.partial;
    if (partial) partial += (index - begin) * tensors.partial_tile;
    for (int64_t tap = 0; tap < shape.taps(); ++tap) pass.tap(tap, block_index, partial);
    pass.store_staged(tensors.grad_offset, pass.scratch.staged_offset, 2);
    pass.store_staged(tensors.grad_mask, pass.scratch.staged_mask, 1);
  }
}

}  // namespace

template <typename T>
BackwardKernel<T> deform_conv2d_backward() {
  return {packed_block_size<T>, pack_weight<T>,  sums_size<T>, unpack_sums<T>, tiles<T>, tile_at<T>,
          scratch_bytes<T>,     window_bytes<T>, open<T>,      run<T>,         close<T>};
}

template BackwardKernel<double> deform_conv2d_backward<double>();
template BackwardKernel<float> deform_conv2d_backward<float>();
template BackwardKernel<Half> deform_conv2d_backward<Half>();
template BackwardKernel<BFloat16> deform_conv2d_backward<BFloat16>();

}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
