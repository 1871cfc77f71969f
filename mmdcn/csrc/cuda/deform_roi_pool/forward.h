// Forward pass of deformable RoI pooling.
#pragma once

#include "bins.h"

namespace mmdcn::cuda {

template <typename Ctx, typename scalar_t, typename acc_t>
MMDCN_BLOCK void deform_roi_pool_forward_block(const Ctx& ctx, const DeformRoIPoolShape& shape,
                                               const scalar_t* input, const acc_t* rois,
                                               const acc_t* offset, scalar_t* output,
                                               BinStorage<acc_t>& storage) {
  using Items = BinItems<Ctx>;
  const int64_t bins = all_bins(shape), channels = shape.deform_group_channels();
  for (int64_t first = ctx.block() * kBins; first < bins; first += ctx.blocks() * kBins) {
    ctx.sync();  // All threads are done with the previous bins.
    find_bins(ctx, shape, rois, offset, first, storage);
    ctx.sync();
    for (int64_t channel = 0; channel < channels; channel += kBinChannels) {
      acc_t sum[Items::kPerThread] = {};
      for_each_pixel(ctx, shape, channel, storage,
                     [&](int i, int, int64_t, int64_t position, const BinPixel<acc_t>& row,
                         const BinPixel<acc_t>& column) {
                       sum[i] += row.weight * column.weight * static_cast<acc_t>(input[position]);
                     });
      Items::for_each(ctx, shape, storage, channel, [&](int i, int place, int64_t c) {
        const Bin& bin = storage.bin[place];
        const int64_t out_channel = bin.group * channels + c;
        ctx.store(&output[(bin.roi * shape.out_channels + out_channel) * shape.bins() + bin.bin],
                  static_cast<scalar_t>(sum[i]));
      });
    }
  }
}

}  // namespace mmdcn::cuda
