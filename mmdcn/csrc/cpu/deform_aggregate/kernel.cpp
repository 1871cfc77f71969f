// The CPU kernels of deform_aggregate. Compiled once for each instruction set, with
// MMDCN_CPU_CAPABILITY naming the namespace.
//
// The samples of some output pixels and one group are located together; then, pixel by pixel, the
// rows of channels of their corners are added up, or the gradients of these rows are.
#include "kernel.h"

#include <algorithm>

#include "../arena.h"
#include "../row_gradients.h"
#include "../row_sums.h"
#include "../rows.h"
#include "locator.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// The corners of a batch's samples.
template <typename A>
using BatchCorners = WeightedCorners<A, kMostSamples>;

// The first element of an image of the input's sizes.
template <typename S>
inline S* image_of(const DeformAggregateShape& shape, S* images, int64_t number) {
  return images + number * shape.y.size * shape.x.size * shape.channels;
}

template <typename S>
inline RowWindow<S> rows_of(const DeformAggregateShape& shape, S* image) {
  return whole_image(image, shape.y.size, shape.x.size, shape.channels);
}

// The forward pass of one thread.
template <typename T, typename A = accumulator_t<T>>
class ForwardPass {
 public:
  ForwardPass(const DeformAggregateShape& shape, const AggregateTensors<T>& tensors, Arena& arena)
      : shape_(shape),
        tensors_(tensors),
        locator_(shape, arena),
        corners_(arena.take<BatchCorners<A>>(1)),
        zeros_(arena.take<T>(shape.group_channels())),
        sums_(arena.take<A>(shape.taps() > kMostSamples ? shape.channels : 0)) {}

  void run(int64_t begin, int64_t end) {
    fill_zero(zeros_, shape_.group_channels());
    for (int64_t pixel = begin; pixel < end;) {
      const int64_t image = pixel / shape_.pixels();
      const int64_t last = std::min(end, (image + 1) * shape_.pixels());
      for_batches(shape_, pixel, last, [&](const Batch& batch) { sum_batch(batch, image); });
      pixel = last;
    }
  }

 private:
  void sum_batch(const Batch& batch, int64_t image) {
    const int64_t channels = shape_.group_channels();
    const A* offset = tensors_.offset + batch.pixel * tensors_.offset_layout.pixel_stride;
    const A* mask = tensors_.mask + batch.pixel * tensors_.mask_layout.pixel_stride;
    const RowWindow<const T> rows = rows_of(shape_, image_of(shape_, tensors_.input, image));
    locator_.start(batch);
    for (int64_t group = 0; group < shape_.groups; ++group) {
      const auto& samples = locator_.locate(
          batch, offset + group * tensors_.offset_layout.group_stride,
          tensors_.offset_layout.pixel_stride, mask + group * tensors_.mask_layout.group_stride,
          tensors_.mask_layout.pixel_stride);
      set_corners<const T>(shape_.y.size, shape_.x.size, rows, group * channels, samples,
                           batch.count(), zeros_, 0, corners_->at);
      set_weights(samples, batch.count(), corners_->weight);
      for (int64_t j = 0; j < batch.pixels; ++j) sum_pixel(batch, j, group * channels);
    }
  }

  // Sums the samples of pixel number j of a batch, for the group that begins with `channel`.
  void sum_pixel(const Batch& batch, int64_t j, int64_t channel) const {
    const PixelSamples<A> samples = {&corners_->at.corner[0][j * batch.taps],
                                     &corners_->weight[0][j * batch.taps],
                                     kMostSamples,
                                     1,
                                     1,
                                     batch.taps};
    const int64_t channels = shape_.group_channels();
    T* target = tensors_.output + (batch.pixel + j) * shape_.channels + channel;
    if (batch.taps == shape_.taps()) {
      return sum_samples<T, A>(samples, NoTapWeights{}, channels, nullptr, target);
    }
    A* sums = sums_ + channel;
    sum_samples<T, A>(samples, NoTapWeights{}, channels, batch.tap > 0 ? sums : nullptr, sums);
    if (batch.tap + batch.taps < shape_.taps()) return;
    copy_row<A>(sums, channels, target);
  }

  const DeformAggregateShape& shape_;
  const AggregateTensors<T>& tensors_;
  Locator<A> locator_;
  BatchCorners<A>* const corners_;
  T* const zeros_;  // stands in for the channels of corners that do not exist
  A* const sums_;   // of one pixel whose taps come in several batches
};

// The backward pass of some blocks of channels of one strip of an image. The samples of a group are
// located once for all of its blocks.
template <typename T, typename A = accumulator_t<T>>
class BackwardPass {
 public:
  using Strip = ImageStrip<A>;

  BackwardPass(const DeformAggregateShape& shape, const AggregateTensors<T>& tensors, Arena& arena)
      : shape_(shape),
        tensors_(tensors),
        locator_(shape, arena),
        read_(arena.take<BatchCorners<A>>(1)),
        added_(arena.take<CornerAddresses<kMostSamples>>(1)),
        dots_(arena.take<SampleDots<A, kMostSamples>>(1)),
        gradients_(arena.take<ThreeGradients<A, kMostSamples>>(1)),
        grad_offset_(arena.take<A>(2 * kMostSamples)),
        zeros_(arena.take<T>(shape.group_channels())),
        sinks_(arena.take<A>(4 * shape.group_channels())),
        rows_(arena.take<A>(kConverts ? batch_pixels(shape) * shape.group_channels() : 0)),
        row_of_(arena.take<int64_t>(kMostSamples)) {}

  void run(const ChannelBlocks& blocks, int64_t begin, int64_t end, const Strip& strip) {
    fill_zero(zeros_, shape_.group_channels());
    fill_zero(sinks_, 4 * shape_.group_channels());
    const int64_t taps = std::min<int64_t>(shape_.taps(), kMostSamples);
    const int64_t row = kConverts ? shape_.group_channels() : shape_.channels;
    for (int64_t s = 0; s < kMostSamples; ++s) row_of_[s] = s / taps * row;
    while (begin < end) {
      const int64_t start = start_of(blocks, begin, strip);
      int64_t until = begin + 1;
      while (until < end && start_of(blocks, until, strip) == start) ++until;
      const auto run = [&](const Batch& batch) { run_batch(batch, blocks, begin, until, strip); };
      for_batches(shape_, start, strip.end, run);
      for_batches(shape_, strip.begin, start, run);
      begin = until;
    }
  }

 private:
  // Whether gradients of the outputs are converted before they are used.
  static constexpr bool kConverts = !std::is_same_v<T, A>;

  // The output pixel that a block begins with. If threads went through the same pixels at the same
  // time, they would wait for each other's cache lines: their channels lie side by side.
  int64_t start_of(const ChannelBlocks& blocks, int64_t number, const Strip& strip) const {
    const int64_t most = batch_pixels(shape_), pixels = strip.end - strip.begin;
    const bool late = 2 * number >= shape_.groups * blocks.of_group;
    return strip.begin + (late ? (pixels + most - 1) / most / 2 * most : 0);
  }

  // Blocks [begin, end).
  void run_batch(const Batch& batch, const ChannelBlocks& blocks, int64_t begin, int64_t end,
                 const Strip& strip) {
    locator_.start(batch);
    const ChannelBlock* last = nullptr;
    for (int64_t number = begin; number < end; ++number) {
      const ChannelBlock& block = blocks.of[number];
      if (last != nullptr && block.group == last->group) {
        advance_corners(batch, block.begin - last->begin);
      } else {
        locate(batch, block, strip);
      }
      last = &block;
      if (divided(strip)) reach_beyond(block, strip, strip.reached[number]);
      run_block(batch, block, number % blocks.of_group);
    }
  }

  // Locates the samples of a block's group, and the corners' channels from the block's first on.
  void locate(const Batch& batch, const ChannelBlock& block, const Strip& strip) {
    const AggregateLayout &offsets = tensors_.offset_layout, &masks = tensors_.mask_layout;
    const auto& samples = locator_.locate(
        batch,
        tensors_.offset + batch.pixel * offsets.pixel_stride + block.group * offsets.group_stride,
        offsets.pixel_stride,
        tensors_.mask + batch.pixel * masks.pixel_stride + block.group * masks.group_stride,
        masks.pixel_stride);
    const T* input = image_of(shape_, tensors_.input, strip.image);
    set_corners<const T>(shape_.y.size, shape_.x.size, rows_of(shape_, input), block.begin, samples,
                         batch.count(), zeros_, 0, read_->at);
    set_weights(samples, batch.count(), read_->weight);
    samples_ = &samples;
    if (tensors_.grad_input == nullptr) return;
    set_gradient_corners(batch, input, strip);
    if (divided(strip)) rows_of_samples_ = reached_rows(samples, batch.count());
  }

  // The addresses of the corners' gradients, which lie in their image as the corners do in theirs.
  void set_gradient_corners(const Batch& batch, const T* input, const Strip& strip) const {
    constexpr uintptr_t times = sizeof(A) / sizeof(T);
    const uintptr_t from = reinterpret_cast<uintptr_t>(input);
    const uintptr_t to =
        reinterpret_cast<uintptr_t>(image_of(shape_, tensors_.grad_input, strip.image));
    const uintptr_t beyond = reinterpret_cast<uintptr_t>(strip.beyond);
    // Where the strip's own rows begin, and their size, in bytes of the input.
    const uintptr_t row = shape_.x.size * shape_.channels * sizeof(T);
    const uintptr_t own = from + strip.own.first * row;
    const uintptr_t own_bytes = (strip.own.last - strip.own.first) * row;
    move_corners(read_->at, batch.count(), zeros_, sinks_, shape_.group_channels(), *added_,
                 [=](uintptr_t corner) {
                   return (corner - own < own_bytes ? to : beyond) + times * (corner - from);
                 });
  }

  // Whether gradients of rows that are not the strip's own are summed apart.
  bool divided(const Strip& strip) const {
    return tensors_.grad_input != nullptr && strip.beyond != nullptr;
  }

  // The rows from the first to the last one that samples reach.
  RowRange reached_rows(const Samples<A, kMostSamples>& samples, int64_t count) const {
    const int32_t height = static_cast<int32_t>(shape_.y.size);
    int32_t first = height, last = 0;
    for (int64_t s = 0; s < count; ++s) {
      const int32_t low = samples.low_y[s];  // -2 if the sample contributes nothing
      first = std::min(first, low < -1 ? height : std::max(low, 0));
      last = std::max(last, std::min(low + 2, height));
    }
    return {first, last};
  }

  // Sets the gradients of rows that are reached for the first time to zero, in a block's channels.
  void reach_beyond(const ChannelBlock& block, const Strip& strip, RowRange& reached) const {
    while (reached.first > rows_of_samples_.first) clear_row(block, strip, --reached.first);
    while (reached.last < rows_of_samples_.last) clear_row(block, strip, reached.last++);
  }

  void clear_row(const ChannelBlock& block, const Strip& strip, int64_t row) const {
    const int64_t width = shape_.x.size;
    A* target = strip.beyond + row * width * shape_.channels + block.begin;
    for (int64_t x = 0; x < width; ++x) fill_zero(target + x * shape_.channels, block.channels());
  }

  // Moves the corners' addresses on by some channels.
  void advance_corners(const Batch& batch, int64_t channels) const {
    const int64_t count = batch.count();
    for (int q = 0; q < 4; ++q) {
      uintptr_t *read = read_->at.corner[q], *added = added_->corner[q];
      for (int64_t s = 0; s < count; ++s) read[s] += channels * sizeof(T);
      if (tensors_.grad_input == nullptr) continue;
      for (int64_t s = 0; s < count; ++s) added[s] += channels * sizeof(A);
    }
  }

  // `number` is that of the block in its group.
  void run_block(const Batch& batch, const ChannelBlock& block, int64_t number) const {
    const bool input = tensors_.grad_input != nullptr;
    const bool sampling = tensors_.grad_offset != nullptr || tensors_.grad_mask != nullptr;
    if (input && sampling) scatter_batch<true, true>(batch, block);
    if (input && !sampling) scatter_batch<true, false>(batch, block);
    if (!input) scatter_batch<false, true>(batch, block);
    if (sampling) store_gradients(batch, block.group, number);
  }

  // The block's gradients of the batch's outputs.
  const A* gradients_of(const Batch& batch, const ChannelBlock& block) const {
    const T* source = tensors_.grad_output + batch.pixel * shape_.channels + block.begin;
    if constexpr (kConverts) {
      for (int64_t j = 0; j < batch.pixels; ++j) {
        copy_row<A>(source + j * shape_.channels, block.channels(),
                    rows_ + j * shape_.group_channels());
      }
      return rows_;
    } else {
      return source;
    }
  }

  template <bool wants_input, bool wants_dots>
  void scatter_batch(const Batch& batch, const ChannelBlock& block) const {
    RowSamples<T, A> samples = {};
    samples.corner = read_->at.corner[0];
    samples.grad_corner = added_->corner[0];
    samples.weight = read_->weight[0];
    samples.quantity = kMostSamples;
    samples.gradient = gradients_of(batch, block);
    samples.row = row_of_;
    samples.dots = dots_->of[0];
    scatter<wants_input, Column::kNone, wants_dots>(samples, 0, batch.count(), block.channels());
  }

  // Stores the gradients of the batch's offsets and modulations, where those of a group's block of
  // this number are.
  void store_gradients(const Batch& batch, int64_t group, int64_t number) const {
    set_sample_gradients(shape_.y.size, shape_.x.size, *samples_, batch.count(), *dots_,
                         *gradients_);
    const A scale = static_cast<A>(shape_.offset_scale);
    const int64_t count = batch.count();
    for (int64_t s = 0; s < count; ++s) {
      grad_offset_[2 * s] = scale * gradients_->of[1][s];
      grad_offset_[2 * s + 1] = scale * gradients_->of[0][s];
    }
    const int64_t taps = batch.taps, all = shape_.batch * shape_.pixels() * shape_.groups;
    for (int64_t j = 0; j < batch.pixels; ++j) {
      const int64_t row = number * all + (batch.pixel + j) * shape_.groups + group;
      const int64_t first = row * shape_.taps() + batch.tap;
      if (tensors_.grad_offset) {
        copy_few(grad_offset_ + 2 * j * taps, 2 * taps, tensors_.grad_offset + 2 * first);
      }
      if (tensors_.grad_mask) {
        copy_few(gradients_->of[2] + j * taps, taps, tensors_.grad_mask + first);
      }
    }
  }

  const DeformAggregateShape& shape_;
  const AggregateTensors<T>& tensors_;
  Locator<A> locator_;
  const Samples<A, kMostSamples>* samples_ = nullptr;  // of the current batch and group
  RowRange rows_of_samples_ = {};                      // that these reach
  BatchCorners<A>* const read_;
  CornerAddresses<kMostSamples>* const added_;  // of the corners' gradients
  SampleDots<A, kMostSamples>* const dots_;
  ThreeGradients<A, kMostSamples>* const gradients_;
  A* const grad_offset_;   // x and y of each sample
  T* const zeros_;         // stands in for a group's channels of corners that do not exist
  A* const sinks_;         // 4 × a group's channels: stands in for their gradients, never read
  A* const rows_;          // the gradients of the outputs, pixels × a group's channels
  int64_t* const row_of_;  // of each sample, where the gradients of its output begin
};

template <typename T>
void forward(const DeformAggregateShape& shape, const AggregateTensors<T>& tensors, int64_t begin,
             int64_t end, std::byte* memory) {
  Arena arena(memory);
  ForwardPass<T>(shape, tensors, arena).run(begin, end);
}

template <typename T>
void backward(const DeformAggregateShape& shape, const AggregateTensors<T>& tensors,
              const ChannelBlocks& blocks, int64_t begin, int64_t end,
              const ImageStrip<accumulator_t<T>>& strip, std::byte* memory) {
  Arena arena(memory);
  BackwardPass<T>(shape, tensors, arena).run(blocks, begin, end, strip);
}

// Of either pass.
template <typename T>
int64_t scratch_bytes(const DeformAggregateShape& shape) {
  const AggregateTensors<T> tensors = {};
  Arena forward_arena(nullptr), backward_arena(nullptr);
  ForwardPass<T>(shape, tensors, forward_arena);
  BackwardPass<T>(shape, tensors, backward_arena);
  return std::max(forward_arena.used(), backward_arena.used());
}

}  // namespace

template <typename T>
AggregateKernel<T> deform_aggregate() {
  AggregateKernel<T> kernel = {};
  kernel.scratch_bytes = &scratch_bytes<T>;
  kernel.forward = &forward<T>;
  kernel.backward = &backward<T>;
  return kernel;
}

template AggregateKernel<double> deform_aggregate<double>();
template AggregateKernel<float> deform_aggregate<float>();
template AggregateKernel<Half> deform_aggregate<Half>();
template AggregateKernel<BFloat16> deform_aggregate<BFloat16>();

}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
