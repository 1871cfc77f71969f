// Blocks of channels, the shares of the work that threads compute alone.
#pragma once

#include <cstdint>

namespace mmdcn {

// A range of channels inside one group.
struct ChannelBlock {
  int64_t group, begin, end;
};

}  // namespace mmdcn
