// Registration of deform_conv2d on the CPU.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "backward_batch.h"
#include "forward_batch.h"

namespace mmdcn {
namespace {

Tensor deform_conv2d(const Tensor& input, const Tensor& offset, const Tensor& weight,
                     const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                     const std::optional<Tensor>& mask, bool /* allow_tf32 */,
                     bool /* matmul_tf32 */) {
  const DeformConv2dShape shape =
      deform_conv2d_shape(input, offset, weight, bias, stride, padding, dilation, mask);
  return with_element_type(input, [&](auto element) {
    return forward<decltype(element)>(shape, input, offset, weight, bias, mask);
  });
}

Gradients deform_conv2d_backward(const Tensor& grad_output, const Tensor& input,
                                 const Tensor& offset, const Tensor& weight,
                                 const std::vector<int64_t>& stride,
                                 const std::vector<int64_t>& padding,
                                 const std::vector<int64_t>& dilation,
                                 const std::optional<Tensor>& mask,
                                 const std::vector<bool>& output_mask, bool /* allow_tf32 */,
                                 bool /* matmul_tf32 */, bool /* deterministic: it always is */) {
  const DeformConv2dShape shape =
      deform_conv2d_shape(input, offset, weight, std::nullopt, stride, padding, dilation, mask);
  check_grad_output(shape, grad_output, input, output_mask);
  return with_element_type(input, [&](auto element) {
    return backward<decltype(element)>(shape, grad_output, input, offset, weight, mask,
                                       output_mask);
  });
}

}  // namespace
}  // namespace mmdcn

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&mmdcn::deform_conv2d));
  m.impl("deform_conv2d_backward", TORCH_BOX(&mmdcn::deform_conv2d_backward));
}
