// Backward pass of deformable RoI pooling, to the input and the offsets.
#pragma once

#include "bins.h"

namespace mmdcn::cuda {

template <typename acc_t>
struct BinGradient {
  acc_t y, x;
};

template <typename acc_t>
struct RoIPoolBackwardStorage {
  BinStorage<acc_t> bins;
  BinGradient<acc_t> partial[kBins][kBinChannels];
};

// Each block computes all of the gradient of its bins' offsets, in a fixed order.
template <typename Ctx, typename scalar_t, typename acc_t>
MMDCN_BLOCK void deform_roi_pool_backward_block(const Ctx& ctx, const DeformRoIPoolShape& shape,
                                                const scalar_t* grad_output, const scalar_t* input,
                                                const acc_t* rois, const acc_t* offset,
                                                acc_t* grad_input, acc_t* grad_offset,
                                                RoIPoolBackwardStorage<acc_t>& storage) {
  using Items = BinItems<Ctx>;
  const int64_t bins = all_bins(shape), channels = shape.deform_group_channels();
  for (int64_t first = ctx.block() * kBins; first < bins; first += ctx.blocks() * kBins) {
    ctx.sync();  // All threads are done with the previous bins.
    find_bins(ctx, shape, rois, offset, first, storage.bins);
    ctx.sync();

    BinGradient<acc_t> moved[Items::kPerThread];
    MMDCN_UNROLL
    for (int i = 0; i < Items::kPerThread; ++i) moved[i] = {0, 0};
    for (int64_t channel = 0; channel < channels; channel += kBinChannels) {
      acc_t grad[Items::kPerThread] = {};
      Items::for_each(ctx, shape, storage.bins, channel, [&](int i, int place, int64_t c) {
        const Bin& bin = storage.bins.bin[place];
        const int64_t pooled = bin.roi * shape.bins() + bin.bin;
        grad[i] =
            static_cast<acc_t>(grad_output[pooled * shape.out_channels + bin.group * channels + c]);
      });
      for_each_pixel(ctx, shape, channel, storage.bins,
                     [&](int i, int, int64_t, int64_t position, const BinPixel<acc_t>& row,
                         const BinPixel<acc_t>& column) {
                       if (grad_offset) {
                         const acc_t product = grad[i] * static_cast<acc_t>(input[position]);
                         moved[i].y += row.slope * column.weight * product;
                         moved[i].x += row.weight * column.slope * product;
                       }
                       if (grad_input) {
                         ctx.atomic_add(&grad_input[position],
                                        row.weight * column.weight * grad[i]);
                       }
                     });
    }
    if (!grad_offset) continue;

    MMDCN_UNROLL
    for (int i = 0; i < Items::kPerThread; ++i) {
      const int item = ctx.thread() + i * Ctx::kThreads;
      storage.partial[item / kBinChannels][item % kBinChannels] = moved[i];
    }
    ctx.sync();
    for (int place = ctx.thread(); place < kBins; place += Ctx::kThreads) {
      const Bin& bin = storage.bins.bin[place];
      if (bin.image < 0) continue;
      BinGradient<acc_t> sum = {0, 0};
      for (const BinGradient<acc_t>& part : storage.partial[place]) {
        sum = {sum.y + part.y, sum.x + part.x};
      }
      // A bin that reaches nothing may have an infinite box, and infinity times 0 is NaN.
      const acc_t reach_y = storage.bins.side[0][place].reach;
      const acc_t reach_x = storage.bins.side[1][place].reach;
      ctx.store(&grad_offset[roi_offset_index(shape, bin.roi, bin.group, 0, bin.bin)],
                sum.y != 0 ? reach_y * sum.y : acc_t(0));
      ctx.store(&grad_offset[roi_offset_index(shape, bin.roi, bin.group, 1, bin.bin)],
                sum.x != 0 ? reach_x * sum.x : acc_t(0));
    }
  }
}

}  // namespace mmdcn::cuda
