// The CPU kernels of deform_conv_nd. Compiled once for each instruction set, with
// MMDCN_CPU_CAPABILITY naming the namespace.
//
// A tile of output pixels is sampled into columns, which have a row for each pixel, and the columns
// are multiplied by the weights.
#include "kernel.h"

#include "../transpose.h"
#include "backward_pass.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// The size that a tile's columns have at most in the forward pass, unless one register block of
// pixels takes more.
constexpr int64_t kColumnBytes = 512 << 10;
// The most positions that are transposed together: they stay in the first-level cache.
constexpr int64_t kTransposed = 64;

// ------------------------------------------------------------------------------ images as rows

// Calls function(image, first, count) for the positions of each image within [begin, end), at most
// `chunk` of a line at a time.
template <typename F>
inline void for_positions(const VolumeRows& rows, int64_t begin, int64_t end, int64_t chunk,
                          const F& function) {
  for (int64_t at = begin; at < end;) {
    const int64_t image = at / rows.positions, first = at - image * rows.positions;
    const int64_t left = rows.width - first % rows.width;
    const int64_t count = smaller(smaller(chunk, left), end - at);
    function(image, first, count);
    at += count;
  }
}

template <typename T, typename A = accumulator_t<T>>
void to_rows(const T* planes, const VolumeRows& at, int64_t begin, int64_t end, A* rows) {
  const int64_t channels = at.pixel, positions = at.positions;
  for_positions(at, begin, end, kTransposed, [&](int64_t image, int64_t first, int64_t count) {
    transpose<A>(planes + image * channels * positions + first, positions, channels, count,
                 rows + at.at(image, first), channels);
  });
}

template <typename T, typename A = accumulator_t<T>>
void from_rows(const A* rows, const VolumeRows& at, int64_t begin, int64_t end, T* planes) {
  const int64_t channels = at.pixel, positions = at.positions;
  for_positions(at, begin, end, kTransposed, [&](int64_t image, int64_t first, int64_t count) {
    transpose<A>(rows + at.at(image, first), channels, count, channels,
                 planes + image * channels * positions + first, positions);
  });
}

// The corners of a sample of a volume, numbered as in sampling.h.
template <typename A>
struct VolumeCorners {
  const A* row[8];
  A weight[8];

  void set(const VolumeRows& rows, const A* first) {
    for (int q = 0; q < 8; ++q) {
      row[q] = first + (q >> 2) * rows.plane + (q >> 1 & 1) * rows.line + (q & 1) * rows.pixel;
    }
  }

  // Stores the sample's channels, of `kRegisters` registers from number `channel` on.
  template <int kRegisters>
  void blend(int64_t channel, A* target) const {
    register_t<A> sum[kRegisters];
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {
#pragma GCC unroll 4
      for (int j = 0; j < kRegisters; ++j) {
        const register_t<A> value = load_register(row[q] + channel + j * kLanes<A>);
        sum[j] = q == 0 ? weight[q] * value : sum[j] + weight[q] * value;
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kRegisters; ++j) store_register(target + channel + j * kLanes<A>, sum[j]);
  }
  A blended(int64_t channel) const {
    A sum = 0;
    for (int q = 0; q < 8; ++q) sum += weight[q] * row[q][channel];
    return sum;
  }
};

// Samples channels into columns.
template <typename A>
class Sampler {
 public:
  Sampler(const DeformConvNdShape<3>& shape, Arena& arena)
      : shape_(shape),
        rows_(shape),
        samples_(shape, arena),
        first_(arena.take<uintptr_t[kMostPixels]>(1)),
        weight_(arena.take<A[4][kMostSamples]>(1)) {}

  void start(int64_t image, int64_t pixel, int64_t count) {
    image_ = image;
    pixel_ = pixel;
    samples_.start(pixel, count);
  }

  // Samples all channels for one tap. The rows of columns are `stride` elements apart.
  void sample(const ConvNdForward<A>& tensors, int64_t tap, A* columns, int64_t stride) {
    const A* input = tensors.input + image_ * rows_.image;
    const int64_t channels = shape_.deform_group_channels();
    for (int64_t group = 0; group < shape_.deform_groups; ++group) {
      const SampleElements at(shape_, image_, pixel_, group, tap);
      samples_.locate(tap, tensors.offset + at.offset, element(tensors.mask, at.mask));
      samples_.set_first_corners(rows_, input + group * channels, *first_);
      samples_.set_weights(*weight_);
      blend(columns + group * channels, stride);
    }
  }

 private:
  // Stores each pixel's sample to a row of columns.
  void blend(A* columns, int64_t stride) const {
    const int64_t pixels = samples_.pixels(), channels = shape_.deform_group_channels();
    for (int64_t i = 0; i < pixels; ++i, columns += stride) {
      VolumeCorners<A> corners;
      corners.set(rows_, reinterpret_cast<const A*>((*first_)[i]));
      for (int q = 0; q < 8; ++q) corners.weight[q] = (*weight_)[q & 3][(q >> 2) * pixels + i];
      int64_t c = 0;
      for (; c + 4 * kLanes<A> <= channels; c += 4 * kLanes<A>)
        corners.template blend<4>(c, columns);
      for (; c + 2 * kLanes<A> <= channels; c += 2 * kLanes<A>)
        corners.template blend<2>(c, columns);
      for (; c + kLanes<A> <= channels; c += kLanes<A>) corners.template blend<1>(c, columns);
      for (; c < channels; ++c) columns[c] = corners.blended(c);
    }
  }

  const DeformConvNdShape<3>& shape_;
  const VolumeRows rows_;
  VolumeSamples<A> samples_;
  uintptr_t (*const first_)[kMostPixels];  // addresses of the samples' first corners
  A (*const weight_)[4][kMostSamples];
  int64_t image_ = 0, pixel_ = 0;
};

// ------------------------------------------------------------------------------ forward

template <int R, typename A>
int64_t forward_tile(const DeformConvNdShape<R>& shape) {
  const int64_t fitting =
      kColumnBytes / (shape.taps() * shape.channels * static_cast<int64_t>(sizeof(A)));
  const int64_t blocks = smaller(fitting, kMostPixels) / kBlockRows;
  return blocks > 1 ? blocks * kBlockRows : kBlockRows;
}

// Elements of a row of products. Those of each group are padded to whole registers, and those of
// the next group are written over the padding.
template <int R, typename A>
int64_t product_row(const DeformConvNdShape<R>& shape) {
  return shape.out_channels + kLanes<A>;
}

template <int R, typename A>
struct ForwardScratch {
  Sampler<A> sampler;
  A* columns;  // pixels × taps × channels
  A* product;  // pixels × product_row

  ForwardScratch(const DeformConvNdShape<R>& shape, Arena& arena)
      : sampler(shape, arena),
        columns(arena.take<A>(forward_tile<R, A>(shape) * shape.taps() * shape.channels)),
        product(arena.take<A>(forward_tile<R, A>(shape) * product_row<R, A>(shape))) {}
};

template <int R, typename A>
int64_t forward_scratch_bytes(const DeformConvNdShape<R>& shape) {
  Arena arena(nullptr);
  ForwardScratch<R, A>(shape, arena);
  return arena.used();
}

template <int R, typename A>
void forward(const DeformConvNdShape<R>& shape, const ConvNdForward<A>& tensors, int64_t begin,
             int64_t end, std::byte* memory) {
  const int64_t pixels = shape.pixels(), taps = shape.taps();
  const int64_t tile = forward_tile<R, A>(shape), row = taps * shape.channels;
  const int64_t channels = shape.group_channels(), outs = shape.group_out_channels();
  const int64_t weights = tap_packed_size<R, A>(shape), out_row = product_row<R, A>(shape);
  Arena arena(memory);
  ForwardScratch<R, A> scratch(shape, arena);
  A* const columns = scratch.columns;
  A* const product = scratch.product;
  for (int64_t first = begin; first < end; first += tile) {
    const int64_t count = smaller(tile, end - first);
    A* target = columns;
    for_positions(VolumeRows(shape.out_channels, pixels), first, first + count, kMostPixels,
                  [&](int64_t image, int64_t pixel, int64_t some) {
                    scratch.sampler.start(image, pixel, some);
                    for (int64_t tap = 0; tap < taps; ++tap) {
                      scratch.sampler.sample(tensors, tap, target + tap * shape.channels, row);
                    }
                    target += some * row;
                  });
    NoWork none;
    const Depth depth = {channels, taps, shape.channels, weights};
    for (int64_t group = 0; group < shape.groups; ++group) {
      const A* weight = tensors.weight + group * taps * weights;
      multiply<Order::kRows, Into::kSet>(count, outs, depth, columns + group * channels, row,
                                         packed(weight, channels), product + group * outs, out_row,
                                         none);
    }
    for (int64_t i = 0; i < count; ++i) {
      A* output = tensors.output + (first + i) * shape.out_channels;
      for (int64_t o = 0; o < shape.out_channels; ++o) {
        output[o] = product[i * out_row + o] + (tensors.bias ? tensors.bias[o] : A(0));
      }
    }
  }
}

// ------------------------------------------------------------------------------ backward

template <int R, typename A>
int64_t backward_scratch_bytes(const DeformConvNdShape<R>& shape, const ConvNdBackward<A>& tensors,
                               const ChannelRange& range) {
  Arena arena(nullptr);
  BackwardPass<A>(shape, tensors, range, arena);
  return arena.used();
}

template <int R, typename A>
void backward(const DeformConvNdShape<R>& shape, const ConvNdBackward<A>& tensors,
              const ChannelRange& range, int64_t begin, int64_t end, std::byte* memory) {
  Arena arena(memory);
  BackwardPass<A>(shape, tensors, range, arena).run(begin, end);
}

}  // namespace

template <int R, typename T>
ConvNdKernel<R, T> deform_conv_nd() {
  using A = accumulator_t<T>;
  ConvNdKernel<R, T> kernel = {};
  kernel.to_rows = &to_rows<T>;
  kernel.from_rows = &from_rows<T>;
  kernel.packed_size = &packed_size<R, A>;
  kernel.pack_weight = &pack_weight<R, T>;
  kernel.forward_scratch_bytes = &forward_scratch_bytes<R, A>;
  kernel.forward = &forward<R, A>;
  kernel.range_packed_size = &range_packed_size<R, A>;
  kernel.pack_range = &pack_range<R, T>;
  kernel.backward_scratch_bytes = &backward_scratch_bytes<R, A>;
  kernel.backward = &backward<R, A>;
  return kernel;
}

template ConvNdKernel<3, double> deform_conv_nd<3, double>();
template ConvNdKernel<3, float> deform_conv_nd<3, float>();
template ConvNdKernel<3, Half> deform_conv_nd<3, Half>();
template ConvNdKernel<3, BFloat16> deform_conv_nd<3, BFloat16>();

}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
