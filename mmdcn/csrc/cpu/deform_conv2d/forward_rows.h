// The forward pass for offset groups of many channels, which are sampled as vectors, from
// channels-last rows, while the samples before them are multiplied.
#pragma once

#include <algorithm>
#include <cstddef>

#include "../arena.h"
#include "blending.h"
#include "forward_shares.h"
#include "forward_weights.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// Taps that are sampled and multiplied together. The deeper a product is, the less often its sums
// are loaded and stored, but the columns must stay in the second-level cache.
inline int64_t taps_together(const DeformConv2dShape& shape) {
  constexpr int64_t deepest = 512;
  const int64_t most = std::clamp<int64_t>(deepest / shape.channels, 1, shape.taps());
  const int64_t chunks = (shape.taps() + most - 1) / most;
  return (shape.taps() + chunks - 1) / chunks;
}

// Scratch memory of one thread. S is the type that corners are read in, L that of the columns.
template <typename S, typename L, typename A>
struct RowScratch {
  ForwardTile* tiles;  // three: two in the pipeline, and a third for looking ahead
  ForwardSamples<A>* samples;
  A* sums;        // pixels × groups × padded out channels
  L* columns[2];  // pixels × taps × channels, of the current chunk of taps and of the next
  int64_t stride, tap_stride;
  Blends<A>* blends;  // of each tap and offset group
  S* zeros;
  A* strays;
  A* sampling;  // staged offsets and modulations
  A* window;

  template <typename T>
  RowScratch(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors, Arena& arena)
      : tiles(arena.take<ForwardTile>(3)), samples(arena.take<ForwardSamples<A>>(1)) {
    const int64_t taps = taps_together(shape), channels = shape.deform_group_channels();
    sums = arena.take<A>(kForwardTile * shape.groups * padded<A>(shape.group_out_channels()));
    tap_stride = 2 * pairs(shape.channels);
    stride = row_stride<L>(taps * tap_stride);
    for (L*& half : columns) half = arena.take<L>(kForwardTile * stride);
    blends = arena.take<Blends<A>>(taps * shape.deform_groups);
    zeros = arena.take<S>(channels);
    strays = arena.take<A>(4 * channels);
    sampling = arena.take<A>(
        staged_size<kForwardTile>(shape, tensors.offset, tensors.mask, shape.deform_groups));
    const WindowPlan plan = plan_forward<A>(shape);
    const bool has_window = !tensors.input_layout.channels_last();
    window =
        arena.take<A>(has_window ? window_size<A>(shape.channels, plan.rows, plan.columns) : 0);
  }
};

// The depth of the product of one group's columns of `taps` taps with their weights.
template <typename T, typename L, typename A = accumulator_t<T>>
inline Depth depth_of(const DeformConv2dShape& shape, int64_t taps, int64_t tap_stride) {
  const int64_t in = shape.group_channels();
  return {std::is_same_v<L, A> ? in : pairs(in), taps, tap_stride,
          tap_bytes<Sampling::kRows, T>(shape) / static_cast<int64_t>(sizeof(L))};
}

// sums = or += columns · weights, for all groups, with `work` between the steps.
template <typename T, Into into, typename L, typename A, typename Work>
inline void multiply_taps(const DeformConv2dShape& shape, int64_t pixels, const Depth& depth,
                          const L* columns, int64_t stride, const std::byte* weight, A* sums,
                          Work& work) {
  const int64_t in = shape.group_channels(), out = shape.group_out_channels();
  const int64_t row = kPanelWidth<A> * (std::is_same_v<L, A> ? 1 : 2);
  for (int64_t g = 0; g < shape.groups; ++g) {
    const std::byte* values = weight + g * shape.taps() * tap_bytes<Sampling::kRows, T>(shape);
    const Panels<L> panels = {reinterpret_cast<const L*>(values), depth.steps * row,
                              kPanelWidth<A>};
    multiply<Order::kRows, into>(pixels, out, depth, columns + g * in, stride, panels,
                                 sums + g * padded<A>(out), shape.groups * padded<A>(out), work);
  }
}

// The software pipeline of one thread. The taps of a tile are divided into chunks, and the chunks
// of all tiles form one sequence, in which the columns of a chunk are blended while the chunk
// before it is multiplied. Samples are read from rows of channels, either of the image itself,
// where S = T, or of a window on it, where S = A.
template <typename T, typename S, typename L, typename A = accumulator_t<T>>
class RowPipeline {
 public:
  // `begin` and `end` count shares of tiles.
  RowPipeline(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors, int64_t begin,
              int64_t end, std::byte* memory)
      : shape_(shape),
        tensors_(tensors),
        begin_(begin),
        end_(end),
        plan_(plan_forward<A>(shape)),
        per_image_(tiles_of_image(shape, plan_, kForwardTile)),
        together_(taps_together(shape)),
        chunks_((shape.taps() + together_ - 1) / together_),
        direct_(tensors.input_layout.channels_last()),
        arena_(memory),
        scratch_(shape, tensors, arena_),
        first_tile_(begin / kShares),
        last_tile_((end - 1) / kShares) {
    // With one tap to a chunk the weights are large, and are read in sequence from a far cache.
    stream_bytes_ = shape.groups == 1 && together_ == 1 ? tap_bytes<Sampling::kRows, T>(shape) : 0;
    first_panel_ = stream_bytes_ * kPanelWidth<A> / padded<A>(shape.out_channels);
    fill_zero(scratch_.zeros, shape.deform_group_channels());
    if constexpr (!std::is_same_v<L, A>) {
      // If the number of channels is odd, the second element of a tap's last pair is never blended.
      for (L* half : scratch_.columns) fill_zero(half, kForwardTile * scratch_.stride);
    }
    // The first share may lie beyond the end of a tile that is not full.
    set_tile(shape, plan_, first_tile_ % per_image_, *scratch_.tiles);
    if (scratch_.tiles->count <= begin % kShares * kSharePixels) ++first_tile_;
  }

  void run() {
    if (first_tile_ > last_tile_) return;
    [[maybe_unused]] const RegistersFor<L> registers;
    prepare(first_tile_, 0, 0, tensors_.weight);
    for (int64_t tile = first_tile_; tile <= last_tile_; ++tile) multiply_tile(tile);
  }

 private:
  // Tiles are numbered over the whole batch. Two of consecutive numbers are kept at a time.
  ForwardTile& tile_of(int64_t number) const { return scratch_.tiles[number % 2]; }
  Image<T> image_of(int64_t number) const {
    return Image<T>(shape_, tensors_, number / per_image_);
  }
  L* columns_of(int64_t number, int64_t chunk) const {
    return scratch_.columns[(number * chunks_ + chunk) % 2];
  }
  int64_t taps_of(int64_t chunk) const {
    return std::min(together_, shape_.taps() - chunk * together_);
  }

  // The rows of planes that are needed soonest after a chunk has been blended: those that the tile
  // before is stored to, or those that enter the window for the next tile. Channels-last images
  // need none, as they are read and written in sequence, which the processor prefetches by itself.
  PrefetchRows rows_after(int64_t number, int64_t chunk) const {
    if (direct_) return {};
    if (chunk == 0 && number > first_tile_) {
      const auto& run = tile_of(number - 1).run[0];
      return PrefetchRows::of(image_of(number - 1).output + run.pixel, shape_.out_channels,
                              tensors_.output_layout.channel_stride, run.count);
    }
    if (chunk + 1 < chunks_ || number == last_tile_ || (number + 1) % per_image_ == 0) return {};
    ForwardTile& next = scratch_.tiles[2];
    set_tile(shape_, plan_, (number + 1) % per_image_, next);
    const WindowRange range = forward_range(shape_, plan_, next);
    const int64_t rows = range.end - window_.end;
    if (range.left != window_.left || rows <= 0 || range.begin > window_.end) return {};
    return PrefetchRows::of(image_of(number).input + window_.end * shape_.width + range.left,
                            shape_.channels, shape_.height * shape_.width,
                            (rows - 1) * shape_.width + plan_.columns);
  }

  // Sets the tile, moves the window to it, and finds its offsets and modulations.
  void enter_tile(int64_t number, const Image<T>& image) {
    ForwardTile& tile = tile_of(number);
    set_tile(shape_, plan_, number % per_image_, tile);
    if (!direct_) {
      if (number == first_tile_ || number % per_image_ == 0) {
        window_ = empty_window(scratch_.window, shape_.channels, plan_.rows, plan_.columns);
      }
      roll_input(shape_, forward_range(shape_, plan_, tile), image.input, shape_.channels, window_);
    }
    crop(tile, (begin_ - number * kShares) * kSharePixels,
         (end_ - number * kShares) * kSharePixels);
    sampling_ = sampling_rows(shape_, tile, image.offset, image.mask, 0, shape_.deform_groups,
                              scratch_.sampling);
  }

  // Prepares a chunk for blending during the `steps` steps of the multiplication of the chunk
  // before it, which reads its weights from `stream` on.
  void prepare(int64_t number, int64_t chunk, int64_t steps, const std::byte* stream) {
    const Image<T> image = image_of(number);
    if (chunk == 0) enter_tile(number, image);
    if constexpr (std::is_same_v<S, A>) {
      if (!direct_) return prepare_from(window_, image, number, chunk, steps, stream);
    }
    if constexpr (std::is_same_v<S, T>) {
      prepare_from(whole_image(image.input, shape_.height, shape_.width, shape_.channels), image,
                   number, chunk, steps, stream);
    }
  }

  template <typename Source>
  void prepare_from(const Source& rows, const Image<T>& image, int64_t number, int64_t chunk,
                    int64_t steps, const std::byte* stream) {
    const ForwardTile& tile = tile_of(number);
    const int64_t taps = taps_of(chunk);
    L* columns = columns_of(number, chunk);
    for (int64_t t = 0; t < taps; ++t) {
      prepare_blends(shape_, tile, sampling_, chunk * together_ + t, rows, image.input,
                     *scratch_.samples, scratch_.zeros, scratch_.strays,
                     scratch_.blends + t * shape_.deform_groups, columns + t * scratch_.tap_stride,
                     scratch_.stride);
    }
    blending_.start(shape_, scratch_.blends, taps, tile.count, columns, scratch_.stride,
                    scratch_.tap_stride, steps, stream, stream_bytes_, rows_after(number, chunk));
  }

  // The tile's position in the output if the sums can be computed there: if the output is
  // channels-last without padding, and the tile's pixels follow one another in it. Otherwise null.
  A* sums_in_output(const ForwardTile& tile, T* output) const {
    if constexpr (std::is_same_v<T, A>) {
      const int64_t stride = tensors_.output_layout.pixel_stride;
      if (tensors_.output_layout.channels_last() && tile.runs == 1 &&
          stride == shape_.groups * padded<A>(shape_.group_out_channels())) {
        return output + tile.run[0].pixel * stride;
      }
    }
    return nullptr;
  }

  void multiply_tile(int64_t number) {
    const ForwardTile& tile = tile_of(number);
    T* output = image_of(number).output;
    A* in_output = sums_in_output(tile, output);
    A* sums = in_output ? in_output : scratch_.sums;
    if (tensors_.bias) start_tile(shape_, tensors_, tile.count, sums);
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) multiply_chunk(number, chunk, sums);
    if (!in_output) store_tile(shape_, tile, sums, output, tensors_.output_layout);
  }

  // Multiplies a chunk, after blending what is left of its columns, and blends the next one
  // meanwhile.
  void multiply_chunk(int64_t number, int64_t chunk, A* sums) {
    const int64_t pixels = tile_of(number).count;
    const Depth depth = depth_of<T, L>(shape_, taps_of(chunk), scratch_.tap_stride);
    const int64_t steps =
        shape_.groups * whole_steps<L, A>(pixels, shape_.group_out_channels(), depth);
    const std::byte* weight =
        tensors_.weight + chunk * together_ * tap_bytes<Sampling::kRows, T>(shape_);
    blending_.finish();
    if (chunk + 1 < chunks_) {
      prepare(number, chunk + 1, steps, weight + first_panel_);
    } else if (number < last_tile_) {
      prepare(number + 1, 0, steps, weight + first_panel_);
    }
    const L* columns = columns_of(number, chunk);
    if (chunk > 0 || tensors_.bias) {
      multiply_taps<T, Into::kAdd>(shape_, pixels, depth, columns, scratch_.stride, weight, sums,
                                   blending_);
    } else {
      multiply_taps<T, Into::kSet>(shape_, pixels, depth, columns, scratch_.stride, weight, sums,
                                   blending_);
    }
  }

  const DeformConv2dShape& shape_;
  const ForwardTensors<T>& tensors_;
  const int64_t begin_, end_;
  const WindowPlan plan_;
  const int64_t per_image_;  // tiles of an image
  const int64_t together_;   // taps of a chunk
  const int64_t chunks_;     // of a tile
  const bool direct_;        // whether samples are read from the image itself
  Arena arena_;
  const RowScratch<S, L, A> scratch_;
  int64_t first_tile_;
  const int64_t last_tile_;
  int64_t stream_bytes_;  // of a chunk's weights, which are prefetched; 0 if they are near
  int64_t first_panel_;   // bytes of their first panel, which comes too early to be prefetched
  RowWindow<A> window_ = {};
  SamplingRows<A> sampling_ = {};  // offsets and modulations of the tile that was entered last
  Blending<S, A, L> blending_;
};

// Calls `function` with values of the types S and L of RowScratch for this shape and layout.
template <typename T, typename F>
inline void with_types(const DeformConv2dShape& shape, ImageLayout layout, const F& function) {
  using A = accumulator_t<T>;
  if constexpr (kHasPairs && std::is_same_v<T, BFloat16>) {
    if (in_pairs<Sampling::kRows, T>(shape)) {
      return layout.channels_last() ? function(T{}, T{}) : function(A{}, T{});
    }
  }
  layout.channels_last() ? function(T{}, A{}) : function(A{}, A{});
}

template <typename T, typename A = accumulator_t<T>>
int64_t row_scratch_bytes(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors) {
  Arena arena(nullptr);
  with_types<T>(shape, tensors.input_layout, [&](auto s, auto l) {
    RowScratch<decltype(s), decltype(l), A>(shape, tensors, arena);
  });
  return arena.used();
}

template <typename T>
void run_rows(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors, int64_t begin,
              int64_t end, std::byte* memory) {
  if (begin == end) return;
  with_types<T>(shape, tensors.input_layout, [&](auto s, auto l) {
    RowPipeline<T, decltype(s), decltype(l)>(shape, tensors, begin, end, memory).run();
  });
}

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
