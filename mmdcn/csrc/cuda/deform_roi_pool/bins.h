// What both passes of deformable RoI pooling share on CUDA: which bins a block pools, and the
// pixels that their points read.
//
// A block pools kBins bins of one offset group each, of all RoIs, at the same time. Along each
// dimension the pixels of up to kBinSamples samples are listed in shared memory by one thread for
// each bin; then a team of lanes works on the channels of each bin, V at once. Bins of more samples
// take several rounds.
#pragma once

#ifdef __CUDACC__
#include <cassert>
#else
#include <stdexcept>
#endif

#include "../../deform_roi_pool_shape.h"
#include "../sample.h"

namespace mmdcn::cuda {

constexpr int kBins = 32;
constexpr int kBinSamples = 8;

// One bin, of one offset group of one RoI.
struct Bin {
  int64_t roi, group, bin, image;  // image: -1 beyond the last bin
};

template <typename acc_t>
struct BinSide {
  BinSamples<acc_t> samples;
  int64_t begin, end;  // samples that may reach the features
  acc_t reach;         // pixels that the bin moves by for an offset of 1
  int pixels;          // listed
  BinPixel<acc_t> pixel[2 * kBinSamples];

  MMDCN_BLOCK int64_t rounds() const { return divide_up(end - begin, kBinSamples); }
  // Lists the pixels of a round of samples.
  MMDCN_BLOCK void list(int64_t round) {
    const int64_t first = begin + round * kBinSamples;
    const int64_t last = smaller(first + kBinSamples, end);
    pixels = first < last ? static_cast<int>(samples.list_pixels(first, last, pixel)) : 0;
  }
};

template <typename acc_t>
struct BinStorage {
  Bin bin[kBins];
  BinSide<acc_t> side[2][kBins];  // y, x

  // The rounds that it takes to list all samples along a dimension.
  MMDCN_BLOCK int64_t rounds(int d) const {
    int64_t most = 0;
    for (int i = 0; i < kBins; ++i) {
      const int64_t rounds = side[d][i].rounds();
      if (rounds > most) most = rounds;
    }
    return most;
  }
};

MMDCN_BLOCK int64_t all_bins(const DeformRoIPoolShape& shape) {
  return shape.rois * shape.deform_groups * shape.bins();
}

// Ends the program with an error where a RoI is on no image. Without waiting for the GPU there is
// no other way to refuse what only the GPU sees; PyTorch reports it as it does an index out of
// range.
MMDCN_BLOCK void require_image(bool image_of_roi_exists) {
#ifdef __CUDACC__
  assert(image_of_roi_exists);
#else
  if (!image_of_roi_exists) throw std::runtime_error("image_of_roi_exists: assertion failed");
#endif
}

// Finds bins [first, first + kBins) and lists the pixels of their first round.
template <typename Ctx, typename acc_t>
MMDCN_BLOCK void find_bins(const Ctx& ctx, const DeformRoIPoolShape& shape, const acc_t* rois,
                           const acc_t* offset, int64_t first, BinStorage<acc_t>& storage) {
  for (int i = ctx.thread(); i < 2 * kBins; i += Ctx::kThreads) {
    const int d = i / kBins, place = i % kBins;
    BinSide<acc_t>& side = storage.side[d][place];
    Bin bin = {0, 0, 0, -1};
    side.begin = side.end = 0;
    if (first + place < all_bins(shape)) {
      const int64_t roi_and_group = divide(first + place, shape.bins());
      bin.bin = first + place - roi_and_group * shape.bins();
      bin.roi = divide(roi_and_group, shape.deform_groups);
      bin.group = roi_and_group - bin.roi * shape.deform_groups;
      bin.image = image_of_roi(shape, rois + 5 * bin.roi);
      require_image(bin.image >= 0);
      const RoISide<acc_t> roi(shape, rois + 5 * bin.roi, d);
      const int64_t row = divide(bin.bin, shape.out_width);
      const acc_t moved =
          offset ? offset[roi_offset_index(shape, bin.roi, bin.group, d, bin.bin)] : acc_t(0);
      side.reach = roi.reach;
      side.samples =
          roi.bin(shape.sampling_ratio, d == 0 ? row : bin.bin - row * shape.out_width, moved);
      side.samples.reaching(side.begin, side.end);
    }
    side.list(0);
    if (d == 0) storage.bin[place] = bin;
  }
}

// How the threads of a block are shared out to its bins, with V channels for each lane.
template <typename Ctx, int V>
struct BinTeams {
  static constexpr int kLanes = Ctx::kLanes < 8 ? Ctx::kLanes : 8;
  static constexpr int kChannels = kLanes * V;  // of a bin, that are worked on together
  static constexpr int kPerThread = kBins * kLanes / Ctx::kThreads;  // bins of a thread
  static_assert(kPerThread * Ctx::kThreads == kBins * kLanes, "uneven");

  MMDCN_BLOCK static int lane(const Ctx& ctx) { return ctx.thread() % kLanes; }

  // Calls visit(i, bin, channel) for each bin of this thread that exists, and the first of its
  // channels from first_channel on, if there is one; i < kPerThread.
  template <typename acc_t, typename Visit>
  MMDCN_BLOCK static void for_each(const Ctx& ctx, const DeformRoIPoolShape& shape,
                                   const BinStorage<acc_t>& storage, int64_t first_channel,
                                   const Visit& visit) {
    const int64_t channel = first_channel + lane(ctx) * V;
    MMDCN_UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      const int place = (ctx.thread() + i * Ctx::kThreads) / kLanes;
      const bool exists = storage.bin[place].image >= 0 && channel < shape.deform_group_channels();
      if (exists) visit(i, place, channel);
    }
  }
};

// Calls visit(i, position, row, column) for every pixel that the bins of this thread read, i being
// the bin's number in the thread; `position` is in elements of the input, of the first of the
// thread's channels from first_channel on. All threads of the block must call it together.
template <int V, typename Ctx, typename acc_t, typename Visit>
MMDCN_BLOCK void for_each_pixel(const Ctx& ctx, const DeformRoIPoolShape& shape,
                                int64_t first_channel, BinStorage<acc_t>& storage,
                                const Visit& visit) {
  const int64_t rounds_y = storage.rounds(0), rounds_x = storage.rounds(1);
  for (int64_t round = 0; round < rounds_y * rounds_x; ++round) {
    if (rounds_y * rounds_x > 1) {
      const int64_t round_y = divide(round, rounds_x);
      ctx.sync();  // The lists have been read.
      for (int i = ctx.thread(); i < 2 * kBins; i += Ctx::kThreads) {
        storage.side[i / kBins][i % kBins].list(i < kBins ? round_y : round - round_y * rounds_x);
      }
      ctx.sync();
    }
    BinTeams<Ctx, V>::for_each(
        ctx, shape, storage, first_channel, [&](int i, int place, int64_t channel) {
          const Bin& bin = storage.bin[place];
          const BinSide<acc_t>& rows = storage.side[0][place];
          const BinSide<acc_t>& columns = storage.side[1][place];
          const int64_t start = bin.image * shape.pixels() * shape.channels +
                                shape.first_channel(bin.bin) +
                                bin.group * shape.deform_group_channels() + channel;
          for (int y = 0; y < rows.pixels; ++y) {
            for (int x = 0; x < columns.pixels; ++x) {
              const BinPixel<acc_t>& row = rows.pixel[y];
              const BinPixel<acc_t>& column = columns.pixel[x];
              visit(i, start + (row.position * shape.width + column.position) * shape.channels, row,
                    column);
            }
          }
        });
  }
}

}  // namespace mmdcn::cuda
