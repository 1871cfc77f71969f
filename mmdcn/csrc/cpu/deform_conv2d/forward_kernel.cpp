// The CPU forward kernel of deform_conv2d, equations (2)-(4) of the design. Compiled once for each
// instruction set, with MMDCN_CPU_CAPABILITY naming the namespace.
//
// For a tile of output pixels and some taps at a time, the input is sampled into `columns`
// (pixels × taps × C), and multiplied by the taps' packed weights into the tile of the output, all
// of it in the second-level cache. Channels are sampled as vectors, from channels-last rows, and in
// between the steps of the multiplication of the taps before, which hides most of what it costs;
// where an offset group has few channels, one by one, over the pixels of the tile.
#include "../matmul.h"
#include "samples.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

using ForwardTile = Tile<kForwardTile>;
using PlanarTile = Tile<kPlanarTile>;
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

// Where there are few pixels to many output channels, sharing out pixels means that each core packs
// weights that the others have to fetch from its caches, and takes their old copies from them: for
// P pixels about 58 / P of all the time on processors whose cores do not share all of their caches.
// Blocks of output channels stay with the core that packs them, but each samples all of the input
// again, which takes as long as multiplying with some 7 output channels.
template <typename T, typename A = accumulator_t<T>>
int64_t out_blocks(const DeformConv2dShape& shape, int64_t threads) {
  const bool even = shape.groups == 1 && shape.out_channels % (threads * kPanelWidth<A>) == 0;
  if (!even || is_planar(shape)) return 1;
  const int64_t pixels = shape.batch * shape.pixels();
  return 7 * (threads - 1) * pixels < 58 * shape.out_channels ? threads : 1;
}

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

// What is larger leaves a core's own caches before it is read again.
constexpr int64_t kFarBytes = 1 << 20;

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
void pack_weight(const DeformConv2dShape& shape, const T* weight, const WeightLayout& layout,
                 int64_t begin, int64_t end, std::byte* packed) {
  constexpr int64_t lanes = kLanes<A>, width = kPanelWidth<A>;
  const int64_t in = shape.group_channels(), out = shape.group_out_channels();
  const int64_t taps = shape.taps(), per_tap = tap_bytes<T>(shape);
  const bool paired = in_pairs<T>(shape);
  // Too much to stay in a core's caches is written past them, as it need not be fetched first then.
  const bool past_caches = packed_bytes<T>(shape) >= kFarBytes;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t group = unit / group_units<A>(shape), part = unit % group_units<A>(shape);
    const int64_t count = std::clamp<int64_t>(out - part * lanes, 0, lanes);
    const T* source = weight + (group * out + part * lanes) * layout.out_stride;
    std::byte* target = packed + group * taps * per_tap;
    // Where this unit's panel begins, for each channel of the depth, and its half of the panel.
    const int64_t panel = part / 2 * width, half = part % 2 * lanes;
    if (!paired && layout.tap_stride != 1) {
      // Channels lie together, and are read on and on.
      for (int64_t tap = 0; tap < taps; ++tap) {
        A* values = reinterpret_cast<A*>(target + tap * per_tap) + panel * in + half;
        for (int64_t k = 0; k < in && count < lanes; ++k) fill_zero(values + k * width, lanes);
        transpose<A>(source + tap * layout.tap_stride, layout.out_stride, count, in, values, width);
      }
      continue;
    }
    for_weight_chunks(in, taps, [&](int64_t c, int64_t channels, int64_t t, int64_t some_taps) {
      A rows[kWeightChunk * kWeightChunk * lanes];
      if (count < lanes) fill_zero(rows, channels * some_taps * lanes);
      load_weight_rows(source, layout, count, c, channels, t, some_taps, rows);
      for (int64_t tap = 0; tap < some_taps; ++tap) {
        std::byte* place = target + (t + tap) * per_tap;
        const auto value = [&](int64_t k) { return rows + (k * some_taps + tap) * lanes; };
        if (!paired) {
          A* values = reinterpret_cast<A*>(place) + panel * in + c * width + half;
          for (int64_t k = 0; k < channels; ++k) {
            const register_t<A> lane_values = load_register(value(k));
            if (past_caches) {
              stream_register(values + k * width, lane_values);
            } else {
              store_register(values + k * width, lane_values);
            }
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
  if (past_caches) finish_streams();
}

// ------------------------------------------------------------------------------ sampling

// column[c] = Σ_q weight[q] corner[q][c] for a register of channels.
template <typename S, typename A, typename L>
inline void blend_register(const S* const (&corner)[4], const A (&weight)[4], int64_t c,
                           L* column) {
  store_register(column + c, weight[0] * load_register(corner[0] + c) +
                                 weight[1] * load_register(corner[1] + c) +
                                 weight[2] * load_register(corner[2] + c) +
                                 weight[3] * load_register(corner[3] + c));
}

// The same for `count` channels.
template <typename S, typename A, typename L>
inline void blend(const S* const (&corner)[4], const A (&weight)[4], int64_t count, L* column) {
  int64_t c = 0;
  for (; c + kLanes<A> <= count; c += kLanes<A>) blend_register(corner, weight, c, column);
  for (; c < count; ++c) {
    store(column + c, weight[0] * load(corner[0] + c) + weight[1] * load(corner[1] + c) +
                          weight[2] * load(corner[2] + c) + weight[3] * load(corner[3] + c));
  }
}

// The samples of a tile for one tap and offset group, ready to be blended.
template <typename A>
struct Blends {
  CornerAddresses<kForwardTile> at;  // at.missing: the column is there already
  A weight[4][kForwardTile];
};

// Rows of an image that will be needed soon and lie in a far cache.
struct Ahead {
  const std::byte* row = nullptr;
  int64_t rows = 0, stride = 0, bytes = 0;  // stride: from row to row

  template <typename E>
  static Ahead of(const E* first, int64_t rows, int64_t stride, int64_t count) {
    constexpr int64_t size = sizeof(E);
    return {reinterpret_cast<const std::byte*>(first), rows, stride * size, count * size};
  }
};

// Blends the columns of some taps piece by piece: for each pixel of the tile a row, of the channels
// of all offset groups for each tap.
template <typename S, typename A, typename L>
class Blending {
 public:
  static constexpr bool kAny = true;
  // Channels of a piece: enough that it is worth pushing the multiplication's sums out of their
  // registers, where these are few.
  static constexpr int64_t kPiece = 256 / sizeof(A);
  static constexpr int64_t kNever = INT64_C(1) << 62;

  int64_t wait = kNever;

  // `blends` has those of each tap and offset group. The work is to be spread over so many steps of
  // a multiplication, which reads, one after the other, so many bytes from `stream` on: these and
  // what is needed next are asked for from the caches along the way.
  void start(const DeformConv2dShape& shape, const Blends<A>* blends, int64_t taps, int64_t pixels,
             L* columns, int64_t stride, int64_t tap_stride, int64_t steps, const std::byte* stream,
             int64_t stream_bytes, const Ahead& ahead) {
    blends_ = blends;
    end_ = blends + taps * shape.deform_groups;
    deform_groups_ = shape.deform_groups;
    part_ = shape.deform_group_channels();
    pixels_ = pixels;
    tap_columns_ = column_ = columns;
    stride_ = stride;
    tap_stride_ = tap_stride;
    d_ = i_ = c_ = 0;
    const int64_t pieces = (end_ - blends_) * pixels * ((part_ + kPiece - 1) / kPiece);
    pace_ = std::max<int64_t>(steps / pieces, 1);
    wait = pace_;
    stream_ = stream;
    stream_piece_ = stream_bytes / pieces;
    ahead_ = ahead;
    const int64_t samples = (end_ - blends_) * pixels;
    ahead_rows_ = (ahead.rows + samples - 1) / samples;
    prefetch();
  }

  __attribute__((always_inline)) void work() {
    wait = pace_;
    for (int64_t b = 0; b < stream_piece_; b += 64) __builtin_prefetch(stream_ + b, 0, 2);
    stream_ += stream_piece_;
    const Blends<A>& blends = *blends_;
    const int64_t i = i_, c = c_, part = part_;
    L* const column = column_ + c;
    if (!blends.at.missing[i]) {
      const S* corner[4];
      A weight[4];
      for (int q = 0; q < 4; ++q) {
        corner[q] = reinterpret_cast<const S*>(blends.at.corner[q][i]) + c;
        weight[q] = blends.weight[q][i];
      }
      if (part >= kPiece) {
#pragma GCC unroll 8
        for (int64_t k = 0; k < kPiece; k += kLanes<A>) blend_register(corner, weight, k, column);
      } else {
        blend(corner, weight, part, column);
      }
    }
    if (c + kPiece < part) {
      // The last piece is a whole one too: it begins earlier, and does some channels again.
      c_ = std::min(c + kPiece, part - kPiece);
    } else {
      c_ = 0;
      reach_ahead();
      column_ += stride_;
      i_ = i + 1;
      if (i_ == pixels_) {
        i_ = 0;
        if (++blends_ == end_) {
          wait = kNever;
          return;
        }
        if (++d_ == deform_groups_) {
          d_ = 0;
          tap_columns_ += tap_stride_;
        }
        column_ = tap_columns_ + d_ * part_;
      }
    }
    prefetch();
  }

  void finish() {
    while (blends_ != end_) work();
  }

 private:
  // Asks for what the next piece will read, which then has time to come from a far cache.
  __attribute__((always_inline)) void prefetch() {
    constexpr int64_t line = 64 / sizeof(S);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const S* corner = reinterpret_cast<const S*>(blends_->at.corner[q][i_]) + c_;
#pragma GCC unroll 4
      for (int64_t k = 0; k < kPiece; k += line) __builtin_prefetch(corner + k);
    }
  }

  // Asks for rows that are needed after all of this.
  __attribute__((always_inline)) void reach_ahead() {
    if (ahead_.rows <= 0) return;
    for (int64_t r = 0; r < ahead_rows_; ++r) {
      for (int64_t b = 0; b < ahead_.bytes; b += 64) __builtin_prefetch(ahead_.row + b, 0, 2);
      ahead_.row += ahead_.stride;
    }
    ahead_.rows -= ahead_rows_;
  }

  const Blends<A>* blends_ = nullptr;
  const Blends<A>* end_ = nullptr;
  int64_t deform_groups_, part_, pixels_;
  L* tap_columns_;  // of the tap at work
  L* column_;       // of the pixel and offset group at work
  int64_t stride_, tap_stride_, pace_;
  const std::byte* stream_;
  int64_t stream_piece_;
  Ahead ahead_;
  int64_t ahead_rows_;  // for each sample
  int64_t d_, i_, c_;   // the next piece: offset group, pixel, channel in the group
};

// A sample that needs pixels beyond the window: those come from `planes`, where the offset group's
// channels begin. `strays` has room for the channels of four corners.
template <typename T, typename A, typename L>
__attribute__((noinline)) void blend_stray(const DeformConv2dShape& shape,
                                           const ForwardSamples<A>& samples, int64_t i,
                                           const Rows<A>& rows, int64_t channel, const T* planes,
                                           A* strays, L* column) {
  const int64_t count = shape.deform_group_channels(), plane = shape.height * shape.width;
  Corners<A, 2> corners;
  if (!corners_of(shape, samples, i, corners)) return fill_zero(column, count);
  const A* corner[4];
  A weight[4];
  for (int q = 0; q < 4; ++q) {
    const int64_t y = samples.low_y[i] + (q >> 1), x = samples.low_x[i] + (q & 1);
    weight[q] = samples.modulation[i] * corners.weight[q];
    A* stray = strays + q * count;
    corner[q] = stray;
    if (corners.position[q] < 0) {
      fill_zero(stray, count);
    } else if (rows.has(y, x)) {
      corner[q] = rows.row(y) + (x - rows.left) * rows.pixel_stride + channel;
    } else {
      const T* source = planes + corners.position[q];
      for (int64_t c = 0; c < count; ++c) stray[c] = load(source + c * plane);
    }
  }
  blend(corner, weight, count, column);
}

// Makes the samples of one tap ready. `zeros` are the channels of corners that do not exist.
template <typename T, typename S, typename A, typename L>
inline void prepare_blends(const DeformConv2dShape& shape, const ForwardTile& tile,
                           const PointRows<A>& points, int64_t tap, const Rows<S>& rows,
                           const T* planes, ForwardSamples<A>& samples,
                           std::remove_const_t<S>* zeros, A* strays, Blends<A>* blends, L* columns,
                           int64_t stride) {
  const int64_t part = shape.deform_group_channels();
  for (int64_t d = 0; d < shape.deform_groups; ++d, ++blends) {
    locate_samples(shape, tile, points, d, tap, samples);
    const bool missing =
        set_corners<S>(shape, rows, d * part, samples, tile.count, zeros, 0, blends->at);
    set_weights(samples, tile.count, blends->weight);
    // Only from a window can anything be missing.
    if constexpr (std::is_same_v<S, A>) {
      for (int64_t i = 0; missing && i < tile.count; ++i) {
        if (!blends->at.missing[i]) continue;
        blend_stray(shape, samples, i, rows, d * part,
                    planes + d * part * shape.height * shape.width, strays,
                    columns + i * stride + d * part);
      }
    }
  }
}

// The columns of one tap and offset group, channel by channel: a row of the tile's pixels for each.
// `input` is the group's.
template <typename T, typename A>
inline void sample_planes(const DeformConv2dShape& shape, const PlanarTile& tile,
                          const Samples<A, kPlanarTile>& samples, const T* input,
                          ImageLayout layout, A* columns) {
  int64_t position[4][kPlanarTile];
  A weight[4][kPlanarTile];
  set_planar_corners(shape, samples, tile.count, layout.pixel_stride, position, weight);
  for (int64_t c = 0; c < shape.deform_group_channels(); ++c) {
    const T* plane = input + c * layout.channel_stride;
    A* row = columns + c * kPlanarTile;
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

// ------------------------------------------------------------------------------ the pass

template <typename A>
inline WindowPlan plan_forward(const DeformConv2dShape& shape) {
  // The same for both layouts, so that the number of tiles is.
  return is_planar(shape) ? no_windows(shape)
                          : plan_windows<A>(shape, shape.channels, kForwardTile);
}

// Tiles are shared out to threads by so many pixels: whole register blocks, but less than a tile,
// so that threads end together. What a pixel's result is does not depend on it, as all of a tile's
// pixels are sampled from the same window.
constexpr int64_t kSharePixels = 12;
constexpr int64_t kShares = kForwardTile / kSharePixels;
static_assert(kShares * kSharePixels == kForwardTile && kSharePixels % kBlockRows == 0, "uneven");

template <typename T, typename A = accumulator_t<T>>
int64_t shares(const DeformConv2dShape& shape) {
  const WindowPlan plan = plan_forward<A>(shape);
  if (is_planar(shape)) return shape.batch * tiles_of_image(shape, plan, kPlanarTile);
  return shape.batch * tiles_of_image(shape, plan, kForwardTile) * kShares;
}

// Taps that are sampled and multiplied together: the deeper a product, the less often its result is
// loaded and stored; but columns must stay in the second-level cache.
inline int64_t taps_together(const DeformConv2dShape& shape) {
  constexpr int64_t deepest = 512;
  const int64_t most = std::clamp<int64_t>(deepest / shape.channels, 1, shape.taps());
  const int64_t parts = (shape.taps() + most - 1) / most;
  return (shape.taps() + parts - 1) / parts;
}

// Scratch memory of one thread. S is what corners are read as, L what columns are kept as.
template <typename S, typename L, typename A>
struct Scratch {
  ForwardTile* tiles;  // three: two at work, and the next, which is only looked at
  ForwardSamples<A>* samples;
  A* sums;        // pixels × groups × padded out channels
  L* columns[2];  // pixels × taps × channels; at work, and the next
  int64_t stride, tap_stride;
  Blends<A>* blends;  // of each tap and offset group
  S* zeros;
  A* strays;
  A* points;  // staged offsets and modulations
  A* window;

  template <typename T>
  Scratch(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors, Arena& arena)
      : tiles(arena.take<ForwardTile>(3)), samples(arena.take<ForwardSamples<A>>(1)) {
    const int64_t taps = taps_together(shape), part = shape.deform_group_channels();
    sums = arena.take<A>(kForwardTile * shape.groups * padded<A>(shape.group_out_channels()));
    tap_stride = 2 * pairs(shape.channels);
    stride = row_stride<L>(taps * tap_stride);
    for (L*& half : columns) half = arena.take<L>(kForwardTile * stride);
    blends = arena.take<Blends<A>>(taps * shape.deform_groups);
    zeros = arena.take<S>(part);
    strays = arena.take<A>(4 * part);
    points = arena.take<A>(
        staged_size<kForwardTile>(shape, tensors.offset, tensors.mask, shape.deform_groups));
    const WindowPlan plan = plan_forward<A>(shape);
    const bool has_window = !tensors.input_layout.channels_last();
    window =
        arena.take<A>(has_window ? window_size<A>(shape.channels, plan.rows, plan.columns) : 0);
  }
};

// Tiles that are worked through together.
constexpr int64_t kPlanarSpan = 4;

// Offset groups that are sampled from planes together, for all taps: their columns must stay in the
// second-level cache.
inline int64_t planar_groups(const DeformConv2dShape& shape) {
  constexpr int64_t deepest = 288;
  const int64_t most = deepest / (shape.taps() * shape.deform_group_channels());
  return std::clamp<int64_t>(most, 1, shape.deform_groups);
}

// The same for sampling from planes.
template <typename A>
struct PlanarScratch {
  PlanarTile* tiles;  // of one span
  Samples<A, kPlanarTile>* samples;
  A* sums;  // for each tile, pixels × groups × padded out channels
  int64_t tile_sums;
  A* columns;  // taps × channels × pixels
  A* points;   // staged offsets and modulations

  template <typename T>
  PlanarScratch(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors, Arena& arena)
      : tiles(arena.take<PlanarTile>(kPlanarSpan)),
        samples(arena.take<Samples<A, kPlanarTile>>(1)) {
    const int64_t groups = planar_groups(shape);
    tile_sums = kPlanarTile * shape.groups * padded<A>(shape.group_out_channels());
    sums = arena.take<A>(kPlanarSpan * tile_sums);
    columns = arena.take<A>(shape.taps() * groups * shape.deform_group_channels() * kPlanarTile);
    points = arena.take<A>(staged_size<kPlanarTile>(shape, tensors.offset, tensors.mask, groups));
  }
};

// The product of one group's columns of `taps` taps with their weights.
template <typename T, typename L, typename A = accumulator_t<T>>
inline Depth depth_of(const DeformConv2dShape& shape, int64_t taps, int64_t tap_stride) {
  const int64_t in = shape.group_channels();
  return {std::is_same_v<L, A> ? in : pairs(in), taps, tap_stride,
          tap_bytes<T>(shape) / static_cast<int64_t>(sizeof(L))};
}

// tile = or += columns · weights, for all groups, in whose steps `work` is done.
template <typename T, Into into, typename L, typename A, typename Work>
inline void multiply_taps(const DeformConv2dShape& shape, int64_t pixels, const Depth& depth,
                          const L* columns, int64_t stride, const std::byte* weight, A* sums,
                          Work& work) {
  const int64_t in = shape.group_channels(), out = shape.group_out_channels();
  const int64_t row = kPanelWidth<A> * (std::is_same_v<L, A> ? 1 : 2);
  for (int64_t g = 0; g < shape.groups; ++g) {
    const std::byte* values = weight + g * shape.taps() * tap_bytes<T>(shape);
    const Panels<L> panels = {reinterpret_cast<const L*>(values), depth.steps * row,
                              kPanelWidth<A>};
    multiply<Order::kRows, into>(pixels, out, depth, columns + g * in, stride, panels,
                                 sums + g * padded<A>(out), shape.groups * padded<A>(out), work);
  }
}

// The same for the channels [begin, end) and all taps, of which the columns are rows of pixels.
template <typename T, typename A>
inline void multiply_planes(const DeformConv2dShape& shape, int64_t pixels, int64_t begin,
                            int64_t end, const A* columns, int64_t tap_stride,
                            const std::byte* weight, A* sums) {
  const int64_t in = shape.group_channels(), out = shape.group_out_channels();
  const int64_t per_tap = tap_bytes<T>(shape);
  NoWork none;
  for (int64_t g = begin / in; g * in < end; ++g) {
    const int64_t first = std::max(g * in, begin), last = std::min((g + 1) * in, end);
    const A* values = reinterpret_cast<const A*>(weight + g * shape.taps() * per_tap);
    const Depth depth = {last - first, shape.taps(), tap_stride,
                         per_tap / static_cast<int64_t>(sizeof(A))};
    const Panels<A> panels = {values + (first - g * in) * kPanelWidth<A>, in * kPanelWidth<A>,
                              kPanelWidth<A>};
    multiply<Order::kColumns, Into::kAdd>(
        pixels, out, depth, columns + (first - begin) * kPlanarTile, kPlanarTile, panels,
        sums + g * padded<A>(out), shape.groups * padded<A>(out), none);
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

template <int kMost, typename T, typename A = accumulator_t<T>>
inline void store_tile(const DeformConv2dShape& shape, const Tile<kMost>& tile, const A* sums,
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

// Tensors of one image.
template <typename T, typename A = accumulator_t<T>>
struct Image {
  const T* input;
  PointTensor<A> offset, mask;
  T* output;

  Image(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors, int64_t number) {
    input = tensors.input + number * shape.channels * shape.height * shape.width;
    offset = tensors.offset.image(number);
    mask = tensors.mask.image(number);
    output = tensors.output + number * tensors.output_image;
  }
};

// Sampling from the planes, some offset groups at a time. Every row of offsets begins on another
// page of memory: several tiles read on in it before the next offset groups' rows, so that finding
// its page is paid for once.
template <typename T, typename A = accumulator_t<T>>
inline void run_planes(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors,
                       int64_t begin, int64_t end, std::byte* memory) {
  const WindowPlan plan = plan_forward<A>(shape);
  const int64_t per_image = tiles_of_image(shape, plan, kPlanarTile);
  const int64_t taps = shape.taps(), part = shape.deform_group_channels();
  const int64_t most = planar_groups(shape), tap_stride = most * part * kPlanarTile;
  const ImageLayout layout = tensors.input_layout;
  Arena arena(memory);
  const PlanarScratch<A> scratch(shape, tensors, arena);
  for (int64_t unit = begin; unit < end;) {
    const Image<T> image(shape, tensors, unit / per_image);
    const int64_t tiles = std::min({kPlanarSpan, end - unit, per_image - unit % per_image});
    for (int64_t t = 0; t < tiles; ++t) {
      set_tile(shape, plan, (unit + t) % per_image, scratch.tiles[t]);
      start_tile(shape, tensors, scratch.tiles[t].count, scratch.sums + t * scratch.tile_sums);
    }
    for (int64_t first = 0; first < shape.deform_groups; first += most) {
      const int64_t last = std::min(first + most, shape.deform_groups);
      for (int64_t t = 0; t < tiles; ++t) {
        const PlanarTile& tile = scratch.tiles[t];
        const PointRows<A> points =
            point_rows(shape, tile, image.offset, image.mask, first, last - first, scratch.points);
        for (int64_t d = first; d < last; ++d) {
          for (int64_t tap = 0; tap < taps; ++tap) {
            prefetch_points(tile, points, points.row(shape, d, tap) + 1);
            locate_samples(shape, tile, points, d, tap, *scratch.samples);
            sample_planes(shape, tile, *scratch.samples,
                          image.input + d * part * layout.channel_stride, layout,
                          scratch.columns + tap * tap_stride + (d - first) * part * kPlanarTile);
          }
        }
        multiply_planes<T>(shape, tile.count, first * part, last * part, scratch.columns,
                           tap_stride, tensors.weight, scratch.sums + t * scratch.tile_sums);
      }
    }
    for (int64_t t = 0; t < tiles; ++t) {
      store_tile(shape, scratch.tiles[t], scratch.sums + t * scratch.tile_sums, image.output,
                 tensors.output_layout);
    }
    unit += tiles;
  }
}

// Sampling rows of channels: of the image itself, as S = T, or of a window on it, as S = A. `begin`
// and `end` count shares of tiles.
template <typename T, typename S, typename L, typename A = accumulator_t<T>>
inline void run_rows(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors,
                     int64_t begin, int64_t end, std::byte* memory) {
  const WindowPlan plan = plan_forward<A>(shape);
  const int64_t per_image = tiles_of_image(shape, plan, kForwardTile);
  const int64_t taps = shape.taps(), together = taps_together(shape);
  const int64_t parts = (taps + together - 1) / together;
  const bool direct = tensors.input_layout.channels_last();
  Arena arena(memory);
  const Scratch<S, L, A> scratch(shape, tensors, arena);
  Rows<A> window = {};
  PointRows<A> points = {};
  Blending<S, A, L> blending;
  fill_zero(scratch.zeros, shape.deform_group_channels());
  if constexpr (!std::is_same_v<L, A>) {
    // Between taps, where the number of channels is odd, lies the second half of the last pair.
    for (L* half : scratch.columns) fill_zero(half, kForwardTile * scratch.stride);
  }

  // The first share may lie behind the end of a tile that is not full.
  int64_t first_tile = begin / kShares;
  const int64_t last_tile = (end - 1) / kShares;
  set_tile(shape, plan, first_tile % per_image, *scratch.tiles);
  if (scratch.tiles->count <= begin % kShares * kSharePixels) ++first_tile;
  if (first_tile > last_tile) return;

  // The taps of a tile are worked through in parts; parts of all tiles form one sequence, in which
  // the columns of a part are blended while the part before is multiplied.
  const auto columns_of = [&](int64_t unit, int64_t part) {
    return scratch.columns[(unit * parts + part) % 2];
  };
  const auto taps_of = [&](int64_t part) { return std::min(together, taps - part * together); };
  // One tap's weights are read in one sweep, from a far cache where all taps' are large.
  const int64_t stream_bytes = shape.groups == 1 && together == 1 ? tap_bytes<T>(shape) : 0;
  const int64_t first_panel = stream_bytes * kPanelWidth<A> / padded<A>(shape.out_channels);
  // The rows that a tile should find in the window. The first one's need not wait for all of those
  // that the window has room for.
  const auto range_of = [&](const ForwardTile& tile) {
    WindowRange range = range_around(shape, tile, plan, plan.rows, plan.columns);
    const int64_t reached =
        shape.y.base(tile.y[tile.count - 1], shape.kernel_height - 1) + 2 + kMargin;
    range.end = std::clamp(reached, range.begin, range.end);
    return range;
  };
  // What is needed soonest after a part of `unit` is blended, in planes: where the tile at work is
  // stored once it is multiplied, or what enters the window for the next one. Channels-last images
  // are read and written in runs that the processor foresees.
  const auto needed_after = [&](int64_t unit, int64_t part) -> Ahead {
    if (direct) return {};
    if (part == 0 && unit > first_tile) {
      const auto& run = scratch.tiles[(unit - 1) % 2].run[0];
      return Ahead::of(Image<T>(shape, tensors, (unit - 1) / per_image).output + run.pixel,
                       shape.out_channels, tensors.output_layout.channel_stride, run.count);
    }
    if (part + 1 < parts || unit == last_tile || (unit + 1) % per_image == 0) return {};
    ForwardTile& next = scratch.tiles[2];
    set_tile(shape, plan, (unit + 1) % per_image, next);
    const Image<T> image(shape, tensors, unit / per_image);
    const WindowRange range = range_of(next);
    const int64_t rows = range.end - window.end;
    if (range.left != window.left || rows <= 0 || range.begin > window.end) return {};
    return Ahead::of(image.input + window.end * shape.width + range.left, shape.channels,
                     shape.height * shape.width, (rows - 1) * shape.width + plan.columns);
  };
  const auto prepare = [&](int64_t unit, int64_t part, int64_t steps, const std::byte* stream) {
    ForwardTile& tile = scratch.tiles[unit % 2];
    const Image<T> image(shape, tensors, unit / per_image);
    if (part == 0) {
      set_tile(shape, plan, unit % per_image, tile);
      if (!direct) {
        if (unit == first_tile || unit % per_image == 0) {
          window = empty_window(scratch.window, shape.channels, plan.rows, plan.columns);
        }
        roll_input(shape, range_of(tile), image.input, shape.channels, window);
      }
      crop(tile, (begin - unit * kShares) * kSharePixels, (end - unit * kShares) * kSharePixels);
      points =
          point_rows(shape, tile, image.offset, image.mask, 0, shape.deform_groups, scratch.points);
    }
    const auto ready = [&](const auto& rows) {
      L* columns = columns_of(unit, part);
      for (int64_t t = 0; t < taps_of(part); ++t) {
        prepare_blends(shape, tile, points, part * together + t, rows, image.input,
                       *scratch.samples, scratch.zeros, scratch.strays,
                       scratch.blends + t * shape.deform_groups, columns + t * scratch.tap_stride,
                       scratch.stride);
      }
      blending.start(shape, scratch.blends, taps_of(part), tile.count, columns, scratch.stride,
                     scratch.tap_stride, steps, stream, stream_bytes, needed_after(unit, part));
    };
    if constexpr (std::is_same_v<S, A>) {
      if (!direct) return ready(window);
    }
    if constexpr (std::is_same_v<S, T>) ready(whole_image(shape, image.input));
  };

  prepare(first_tile, 0, 0, tensors.weight);
  for (int64_t unit = first_tile; unit <= last_tile; ++unit) {
    const ForwardTile& tile = scratch.tiles[unit % 2];
    T* output = Image<T>(shape, tensors, unit / per_image).output;
    A* sums = scratch.sums;
    bool in_place = false;
    if constexpr (std::is_same_v<T, A>) {
      // The sums of pixels that follow one another have the layout of channels-last output.
      in_place = tensors.output_layout.channels_last() && tile.runs == 1 &&
                 tensors.output_layout.pixel_stride ==
                     shape.groups * padded<A>(shape.group_out_channels());
      if (in_place) sums = output + tile.run[0].pixel * tensors.output_layout.pixel_stride;
    }
    if (tensors.bias) start_tile(shape, tensors, tile.count, sums);
    for (int64_t part = 0; part < parts; ++part) {
      const Depth depth = depth_of<T, L>(shape, taps_of(part), scratch.tap_stride);
      const int64_t steps =
          shape.groups * whole_steps<A>(tile.count, shape.group_out_channels(), depth);
      const std::byte* weight = tensors.weight + part * together * tap_bytes<T>(shape);
      blending.finish();
      if (part + 1 < parts) {
        prepare(unit, part + 1, steps, weight + first_panel);
      } else if (unit < last_tile) {
        prepare(unit + 1, 0, steps, weight + first_panel);
      }
      const L* columns = columns_of(unit, part);
      if (part > 0 || tensors.bias) {
        multiply_taps<T, Into::kAdd>(shape, tile.count, depth, columns, scratch.stride, weight,
                                     sums, blending);
      } else {
        multiply_taps<T, Into::kSet>(shape, tile.count, depth, columns, scratch.stride, weight,
                                     sums, blending);
      }
    }
    if (!in_place) store_tile(shape, tile, sums, output, tensors.output_layout);
  }
}

// Calls `function` with values of the types S and L that a call of the kernel works with.
template <typename T, typename F>
inline void with_types(const DeformConv2dShape& shape, ImageLayout layout, const F& function) {
  using A = accumulator_t<T>;
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (in_pairs<T>(shape)) {
      return layout.channels_last() ? function(T{}, T{}) : function(A{}, T{});
    }
  }
#else
  (void)shape;
#endif
  layout.channels_last() ? function(T{}, A{}) : function(A{}, A{});
}

template <typename T, typename A = accumulator_t<T>>
int64_t scratch_bytes(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors) {
  Arena arena(nullptr);
  if (is_planar(shape)) {
    PlanarScratch<A>(shape, tensors, arena);
  } else {
    with_types<T>(shape, tensors.input_layout, [&](auto s, auto l) {
      Scratch<decltype(s), decltype(l), A>(shape, tensors, arena);
    });
  }
  return arena.used();
}

template <typename T>
void run(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors, int64_t begin,
         int64_t end, std::byte* scratch) {
  if (begin == end) return;
  if (is_planar(shape)) return run_planes(shape, tensors, begin, end, scratch);
  with_types<T>(shape, tensors.input_layout, [&](auto s, auto l) {
    run_rows<T, decltype(s), decltype(l)>(shape, tensors, begin, end, scratch);
  });
}

}  // namespace

template <typename T>
ForwardKernel<T> deform_conv2d_forward() {
  return {out_blocks<T>, pack_units<T>,    packed_bytes<T>, pack_weight<T>,
          shares<T>,     scratch_bytes<T>, run<T>};
}

template ForwardKernel<double> deform_conv2d_forward<double>();
template ForwardKernel<float> deform_conv2d_forward<float>();
template ForwardKernel<Half> deform_conv2d_forward<Half>();
template ForwardKernel<BFloat16> deform_conv2d_forward<BFloat16>();

}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
