// Helpers of the CPU's registration files: the work of a thread, blocks of channels, and the choice
// of a kernel by instruction set and element type.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../tensors.h"
#include "arena.h"
#include "capability.h"
#include "channel_block.h"
#include "parallel.h"
#include "simd.h"

namespace mmdcn {
namespace {

// The number of multiply-adds from which waking a thread for them pays.
constexpr int64_t kWorthAThread = 1 << 20;
// The number of multiply-adds that take about as long as sampling, packing or adding one element.
constexpr int64_t kElementWork = 16;

// The least number of tasks that a thread should get, where `tasks` tasks take `work` multiply-adds
// in all.
inline int64_t grain(int64_t tasks, int64_t work) {
  return std::max<int64_t>(kWorthAThread * tasks / work, 1);
}

// The width of the blocks that channels are split into: a quarter of them, between 16 and 64. It
// follows from the number of channels alone, so that sums over blocks have the same order, and the
// same bits, for any number of threads.
inline int64_t block_width(int64_t channels) {
  const int64_t quarter = (channels + 3) / 4;
  return std::clamp<int64_t>((quarter + 15) / 16 * 16, 16, 64);
}

// Splits the channels of each group into blocks of at most `width`, or where `whole_groups` and
// groups are narrower, divides the groups into blocks of some whole groups each.
inline std::vector<ChannelBlock> channel_blocks(int64_t groups, int64_t group_channels,
                                                int64_t width, bool whole_groups = false) {
  std::vector<ChannelBlock> blocks;
  if (whole_groups && 2 * group_channels <= width) {
    const int64_t most = width / group_channels;
    for (int64_t group = 0; group < groups; group += most) {
      const int64_t end = std::min(group + most, groups);
      blocks.push_back({group, group * group_channels, end * group_channels});
    }
    return blocks;
  }
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t end = (group + 1) * group_channels;
    for (int64_t c = group * group_channels; c < end; c += width) {
      blocks.push_back({group, c, std::min(c + width, end)});
    }
  }
  return blocks;
}

// target = the sum of `count` arrays of its size, which follow one another in memory, added up in
// that order.
template <typename A>
void add_in_order(const A* arrays, int64_t count, const Tensor& target) {
  const int64_t elements = target.numel();
  A* sums = data<A>(target);
  const int64_t least = grain(elements, elements * count * kElementWork);
  parallel_for(0, elements, least, [&](int64_t begin, int64_t end) {
    // Some at a time, which stay in the first-level cache from array to array.
    constexpr int64_t most = 1024;
    for (int64_t first = begin; first < end; first += most) {
      const int64_t some = std::min(most, end - first);
      A* total = sums + first;
      std::copy_n(arrays + first, some, total);
      for (int64_t k = 1; k < count; ++k) {
        const A* source = arrays + k * elements + first;
        for (int64_t i = 0; i < some; ++i) total[i] += source[i];
      }
    }
  });
}

// The function that returns an operator's kernels, for the instruction set in use.
#ifdef __x86_64__
#define MMDCN_CPU_KERNEL(name, ...)                                            \
  (capability() == Capability::kAvx512Amx    ? &avx512_amx::name<__VA_ARGS__>  \
   : capability() == Capability::kAvx512Bf16 ? &avx512_bf16::name<__VA_ARGS__> \
   : capability() == Capability::kAvx512     ? &avx512::name<__VA_ARGS__>      \
   : capability() == Capability::kAvx2       ? &avx2::name<__VA_ARGS__>        \
                                             : &portable::name<__VA_ARGS__>)
#else
#define MMDCN_CPU_KERNEL(name, ...) (&portable::name<__VA_ARGS__>)
#endif

// Calls `function` with a value of the type that the elements of `input` are stored in.
template <typename F>
auto with_element_type(const Tensor& input, const F& function) {
  switch (input.scalar_type()) {
    case ScalarType::Double:
      return function(double{});
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Half:
      return function(Half{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "mmdcn: input must be a floating-point tensor");
  }
}

}  // namespace
}  // namespace mmdcn
