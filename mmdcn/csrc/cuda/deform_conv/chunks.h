// Chunks of a batch's output pixels, whose columns are in memory at the same time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../integers.h"
#include "problem.h"

namespace mmdcn::cuda {

// `pixels` pixels, from number `first_pixel` on, of each of `images` images: either whole images,
// or a piece of a single one.
struct Chunk {
  int64_t first_image, images, first_pixel, pixels;

  // Its pixels, in their order: `pixels_of_image` is the number that an image has.
  PixelRange range(int64_t pixels_of_image) const {
    return {first_image * pixels_of_image + first_pixel, images * pixels};
  }
};

// How a batch is cut into chunks of at most `most` pixels and as equal as can be: what is left over
// for a small last one would keep the device as long as a whole one. A smaller batch can have
// larger chunks, so that memory is for one chunk: torch keeps it for the next, if this one fits
// there.
class Chunks {
  int64_t batch_, pixels_;
  int64_t images_;  // of a chunk
  int64_t piece_;   // pixels of an image in a chunk

 public:
  Chunks(int64_t batch, int64_t pixels, int64_t most) : batch_(batch), pixels_(pixels) {
    most = std::max<int64_t>(most, 1);
    images_ = std::clamp<int64_t>(most / pixels, 1, batch);
    images_ = divide_up(batch, divide_up(batch, images_));
    piece_ = divide_up(pixels, divide_up(pixels, most));
  }

  // Calls run(chunk) for each chunk, in the order of the pixels.
  template <typename Run>
  void for_each(const Run& run) const {
    for (int64_t image = 0; image < batch_; image += images_) {
      for (int64_t pixel = 0; pixel < pixels_; pixel += piece_) {
        run(Chunk{image, std::min(images_, batch_ - image), pixel,
                  std::min(piece_, pixels_ - pixel)});
      }
    }
  }
};

}  // namespace mmdcn::cuda
