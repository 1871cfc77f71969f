// What deform_conv2d.cu calls where the kernels for tensor cores are wanted: see deform_conv2d.h.
#pragma once

#include "kernels.h"

namespace mmdcn::cuda {

void tensor_forward(Precision precision, const DeformConv2dProblem& problem, const void* input,
                    const float* offset, const float* mask, const void* weight, const void* bias,
                    void* output, const Stream& stream);

void tensor_backward_data(Precision precision, const DeformConv2dProblem& problem,
                          const void* grad_output, const void* input, const float* offset,
                          const float* mask, const void* weight, const GradInput& grad_input,
                          float* grad_offset, float* grad_mask, const Stream& stream);

int64_t tensor_weight_splits(Precision precision, const DeformConv2dProblem& problem);

void tensor_backward_weight(Precision precision, const DeformConv2dProblem& problem,
                            const void* grad_output, const void* input, const float* offset,
                            const float* mask, int64_t splits, bool accumulate, float* workspace,
                            const Stream& stream);

}  // namespace mmdcn::cuda
