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

// The backward pass of one block of channels.
template <typename T, typename A = accumulator_t<T>>
class BackwardPass {
 public:
  BackwardPass(const DeformAggregateShape& shape, const AggregateTensors<T>& tensors,
               const ChannelBlock& block, Arena& arena)
      : shape_(shape),
        tensors_(tensors),
        block_(block),
        channels_(block.channels()),
        locator_(shape, arena),
        read_(arena.take<BatchCorners<A>>(1)),
        added_(arena.take<CornerAddresses<kMostSamples>>(1)),
        dots_(arena.take<SampleDots<A, kMostSamples>>(1)),
        gradients_(arena.take<ThreeGradients<A, kMostSamples>>(1)),
        zeros_(arena.take<T>(channels_)),
        sinks_(arena.take<A>(4 * channels_)),
        rows_(arena.take<A>(batch_pixels(shape) * channels_)),
        row_of_(arena.take<int64_t>(kMostSamples)) {}

  void run(int64_t image) {
    fill_zero(zeros_, channels_);
    fill_zero(sinks_, 4 * channels_);
    const int64_t taps = std::min<int64_t>(shape_.taps(), kMostSamples);
    for (int64_t s = 0; s < kMostSamples; ++s) row_of_[s] = s / taps * channels_;
    const bool input = tensors_.grad_input != nullptr;
    const bool sampling = tensors_.grad_offset != nullptr || tensors_.grad_mask != nullptr;
    for_batches(shape_, image * shape_.pixels(), (image + 1) * shape_.pixels(),
                [&](const Batch& batch) {
                  locate(batch, image);
                  load_gradients(batch);
                  if (input && sampling) scatter_batch<true, true>(batch);
                  if (input && !sampling) scatter_batch<true, false>(batch);
                  if (!input) scatter_batch<false, true>(batch);
                  if (sampling) store_gradients(batch);
                });
  }

 private:
  void locate(const Batch& batch, int64_t image) {
    const AggregateLayout &offsets = tensors_.offset_layout, &masks = tensors_.mask_layout;
    locator_.start(batch);
    const auto& samples = locator_.locate(
        batch,
        tensors_.offset + batch.pixel * offsets.pixel_stride + block_.group * offsets.group_stride,
        offsets.pixel_stride,
        tensors_.mask + batch.pixel * masks.pixel_stride + block_.group * masks.group_stride,
        masks.pixel_stride);
    const int64_t count = batch.count(), height = shape_.y.size, width = shape_.x.size;
    set_corners<const T>(height, width, rows_of(shape_, image_of(shape_, tensors_.input, image)),
                         block_.begin, samples, count, zeros_, 0, read_->at);
    set_weights(samples, count, read_->weight);
    samples_ = &samples;
    if (tensors_.grad_input == nullptr) return;
    set_corners<A>(height, width, rows_of(shape_, image_of(shape_, tensors_.grad_input, image)),
                   block_.begin, samples, count, sinks_, channels_, *added_);
  }

  // Reads the block's gradients of the batch's outputs.
  void load_gradients(const Batch& batch) const {
    for (int64_t j = 0; j < batch.pixels; ++j) {
      const T* source = tensors_.grad_output + (batch.pixel + j) * shape_.channels + block_.begin;
      copy_row<A>(source, channels_, rows_ + j * channels_);
    }
  }

  template <bool wants_input, bool wants_dots>
  void scatter_batch(const Batch& batch) const {
    RowSamples<T, A> samples = {};
    samples.corner = read_->at.corner[0];
    samples.grad_corner = added_->corner[0];
    samples.weight = read_->weight[0];
    samples.quantity = kMostSamples;
    samples.gradient = rows_;
    samples.row = row_of_;
    samples.dots = dots_->of[0];
    scatter<wants_input, Column::kNone, wants_dots>(samples, 0, batch.count(), channels_);
  }

  // Stores the gradients of the batch's offsets and modulations.
  void store_gradients(const Batch& batch) const {
    set_sample_gradients(shape_.y.size, shape_.x.size, *samples_, batch.count(), *dots_,
                         *gradients_);
    const A scale = static_cast<A>(shape_.offset_scale);
    for (int64_t j = 0; j < batch.pixels; ++j) {
      const int64_t s = j * batch.taps;
      const int64_t first =
          ((batch.pixel + j) * shape_.groups + block_.group) * shape_.taps() + batch.tap;
      if (tensors_.grad_offset) {
        for (int64_t k = 0; k < batch.taps; ++k) {
          tensors_.grad_offset[2 * (first + k)] = scale * gradients_->of[1][s + k];
          tensors_.grad_offset[2 * (first + k) + 1] = scale * gradients_->of[0][s + k];
        }
      }
      if (tensors_.grad_mask) {
        std::copy_n(gradients_->of[2] + s, batch.taps, tensors_.grad_mask + first);
      }
    }
  }

  const DeformAggregateShape& shape_;
  const AggregateTensors<T>& tensors_;
  const ChannelBlock& block_;
  const int64_t channels_;
  Locator<A> locator_;
  const Samples<A, kMostSamples>* samples_ = nullptr;  // of the current batch
  BatchCorners<A>* const read_;
  CornerAddresses<kMostSamples>* const added_;  // of the corners' gradients
  SampleDots<A, kMostSamples>* const dots_;
  ThreeGradients<A, kMostSamples>* const gradients_;
  T* const zeros_;         // stands in for the channels of corners that do not exist
  A* const sinks_;         // 4 × channels: stands in for their gradients, never read
  A* const rows_;          // the gradients of the outputs, pixels × channels
  int64_t* const row_of_;  // of each sample, the first element in `rows_`
};

template <typename T>
void forward(const DeformAggregateShape& shape, const AggregateTensors<T>& tensors, int64_t begin,
             int64_t end, std::byte* memory) {
  Arena arena(memory);
  ForwardPass<T>(shape, tensors, arena).run(begin, end);
}

template <typename T>
void backward(const DeformAggregateShape& shape, const AggregateTensors<T>& tensors,
              const ChannelBlock& block, int64_t image, std::byte* memory) {
  Arena arena(memory);
  BackwardPass<T>(shape, tensors, block, arena).run(image);
}

// Of either pass; a block has at most the channels of a group.
template <typename T>
int64_t scratch_bytes(const DeformAggregateShape& shape) {
  const AggregateTensors<T> tensors = {};
  Arena forward_arena(nullptr), backward_arena(nullptr);
  ForwardPass<T>(shape, tensors, forward_arena);
  BackwardPass<T>(shape, tensors, {0, 0, shape.group_channels()}, backward_arena);
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
