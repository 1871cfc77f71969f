// The CPU backward kernel of deform_conv2d. Compiled once for each instruction set, with
// MMDCN_CPU_CAPABILITY naming the namespace.
//
// For a block of channels, by tiles of output pixels and one tap at a time:
//   grad_columns = grad_output · Wᵀ            the gradient of the modulated samples, Δm X(p)
//   grad_input(q)  += G(q, p) Δm grad_columns
//   grad_offset     = Δm Σ_c grad_columns Σ_q dG(q, p)/dp X(q)
//   grad_mask       =    Σ_c grad_columns Σ_q G(q, p) X(q)
//   grad_weight    += columnsᵀ · grad_output, where the columns, Δm X(p), are sampled again
#include "backward_pairs.h"
#include "backward_weights.h"
#include "backward_windows.h"
#include "plane_scatter.h"
#include "row_scatter.h"
#include "sample_gradients.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// One call of the kernel, which computes the products, the samples, and the gradients of offsets
// and modulations tile by tile and tap by tap. Scatter is RowScatter or PlaneScatter, and L the
// type of what products multiply.
template <typename T, template <typename, typename> class Scatter, typename L>
class Pass {
 public:
  using A = accumulator_t<T>;
  static constexpr Sampling kSampling = Scatter<T, L>::kSampling;

  Pass(const BlockCall<T>& call, int64_t channels, Arena& arena)
      : call_(call),
        work_(call, channels, arena),
        gradients_(work_, channels, arena),
        scatter_(work_, channels, gradients_.dots, arena) {}

  // Computes tiles [begin, end). Block number `block_index`, which it is for, leaves its sums in
  // `partial`.
  void run(int64_t block_index, int64_t begin, int64_t end) {
    [[maybe_unused]] const RegistersFor<L> registers;
    const WindowPlan plan = plan_backward<kSampling, A>(call_.shape);
    const int64_t shift = start_of(begin, end);
    scatter_.start();
    for (int64_t k = begin; k < end; ++k) {
      const int64_t index = k + shift < end ? k + shift : k + shift - (end - begin);
      A* partial = call_.tensors.partial;
      if (partial) partial += (index - begin) * call_.tensors.partial_tile;
      set_tile(call_.shape, plan, index, *work_.tile);
      roll_windows(call_, plan, *work_.tile);
      work_.find_sampling();
      scatter_.start_tile();
      for (int64_t tap = 0; tap < call_.shape.taps(); ++tap) run_tap(tap, block_index, partial);
      gradients_.store_staged();
    }
  }

 private:
  // How far the first tile is from `begin`. Depthwise convolutions spend most of their time adding
  // to the gradient of the input. If threads did that for different channels of the same pixels,
  // they would wait for each other's cache lines; so half of the blocks begin in the middle, unless
  // each has a window of its own, which rolls from tile to tile.
  int64_t start_of(int64_t begin, int64_t end) const {
    const DeformConv2dShape& shape = call_.shape;
    const bool late = 2 * call_.block.begin >= shape.channels;
    const bool rolls = call_.windows.input.capacity > 0 || call_.windows.grad_input.capacity > 0;
    return late && !rolls && is_depthwise(shape) ? (end - begin) / 2 : 0;
  }

  // Computes one tap of the current tile, which `partial` belongs to.
  void run_tap(int64_t tap, int64_t block_index, A* partial) const {
    const DeformConv2dShape& shape = call_.shape;
    const ChannelBlock& block = call_.block;
    if (!is_depthwise(shape)) work_.multiply_gradients(tap);
    scatter_.start_tap();
    const int64_t channels = shape.deform_group_channels();
    for (int64_t d = block.begin / channels; d * channels < block.end; ++d) {
      const int64_t begin = std::max(d * channels, block.begin) - block.begin;
      const int64_t end = std::min((d + 1) * channels, block.end) - block.begin;
      scatter_.prefetch(d, tap);
      locate_samples(shape, *work_.tile, work_.sampling, d, tap, *work_.samples);
      scatter_.scatter_samples(tap, begin, end);
      if (!call_.wants_sampling()) continue;
      A* aside = nullptr;
      if (!owns_deform_group(shape, block, d)) {
        aside = partial + partial_index(shape, block, block_index, d) + tap * 3 * kBackwardTile;
      }
      gradients_.store(d, tap, aside);
    }
    if (call_.tensors.grad_weight) scatter_.add_weight_gradient(tap);
  }

  const BlockCall<T>& call_;
  TileAtWork<T, L> work_;
  const SampleGradients<T> gradients_;
  const Scatter<T, L> scatter_;
};

template <typename T, template <typename, typename> class Scatter, typename L>
int64_t scratch_bytes(const DeformConv2dShape& shape, const BackwardTensors<T>& tensors,
                      int64_t block_channels) {
  const ChannelBlock block = {};
  BlockWindows<T> windows = {};
  Arena arena(nullptr);
  const BlockCall<T> call = {shape, tensors, block, windows};
  Pass<T, Scatter, L>(call, block_channels, arena);
  return arena.used();
}

template <typename T, template <typename, typename> class Scatter, typename L>
void run(const DeformConv2dShape& shape, const BackwardTensors<T>& tensors,
         const ChannelBlock* blocks, int64_t block_index, int64_t begin, int64_t end,
         BlockWindows<T>& windows, std::byte* memory) {
  const BlockCall<T> call = {shape, tensors, blocks[block_index], windows};
  Arena arena(memory);
  Pass<T, Scatter, L>(call, call.channels(), arena).run(block_index, begin, end);
}

template <typename T, template <typename, typename> class Scatter, typename L>
BackwardKernel<T> backward_kernel() {
  constexpr Sampling sampling = Pass<T, Scatter, L>::kSampling;
  BackwardKernel<T> kernel = {};
  if constexpr (std::is_same_v<L, accumulator_t<T>>) {
    kernel.packed_size = &packed_block_size<T>;
    kernel.pack_weight = &pack_weight<T>;
    kernel.sums_size = &sums_size<T>;
    kernel.unpack_sums = &unpack_sums<T>;
  } else {
    kernel.packed_size = &paired_block_size;
    kernel.pack_weight = &pack_paired_weight;
    kernel.sums_size = &paired_sums_size;
    kernel.unpack_sums = &unpack_paired_sums;
  }
  kernel.tiles = &tiles<sampling, T>;
  kernel.tile_at = &tile_at<sampling, T>;
  kernel.scratch_bytes = &scratch_bytes<T, Scatter, L>;
  kernel.window_bytes = &window_bytes<sampling, T>;
  kernel.open = &open<sampling, T>;
  kernel.run = &run<T, Scatter, L>;
  kernel.close = &close<T>;
  return kernel;
}

}  // namespace

template <typename T>
BackwardKernel<T> deform_conv2d_backward(const DeformConv2dShape& shape) {
  using A = accumulator_t<T>;
  if (shape.deform_group_channels() <= kPlanarChannels) {
    return backward_kernel<T, PlaneScatter, A>();
  }
  if constexpr (kHasPairs && std::is_same_v<T, BFloat16>) {
    if (multiplied_in_pairs(shape)) return backward_kernel<T, RowScatter, T>();
  }
  return backward_kernel<T, RowScatter, A>();
}

template BackwardKernel<double> deform_conv2d_backward<double>(const DeformConv2dShape&);
template BackwardKernel<float> deform_conv2d_backward<float>(const DeformConv2dShape&);
template BackwardKernel<Half> deform_conv2d_backward<Half>(const DeformConv2dShape&);
template BackwardKernel<BFloat16> deform_conv2d_backward<BFloat16>(const DeformConv2dShape&);

}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
