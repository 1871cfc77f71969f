// The windows of the backward pass on the input and on its gradient, for one block of channels.
#pragma once

#include <cstddef>

#include "../arena.h"
#include "backward_tile.h"
#include "tiles.h"
#include "windows.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// The windows that a block needs: on the input if its channels lie in planes, and on its gradient
// if that cannot be added to in place. If the gradient is stored in 16 bits, the window holds all
// of it, so that it is rounded once, after everything has been added.
template <Sampling sampling, typename T, typename A = accumulator_t<T>>
struct WindowSizes {
  int64_t input_rows = 0, grad_rows = 0, grad_columns = 0;

  WindowSizes(const DeformConv2dShape& shape, const BackwardTensors<T>& tensors,
              const WindowPlan& plan) {
    const bool planes = !tensors.input_layout.channels_last();
    if (planes && sampling == Sampling::kRows) input_rows = plan.rows;
    if (tensors.grad_input == nullptr) return;
    if (!std::is_same_v<T, A>) {
      grad_rows = shape.height;
      grad_columns = shape.width;
    } else if (planes && sampling == Sampling::kRows) {
      grad_rows = plan.rows;
      grad_columns = plan.columns;
    }
  }
};

template <Sampling sampling, typename A>
inline WindowPlan plan_backward(const DeformConv2dShape& shape) {
  return sampling == Sampling::kPlanes ? no_windows(shape)
                                       : plan_windows<A>(shape, shape.channels, kBackwardTile);
}

template <Sampling sampling, typename T, typename A = accumulator_t<T>>
int64_t tiles(const DeformConv2dShape& shape) {
  return tiles_of_image(shape, plan_backward<sampling, A>(shape), kBackwardTile);
}

template <Sampling sampling, typename T, typename A = accumulator_t<T>>
void tile_at(const DeformConv2dShape& shape, int64_t index, BackwardTile& tile) {
  set_tile(shape, plan_backward<sampling, A>(shape), index, tile);
}

// Takes the windows of a block of so many channels from the arena.
template <Sampling sampling, typename T, typename A = accumulator_t<T>>
BlockWindows<T> take_windows(const DeformConv2dShape& shape, const BackwardTensors<T>& tensors,
                             int64_t channels, Arena& arena) {
  const WindowPlan plan = plan_backward<sampling, A>(shape);
  const WindowSizes<sampling, T> sizes(shape, tensors, plan);
  const auto take = [&](int64_t rows, int64_t columns) {
    A* memory = arena.take<A>(window_size<A>(channels, rows, columns));
    return empty_window(memory, channels, rows, columns);
  };
  BlockWindows<T> windows = {};
  windows.input = take(sizes.input_rows, plan.columns);
  windows.grad_input = take(sizes.grad_rows, sizes.grad_columns);
  return windows;
}

template <Sampling sampling, typename T>
int64_t window_bytes(const DeformConv2dShape& shape, const BackwardTensors<T>& tensors,
                     int64_t channels) {
  Arena arena(nullptr);
  take_windows<sampling>(shape, tensors, channels, arena);
  return arena.used();
}

template <Sampling sampling, typename T>
void open(const DeformConv2dShape& shape, const BackwardTensors<T>& tensors,
          const ChannelBlock& block, std::byte* memory, BlockWindows<T>& windows) {
  Arena arena(memory);
  windows = take_windows<sampling>(shape, tensors, block.end - block.begin, arena);
  auto& gradient = windows.grad_input;
  if (gradient.capacity == shape.height &&
      gradient.row_stride == gradient.pixel_stride * shape.width) {
    gradient.right = shape.width;
    gradient.set_rows(0, shape.height);
    fill_zero(gradient.data, gradient.capacity * gradient.row_stride);
  }
}

template <typename T, typename A = accumulator_t<T>>
void close(const DeformConv2dShape& shape, const BackwardTensors<T>& tensors,
           const ChannelBlock& block, BlockWindows<T>& windows) {
  const RowWindow<A>& window = windows.grad_input;
  if (tensors.grad_input == nullptr || window.capacity == 0) return;
  flush_gradient(shape, window, window.begin, window.end,
                 tensors.grad_input + block.begin * tensors.input_layout.channel_stride,
                 tensors.input_layout, block.end - block.begin);
}

// Moves the windows to a tile.
template <typename T, typename A = accumulator_t<T>>
inline void roll_windows(const BlockCall<T>& call, const WindowPlan& plan,
                         const BackwardTile& tile) {
  const DeformConv2dShape& shape = call.shape;
  RowWindow<A>& input = call.windows.input;
  RowWindow<A>& gradient = call.windows.grad_input;
  if (input.capacity > 0) {
    roll_input(shape, range_around(shape, tile, plan, input.capacity, plan.columns), call.planes(),
               call.channels(), input);
  }
  if constexpr (std::is_same_v<T, A>) {
    const bool rolls = gradient.capacity < shape.height, strips = plan.columns < shape.width;
    if (gradient.capacity > 0 && (rolls || strips)) {
      roll_gradient(shape, range_around(shape, tile, plan, gradient.capacity, plan.columns),
                    call.grad_planes(), call.tensors.input_layout, call.channels(), gradient);
    }
  }
}

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
