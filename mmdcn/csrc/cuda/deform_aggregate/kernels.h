// The launches of deformable aggregation on CUDA, without a header of PyTorch's or CUDA's.
#pragma once

#include <cstddef>

#include "../../deform_aggregate_shape.h"
#include "../types.h"

namespace mmdcn::cuda {

struct AggregateProblem {
  DeformAggregateShape shape;
  AggregateLayout offset, mask;  // their gradients are contiguous
};

// Channels that a lane loads at once, for elements of so many bytes: four lanes have the sixteen
// channels of a group as models have them.
constexpr int aggregate_vector(size_t bytes) { return bytes == 8 ? 2 : 4; }

// All pointers are to memory of the stream's device; input, output and their gradients are
// contiguous, (N, H, W, C), and begin at multiples of 16 bytes. Nothing may be empty. Nothing waits
// for the device. A launch that CUDA refuses throws std::runtime_error.

// `output`, every element written once.
void aggregate_forward(Precision precision, const AggregateProblem& problem, const void* input,
                       const void* offset, const void* mask, void* output, const Stream& stream);

// `grad_input`, float or double, must hold zeros: it is added to atomically, in no fixed order.
// Every element of `grad_offset` and `grad_mask` is written once, in a fixed order of summation.
// Any of the three may be null.
void aggregate_backward(Precision precision, const AggregateProblem& problem,
                        const void* grad_output, const void* input, const void* offset,
                        const void* mask, void* grad_input, void* grad_offset, void* grad_mask,
                        const Stream& stream);

}  // namespace mmdcn::cuda
