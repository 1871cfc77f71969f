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
  BinGradient<acc_t> moved[kBins];
};

// Adds the gradient of the input of the bins that have been found, and leaves how their values
// change as they move in storage.moved, if that is wanted.
template <int V, typename Ctx, typename scalar_t, typename acc_t>
MMDCN_BLOCK void scatter_bins(const Ctx& ctx, const DeformRoIPoolShape& shape,
                              const scalar_t* grad_output, const scalar_t* input,
                              const FloatingSum<acc_t>& grad_input, bool moved_wanted,
                              RoIPoolBackwardStorage<acc_t>& storage) {
  using Teams = BinTeams<Ctx, V>;
  const int64_t channels = shape.deform_group_channels();
  BinGradient<acc_t> moved[Teams::kPerThread];
  MMDCN_UNROLL
  for (int i = 0; i < Teams::kPerThread; ++i) moved[i] = {0, 0};
  for (int64_t channel = 0; channel < channels; channel += Teams::kChannels) {
    acc_t grad[Teams::kPerThread][V] = {};
    Teams::for_each(ctx, shape, storage.bins, channel, [&](int i, int place, int64_t c) {
      const Bin& bin = storage.bins.bin[place];
      const int64_t pooled = bin.roi * shape.bins() + bin.bin;
      load_as(ctx, grad_output + pooled * shape.out_channels + bin.group * channels + c, grad[i]);
    });
    for_each_pixel<V>(
        ctx, shape, channel, storage.bins,
        [&](int i, int64_t position, const BinPixel<acc_t>& row, const BinPixel<acc_t>& column) {
          if (moved_wanted) {
            acc_t features[V], dot = 0;
            load_as(ctx, input + position, features);
            MMDCN_UNROLL
            for (int j = 0; j < V; ++j) dot += grad[i][j] * features[j];
            moved[i].y += row.slope * column.weight * dot;
            moved[i].x += row.weight * column.slope * dot;
          }
          if (grad_input.wanted()) {
            acc_t share[V];
            MMDCN_UNROLL
            for (int j = 0; j < V; ++j) {
              share[j] = row.weight * column.weight * grad[i][j];
            }
            grad_input.add(ctx, position, share);
          }
        });
  }
  if (!moved_wanted) return;
  MMDCN_UNROLL
  for (int i = 0; i < Teams::kPerThread; ++i) {
    acc_t sum[2] = {moved[i].y, moved[i].x};
    ctx.sum_lanes(sum, Teams::kLanes);
    const int place = (ctx.thread() + i * Ctx::kThreads) / Teams::kLanes;
    if (Teams::lane(ctx) == 0) storage.moved[place] = {sum[0], sum[1]};
  }
}

// Each block computes all of the gradient of its bins' offsets, in a fixed order.
template <int V, typename Ctx, typename scalar_t, typename acc_t>
MMDCN_BLOCK void deform_roi_pool_backward_block(const Ctx& ctx, const DeformRoIPoolShape& shape,
                                                const scalar_t* grad_output, const scalar_t* input,
                                                const acc_t* rois, const acc_t* offset,
                                                acc_t* grad_input, acc_t* grad_offset,
                                                RoIPoolBackwardStorage<acc_t>& storage) {
  const int64_t bins = all_bins(shape);
  for (int64_t first = ctx.block() * kBins; first < bins; first += ctx.blocks() * kBins) {
    ctx.sync();  // The previous bins have been worked through.
    find_bins(ctx, shape, rois, offset, first, storage.bins);
    ctx.sync();
    scatter_bins<V>(ctx, shape, grad_output, input, FloatingSum<acc_t>(grad_input), grad_offset,
                    storage);
    if (!grad_offset) continue;
    ctx.sync();
    for (int place = ctx.thread(); place < kBins; place += Ctx::kThreads) {
      const Bin& bin = storage.bins.bin[place];
      if (bin.image < 0) continue;
      const BinGradient<acc_t> sum = storage.moved[place];
      // The box of a bin that reaches nothing may be infinite.
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
