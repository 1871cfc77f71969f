// The tensors that deform_roi_pool takes, checked, and its sizes.
#pragma once

#include "deform_roi_pool_shape.h"
#include "tensors.h"

namespace mmdcn {

inline DeformRoIPoolShape deform_roi_pool_shape(const Tensor& input, const Tensor& rois,
                                                const std::optional<Tensor>& offset,
                                                const std::vector<int64_t>& output_size,
                                                double spatial_scale, int64_t sampling_ratio,
                                                double gamma, bool position_sensitive) {
  constexpr const char* op = "deform_roi_pool";
  MMDCN_REQUIRE(input.dim() == 4);
  MMDCN_REQUIRE(rois.dim() == 2 && rois.size(1) == 5);
  MMDCN_REQUIRE(input.size(0) > 0 || rois.size(0) == 0);
  MMDCN_REQUIRE(input.size(2) < kTooLong && input.size(3) < kTooLong);
  MMDCN_REQUIRE(output_size.size() == 2);
  MMDCN_REQUIRE(output_size[0] > 0 && output_size[0] < kTooLong);
  MMDCN_REQUIRE(output_size[1] > 0 && output_size[1] < kTooLong);
  MMDCN_REQUIRE(sampling_ratio <= kMostBinSamples);
  MMDCN_REQUIRE(rois.scalar_type() == coordinate_type(input.scalar_type()));
  MMDCN_REQUIRE(rois.device() == input.device());
  DeformRoIPoolShape shape = {};
  shape.batch = input.size(0);
  shape.channels = input.size(1);
  shape.height = input.size(2);
  shape.width = input.size(3);
  shape.rois = rois.size(0);
  shape.out_height = output_size[0];
  shape.out_width = output_size[1];
  shape.deform_groups = 1;
  shape.sampling_ratio = sampling_ratio;
  shape.spatial_scale = spatial_scale;
  shape.gamma = gamma;
  shape.position_sensitive = position_sensitive;
  const int64_t sections = position_sensitive ? shape.bins() : 1;  // of the input's channels
  MMDCN_REQUIRE(input.size(1) > 0 && input.size(1) % sections == 0);
  shape.out_channels = shape.channels / sections;
  if (offset.has_value()) {
    MMDCN_REQUIRE(offset->dim() == 4 && offset->size(0) == shape.rois);
    MMDCN_REQUIRE(offset->size(1) > 0 && offset->size(1) % 2 == 0);
    MMDCN_REQUIRE(offset->size(2) == shape.out_height && offset->size(3) == shape.out_width);
    MMDCN_REQUIRE(offset->scalar_type() == rois.scalar_type());
    MMDCN_REQUIRE(offset->device() == input.device());
    shape.deform_groups = offset->size(1) / 2;
    MMDCN_REQUIRE(shape.out_channels % (offset->size(1) / 2) == 0);
  }
  return shape;
}

inline void check_grad_output(const DeformRoIPoolShape& shape, const Tensor& grad_output,
                              const Tensor& input, const std::vector<bool>& output_mask) {
  check_grad_output("deform_roi_pool_backward", grad_output,
                    {shape.rois, shape.out_channels, shape.out_height, shape.out_width}, input,
                    output_mask, 2);
}

}  // namespace mmdcn
