// The blending of the forward pass, which makes rows of sampled channels from the corners' rows, in
// pieces that are done between the steps of a multiplication.
#pragma once

#include <algorithm>
#include <cstddef>

#include "corners.h"
#include "forward_shares.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

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

// The samples of a tile for one tap and offset group as they are blended. Where a corner is
// missing, the column has been blended already.
template <typename A>
using Blends = WeightedCorners<A, kForwardTile>;

// Rows of an image that will be needed soon and are to be prefetched from a far cache.
struct PrefetchRows {
  const std::byte* row = nullptr;
  int64_t rows = 0, stride = 0, bytes = 0;  // bytes from row to row, and of a row

  template <typename E>
  static PrefetchRows of(const E* first, int64_t rows, int64_t stride, int64_t count) {
    constexpr int64_t size = sizeof(E);
    return {reinterpret_cast<const std::byte*>(first), rows, stride * size, count * size};
  }
};

// Blends the columns of some taps piece by piece. Columns have a row for each pixel of the tile,
// with the channels of all offset groups for each tap. A multiplication takes this as its other
// work (see NoWork in matmul.h).
template <typename S, typename A, typename L>
class Blending {
 public:
  static constexpr bool kAny = true;
  // Channels of a piece: so many that it pays to move the multiplication's sums out of registers
  // for it, where registers are few.
  static constexpr int64_t kPiece = 256 / sizeof(A);
  static constexpr int64_t kNever = INT64_C(1) << 62;

  int64_t wait = kNever;

  // Starts on `blends`, which has the samples of each tap and offset group. The pieces are spread
  // over `steps` steps of a multiplication, which reads `stream_bytes` bytes from `stream` on in
  // sequence. The pieces prefetch these bytes and the rows of `ahead`.
  void start(const DeformConv2dShape& shape, const Blends<A>* blends, int64_t taps, int64_t pixels,
             L* columns, int64_t stride, int64_t tap_stride, int64_t steps, const std::byte* stream,
             int64_t stream_bytes, const PrefetchRows& ahead) {
    blends_ = blends;
    end_ = blends + taps * shape.deform_groups;
    deform_groups_ = shape.deform_groups;
    group_channels_ = shape.deform_group_channels();
    pixels_ = pixels;
    tap_columns_ = column_ = columns;
    stride_ = stride;
    tap_stride_ = tap_stride;
    d_ = i_ = c_ = 0;
    const int64_t pieces = (end_ - blends_) * pixels * ((group_channels_ + kPiece - 1) / kPiece);
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
    const int64_t i = i_, c = c_, channels = group_channels_;
    L* const column = column_ + c;
    if (!blends.at.missing[i]) {
      const S* corner[4];
      A weight[4];
      for (int q = 0; q < 4; ++q) {
        corner[q] = reinterpret_cast<const S*>(blends.at.corner[q][i]) + c;
        weight[q] = blends.weight[q][i];
      }
      if (channels >= kPiece) {
#pragma GCC unroll 8
        for (int64_t k = 0; k < kPiece; k += kLanes<A>) blend_register(corner, weight, k, column);
      } else {
        blend(corner, weight, channels, column);
      }
    }
    if (c + kPiece < channels) {
      // The last piece is whole too: it begins earlier, and blends some channels again.
      c_ = std::min(c + kPiece, channels - kPiece);
    } else {
      c_ = 0;
      prefetch_ahead();
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
        column_ = tap_columns_ + d_ * group_channels_;
      }
    }
    prefetch();
  }

  // Does the pieces that are left.
  void finish() {
    while (blends_ != end_) work();
  }

 private:
  // Prefetches the corners of the next piece, a whole piece before they are read.
  __attribute__((always_inline)) void prefetch() {
    constexpr int64_t line = 64 / sizeof(S);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const S* corner = reinterpret_cast<const S*>(blends_->at.corner[q][i_]) + c_;
#pragma GCC unroll 4
      for (int64_t k = 0; k < kPiece; k += line) __builtin_prefetch(corner + k);
    }
  }

  // Prefetches some of the rows that are needed after the last piece.
  __attribute__((always_inline)) void prefetch_ahead() {
    if (ahead_.rows <= 0) return;
    for (int64_t r = 0; r < ahead_rows_; ++r) {
      for (int64_t b = 0; b < ahead_.bytes; b += 64) __builtin_prefetch(ahead_.row + b, 0, 2);
      ahead_.row += ahead_.stride;
    }
    ahead_.rows -= ahead_rows_;
  }

  const Blends<A>* blends_ = nullptr;
  const Blends<A>* end_ = nullptr;
  int64_t deform_groups_, group_channels_, pixels_;
  L* tap_columns_;  // of the current tap
  L* column_;       // of the current pixel and offset group
  int64_t stride_, tap_stride_, pace_;
  const std::byte* stream_;
  int64_t stream_piece_;
  PrefetchRows ahead_;
  int64_t ahead_rows_;  // for each sample
  int64_t d_, i_, c_;   // the next piece: offset group, pixel, channel in the group
};

// Blends a sample that has corners outside the window, which are read from `planes`, the offset
// group's channels. `strays` has room for the channels of four corners.
template <typename T, typename A, typename L>
__attribute__((noinline)) void blend_stray(const DeformConv2dShape& shape,
                                           const ForwardSamples<A>& samples, int64_t i,
                                           const RowWindow<A>& rows, const T* planes, A* strays,
                                           Blends<A>& blends, L* column) {
  const int64_t count = shape.deform_group_channels();
  read_strays(shape, samples, i, rows, planes, count, strays, blends.at);
  const A* corner[4];
  A weight[4];
  for (int q = 0; q < 4; ++q) {
    corner[q] = reinterpret_cast<const A*>(blends.at.corner[q][i]);
    weight[q] = blends.weight[q][i];
  }
  blend(corner, weight, count, column);
}

// Prepares the samples of one tap for blending. `zeros` stands in for the channels of corners that
// do not exist.
template <typename T, typename S, typename A, typename L>
inline void prepare_blends(const DeformConv2dShape& shape, const ForwardTile& tile,
                           const SamplingRows<A>& sampling, int64_t tap, const RowWindow<S>& rows,
                           const T* planes, ForwardSamples<A>& samples,
                           std::remove_const_t<S>* zeros, A* strays, Blends<A>* blends, L* columns,
                           int64_t stride) {
  const int64_t channels = shape.deform_group_channels();
  for (int64_t d = 0; d < shape.deform_groups; ++d, ++blends) {
    locate_samples(shape, tile, sampling, d, tap, samples);
    const bool missing = set_corners<S>(shape.height, shape.width, rows, d * channels, samples,
                                        tile.count, zeros, 0, blends->at);
    set_weights(samples, tile.count, blends->weight);
    // Corners can only be missing in a window, which is of type A.
    if constexpr (std::is_same_v<S, A>) {
      for (int64_t i = 0; missing && i < tile.count; ++i) {
        if (!blends->at.missing[i]) continue;
        blend_stray(shape, samples, i, rows, planes + d * channels * shape.height * shape.width,
                    strays, *blends, columns + i * stride + d * channels);
      }
    }
  }
}

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
