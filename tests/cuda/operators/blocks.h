#pragma once

#include <cstdint>

namespace mmdcn::cuda {

// Fewer blocks than there is work for, so that blocks stride over it.
constexpr int64_t kFewBlocks = 3;

}  // namespace mmdcn::cuda
