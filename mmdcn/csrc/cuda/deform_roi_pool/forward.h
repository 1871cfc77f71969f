// Forward pass of deformable RoI pooling.
#pragma once

#include "bins.h"

namespace mmdcn::cuda {

template <int V, typename Ctx, typename scalar_t, typename acc_t>
MMDCN_BLOCK void deform_roi_pool_forward_block(const Ctx& ctx, const DeformRoIPoolShape& shape,
                                               const scalar_t* input, const acc_t* rois,
                                               const acc_t* offset, scalar_t* output,
                                               BinStorage<acc_t>& storage) {
  using Teams = BinTeams<Ctx, V>;
  const int64_t bins = all_bins(shape), channels = shape.deform_group_channels();
  for (int64_t first = ctx.block() * kBins; first < bins; first += ctx.blocks() * kBins) {
    ctx.sync();  // All threads are done with the previous bins.
    find_bins(ctx, shape, rois, offset, first, storage);
    ctx.sync();
    for (int64_t channel = 0; channel < channels; channel += Teams::kChannels) {
      acc_t sum[Teams::kPerThread][V] = {};
      for_each_pixel<V>(
          ctx, shape, channel, storage,
          [&](int i, int64_t position, const BinPixel<acc_t>& row, const BinPixel<acc_t>& column) {
            acc_t features[V];
            load_as(ctx, input + position, features);
            MMDCN_UNROLL
            for (int j = 0; j < V; ++j) {
              sum[i][j] += row.weight * column.weight * features[j];
            }
          });
      Teams::for_each(ctx, shape, storage, channel, [&](int i, int place, int64_t c) {
        const Bin& bin = storage.bin[place];
        const int64_t out_channel = bin.group * channels + c;
        MMDCN_UNROLL
        for (int j = 0; j < V; ++j) {
          const int64_t plane = bin.roi * shape.out_channels + out_channel + j;
          ctx.store(&output[plane * shape.bins() + bin.bin], static_cast<scalar_t>(sum[i][j]));
        }
      });
    }
  }
}

}  // namespace mmdcn::cuda
