// Blocks of channels, the shares of the work that threads compute alone.
#pragma once

#include <cstdint>

namespace mmdcn {

// A range of channels inside one group, or of whole groups, of which `group` is the first.
struct ChannelBlock {
  int64_t group, begin, end;

  int64_t channels() const { return end - begin; }
  int64_t groups(int64_t group_channels) const {
    return channels() > group_channels ? channels() / group_channels : 1;
  }
};

}  // namespace mmdcn
