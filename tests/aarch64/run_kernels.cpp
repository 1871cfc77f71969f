// A program that runs the CPU kernels of every operator without torch, on problems in a file: for
// machines that torch is not at hand for, such as an emulated one.
//
// usage: run_kernels PROBLEMS RESULTS
//
// A problem is the number of the operator and of the element type, the integers and real numbers of
// the shape, and the tensors, of 8 bytes each but for the tensors, which are their number of bytes,
// 0 for a missing one, and these. Its results are the output and the gradients.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "cpu/arena.h"
#include "cpu/deform_aggregate/kernel.h"
#include "cpu/deform_conv2d/kernel.h"
#include "cpu/deform_conv_nd/kernel.h"
#include "cpu/deform_roi_pool/kernel.h"

namespace mmdcn {

void* allocate(int64_t bytes) {
  void* memory = std::aligned_alloc(64, (bytes + 127) / 64 * 64);
  if (memory == nullptr) std::abort();
  return memory;
}

}  // namespace mmdcn

namespace {

using namespace mmdcn;

constexpr int kRank = 3;  // of the convolution over any number of dimensions, as it is compiled

// A tensor's memory, zero at first.
template <typename E>
class Values {
 public:
  explicit Values(int64_t count = 0) : count_(count), buffer_(count + 64) {
    std::memset(static_cast<void*>(buffer_.get()), 0, (count + 64) * sizeof(E));
  }
  E* get() const { return count_ > 0 ? buffer_.get() : nullptr; }
  int64_t count() const { return count_; }

 private:
  int64_t count_;
  Buffer<E> buffer_;
};

class Problems {
 public:
  explicit Problems(const char* path) : file_(std::fopen(path, "rb")) {
    if (file_ == nullptr) std::abort();
  }
  bool next() { return std::fread(&operator_, sizeof operator_, 1, file_) == 1; }
  int64_t which() const { return operator_; }

  template <typename E>
  Values<E> tensor() {
    int64_t bytes = 0;
    read(&bytes, sizeof bytes);
    Values<E> values(bytes / static_cast<int64_t>(sizeof(E)));
    if (bytes > 0) read(values.get(), bytes);
    return values;
  }
  int64_t number() {
    int64_t value = 0;
    read(&value, sizeof value);
    return value;
  }
  double real() {
    double value = 0;
    read(&value, sizeof value);
    return value;
  }

 private:
  void read(void* target, size_t bytes) {
    if (std::fread(target, 1, bytes, file_) != bytes) std::abort();
  }
  FILE* file_;
  int64_t operator_ = 0;
};

class Results {
 public:
  explicit Results(const char* path) : file_(std::fopen(path, "wb")) {
    if (file_ == nullptr) std::abort();
  }
  ~Results() { std::fclose(file_); }
  template <typename E>
  void write(const Values<E>& values) {
    const int64_t bytes = values.count() * sizeof(E);
    write_bytes(&bytes, sizeof bytes);
    if (bytes > 0) write_bytes(values.get(), bytes);
  }

 private:
  void write_bytes(const void* source, size_t bytes) {
    if (std::fwrite(source, 1, bytes, file_) != bytes) std::abort();
  }
  FILE* file_;
};

// Blocks of so many channels, each of whole groups: `of_block` of them.
std::vector<ChannelBlock> blocks_of(int64_t blocks, int64_t channels, int64_t of_block = 1) {
  std::vector<ChannelBlock> found;
  for (int64_t b = 0; b < blocks; ++b) {
    found.push_back({b * of_block, b * channels, (b + 1) * channels});
  }
  return found;
}

// ------------------------------------------------------------------------------ deform_conv2d

template <typename T>
struct Conv2dProblem {
  using A = accumulator_t<T>;
  DeformConv2dShape shape = {};
  Values<T> input, weight, grad_output;
  Values<A> offset, mask, bias;
  ImageLayout input_layout, output_layout;
  SamplingTensor<A> offsets, masks;
  WeightLayout weight_layout;

  explicit Conv2dProblem(Problems& file) {
    for (int64_t* size :
         {&shape.batch, &shape.channels, &shape.height, &shape.width, &shape.out_channels,
          &shape.out_height, &shape.out_width, &shape.kernel_height, &shape.kernel_width,
          &shape.groups, &shape.deform_groups}) {
      *size = file.number();
    }
    for (GridAxis* axis : {&shape.y, &shape.x}) {
      axis->stride = file.number();
      axis->padding = file.number();
      axis->dilation = file.number();
    }
    const bool channels_last = file.number() != 0;
    input = file.tensor<T>();
    offset = file.tensor<A>();
    weight = file.tensor<T>();
    bias = file.tensor<A>();
    mask = file.tensor<A>();
    grad_output = file.tensor<T>();
    const int64_t area = shape.height * shape.width, pixels = shape.pixels();
    input_layout = channels_last ? ImageLayout{shape.channels, 1} : ImageLayout{1, area};
    output_layout = channels_last ? ImageLayout{shape.out_channels, 1} : ImageLayout{1, pixels};
    const int64_t samples = shape.deform_groups * shape.taps();
    offsets = {offset.get(), 2 * samples * pixels, pixels, 1};
    masks = {mask.get(), samples * pixels, pixels, 1};
    weight_layout = {shape.group_channels() * shape.taps(), shape.taps(), 1};
  }
};

template <typename T>
Values<T> conv2d_forward(const Conv2dProblem<T>& problem) {
  const DeformConv2dShape& shape = problem.shape;
  const ForwardKernel<T> kernel = portable::deform_conv2d_forward<T>(shape);
  Values<T> output(shape.batch * shape.out_channels * shape.pixels());
  const Values<std::byte> packed(kernel.packed_bytes(shape));
  kernel.pack_weight(shape, problem.weight.get(), problem.weight_layout, 0,
                     kernel.pack_slices(shape), packed.get());
  ForwardTensors<T> tensors = {};
  tensors.input = problem.input.get();
  tensors.input_layout = problem.input_layout;
  tensors.offset = problem.offsets;
  tensors.mask = problem.masks;
  tensors.weight = packed.get();
  tensors.bias = problem.bias.get();
  tensors.output = output.get();
  tensors.output_layout = problem.output_layout;
  tensors.output_image = shape.out_channels * shape.pixels();
  const Values<std::byte> scratch(kernel.scratch_bytes(shape, tensors));
  kernel.run(shape, tensors, 0, kernel.shares(shape), scratch.get());
  return output;
}

// In blocks of whole groups, so that no offset group lies in two of them.
template <typename T>
void conv2d_backward(const Conv2dProblem<T>& problem, Results& results) {
  using A = accumulator_t<T>;
  const DeformConv2dShape& shape = problem.shape;
  const BackwardKernel<T> kernel = portable::deform_conv2d_backward<T>(shape);
  Values<T> grad_input(problem.input.count()), grad_weight(problem.weight.count());
  Values<A> grad_offset(problem.offset.count()), grad_mask(problem.mask.count());
  const int64_t count = std::min(shape.groups, shape.deform_groups);
  const std::vector<ChannelBlock> blocks =
      blocks_of(count, shape.channels / count, shape.groups / count);
  const int64_t pixels = shape.pixels();
  BackwardTensors<T> tensors = {};
  tensors.input_layout = problem.input_layout;
  tensors.output_layout = problem.output_layout;
  for (size_t b = 0; b < blocks.size(); ++b) {
    const ChannelBlock& block = blocks[b];
    const Values<A> packed(kernel.packed_size(shape, block)), sums(kernel.sums_size(shape, block));
    kernel.pack_weight(shape, problem.weight.get(), problem.weight_layout, block, packed.get());
    tensors.weight = packed.get();
    tensors.grad_weight = sums.get();
    for (int64_t image = 0; image < shape.batch; ++image) {
      const int64_t area = image * shape.channels * shape.height * shape.width;
      const int64_t samples = image * shape.deform_groups * shape.taps() * pixels;
      tensors.grad_output = problem.grad_output.get() + image * shape.out_channels * pixels;
      tensors.input = problem.input.get() + area;
      tensors.offset = problem.offsets.image(image);
      if (problem.mask.count() > 0) tensors.mask = problem.masks.image(image);
      tensors.grad_input = grad_input.get() + area;
      tensors.grad_offset = {grad_offset.get() + 2 * samples, pixels, 1};
      tensors.grad_mask = {grad_mask.get() ? grad_mask.get() + samples : nullptr, pixels, 1};
      const Values<std::byte> memory(kernel.window_bytes(shape, tensors, block.channels()));
      const Values<std::byte> scratch(kernel.scratch_bytes(shape, tensors, block.channels()));
      BlockWindows<T> windows;
      kernel.open(shape, tensors, block, memory.get(), windows);
      kernel.run(shape, tensors, blocks.data(), b, 0, kernel.tiles(shape), windows, scratch.get());
      kernel.close(shape, tensors, block, windows);
    }
    kernel.unpack_sums(shape, sums.get(), block, false, grad_weight.get(), problem.weight_layout);
  }
  results.write(grad_input);
  results.write(grad_offset);
  results.write(grad_weight);
  results.write(grad_mask);
}

template <typename T>
void conv2d(Problems& file, Results& results) {
  const Conv2dProblem<T> problem(file);
  results.write(conv2d_forward(problem));
  conv2d_backward(problem, results);
}

// ----------------------------------------------------------------------------- deform_conv_nd

template <typename T>
void conv_nd(Problems& file, Results& results) {
  using A = accumulator_t<T>;
  DeformConvNdShape<kRank> shape = {};
  for (int64_t* size :
       {&shape.batch, &shape.channels, &shape.out_channels, &shape.groups, &shape.deform_groups}) {
    *size = file.number();
  }
  for (int d = 0; d < kRank; ++d) {
    shape.size[d] = file.number();
    shape.out_size[d] = file.number();
    shape.kernel[d] = file.number();
    shape.axis[d].stride = file.number();
    shape.axis[d].padding = file.number();
    shape.axis[d].dilation = file.number();
  }
  const Values<T> input = file.tensor<T>();
  const Values<A> offset = file.tensor<A>();
  const Values<T> weight = file.tensor<T>();
  const Values<A> bias = file.tensor<A>(), mask = file.tensor<A>();
  const Values<T> grad_output = file.tensor<T>();

  const ConvNdKernel<kRank, T> kernel = portable::deform_conv_nd<kRank, T>();
  const int64_t positions = shape.batch * shape.positions(), pixels = shape.batch * shape.pixels();
  const VolumeRows in(shape), out(shape.out_channels, shape.pixels());
  const Values<A> rows(shape.batch * in.image), grad_rows(grad_output.count() + kRowSlack);
  kernel.to_rows(input.get(), in, 0, positions, rows.get());
  kernel.to_rows(grad_output.get(), out, 0, pixels, grad_rows.get());
  const Values<A> packed(kernel.packed_size(shape)), out_rows(grad_output.count());
  kernel.pack_weight(shape, weight.get(), 0, shape.groups * shape.taps(), packed.get());
  const Values<std::byte> scratch(kernel.forward_scratch_bytes(shape));
  kernel.forward(shape,
                 {rows.get(), offset.get(), mask.get(), packed.get(), bias.get(), out_rows.get()},
                 0, pixels, scratch.get());
  const Values<T> output(grad_output.count());
  kernel.from_rows(out_rows.get(), out, 0, pixels, output.get());
  results.write(output);

  const ChannelRange all = {0, shape.channels};
  const Values<A> range_packed(kernel.range_packed_size(shape, all));
  kernel.pack_range(shape, weight.get(), all, range_packed.get());
  const Values<A> input_rows(shape.batch * in.image), grad_offset(offset.count());
  const Values<A> grad_mask(mask.count()), grad_weight(weight.count());
  ConvNdBackward<A> tensors = {};
  tensors.grad_output = grad_rows.get();
  tensors.input = rows.get();
  tensors.offset = offset.get();
  tensors.mask = mask.get();
  tensors.weight = range_packed.get();
  tensors.grad_input = input_rows.get();
  tensors.grad_offset = grad_offset.get();
  tensors.grad_mask = grad_mask.get();
  tensors.grad_weight = grad_weight.get();
  const Values<std::byte> own(kernel.backward_scratch_bytes(shape, tensors, all));
  kernel.backward(shape, tensors, all, 0, shape.batch, own.get());
  const Values<T> grad_input(input.count());
  kernel.from_rows(input_rows.get(), in, 0, positions, grad_input.get());
  results.write(grad_input);
  results.write(grad_offset);
  results.write(grad_weight);
  results.write(grad_mask);
}

// --------------------------------------------------------------------------- deform_aggregate

template <typename T>
void aggregate(Problems& file, Results& results) {
  using A = accumulator_t<T>;
  DeformAggregateShape shape = {};
  shape.batch = file.number();
  shape.channels = file.number();
  shape.groups = file.number();
  for (AggregateAxis* axis : {&shape.y, &shape.x}) {
    axis->size = file.number();
    axis->out_size = file.number();
    axis->kernel = file.number();
    axis->grid.stride = file.number();
    axis->grid.padding = file.number();
    axis->grid.dilation = file.number();
  }
  shape.remove_center = file.number() != 0;
  shape.offset_scale = file.real();
  const Values<T> input = file.tensor<T>();
  const Values<A> offset = file.tensor<A>(), mask = file.tensor<A>();
  const Values<T> grad_output = file.tensor<T>();

  const AggregateKernel<T> kernel = portable::deform_aggregate<T>();
  const Values<T> output(grad_output.count());
  const Values<A> grad_input(input.count()), grad_offset(offset.count()), grad_mask(mask.count());
  const int64_t taps = shape.taps();
  AggregateTensors<T> tensors = {};
  tensors.input = input.get();
  tensors.offset = offset.get();
  tensors.mask = mask.get();
  tensors.offset_layout = {2 * taps * shape.groups, 2 * taps};
  tensors.mask_layout = {taps * shape.groups, taps};
  tensors.output = output.get();
  tensors.grad_output = grad_output.get();
  tensors.grad_input = grad_input.get();
  tensors.grad_offset = grad_offset.get();
  tensors.grad_mask = grad_mask.get();
  const Values<std::byte> scratch(kernel.scratch_bytes(shape));
  kernel.forward(shape, tensors, 0, shape.batch * shape.pixels(), scratch.get());
  const std::vector<ChannelBlock> blocks = blocks_of(shape.groups, shape.group_channels());
  const ChannelBlocks all = {blocks.data(), 1};
  for (int64_t image = 0; image < shape.batch; ++image) {
    const int64_t first = image * shape.pixels();
    const ImageStrip<A> whole = {image,   first,  first + shape.pixels(), {0, shape.y.size},
                                 nullptr, nullptr};
    kernel.backward(shape, tensors, all, 0, shape.groups, whole, scratch.get());
  }
  results.write(output);
  results.write(grad_input);
  results.write(grad_offset);
  results.write(grad_mask);
}

// ---------------------------------------------------------------------------- deform_roi_pool

template <typename T>
void roi_pool(Problems& file, Results& results) {
  using A = accumulator_t<T>;
  DeformRoIPoolShape shape = {};
  for (int64_t* size : {&shape.batch, &shape.channels, &shape.height, &shape.width, &shape.rois,
                        &shape.out_channels, &shape.out_height, &shape.out_width,
                        &shape.deform_groups, &shape.sampling_ratio}) {
    *size = file.number();
  }
  shape.position_sensitive = file.number() != 0;
  shape.spatial_scale = file.real();
  shape.gamma = file.real();
  const Values<T> input = file.tensor<T>();
  const Values<A> rois = file.tensor<A>(), offset = file.tensor<A>();
  const Values<T> grad_output = file.tensor<T>();

  const RoIPoolKernel<T> kernel = portable::deform_roi_pool<T>();
  const Values<T> output(grad_output.count());
  const Values<A> grad_input(input.count()), grad_offset(offset.count());
  RoIPoolTensors<T> tensors = {};
  tensors.input = input.get();
  tensors.rois = rois.get();
  tensors.offset = offset.get();
  tensors.output = output.get();
  tensors.grad_output = grad_output.get();
  tensors.grad_input = grad_input.get();
  tensors.grad_offset = grad_offset.get();
  const int64_t channels = shape.deform_group_channels();
  const Values<std::byte> scratch(kernel.scratch_bytes(shape, channels));
  for (const ChannelBlock& block : blocks_of(shape.deform_groups, channels)) {
    kernel.forward(shape, tensors, block, 0, shape.rois, scratch.get());
    for (int64_t image = 0; image < shape.batch; ++image) {
      kernel.backward(shape, tensors, block, image, scratch.get());
    }
  }
  results.write(output);
  results.write(grad_input);
  results.write(grad_offset);
}

template <typename T>
void run(Problems& problems, Results& results) {
  switch (problems.which()) {
    case 0:
      return conv2d<T>(problems, results);
    case 1:
      return conv_nd<T>(problems, results);
    case 2:
      return aggregate<T>(problems, results);
    case 3:
      return roi_pool<T>(problems, results);
    default:
      std::abort();
  }
}

}  // namespace

int main(int, char** arguments) {
  Problems problems(arguments[1]);
  Results results(arguments[2]);
  while (problems.next()) {
    switch (problems.number()) {
      case 0:
        run<double>(problems, results);
        break;
      case 1:
        run<float>(problems, results);
        break;
      case 2:
        run<Half>(problems, results);
        break;
      case 3:
        run<BFloat16>(problems, results);
        break;
      default:
        std::abort();
    }
  }
  return 0;
}
