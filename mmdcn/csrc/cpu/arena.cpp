// Allocation of the CPU operators' scratch memory.
#include "arena.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>

namespace mmdcn {

void* allocate(int64_t bytes) {
  constexpr int64_t line = 64;
#ifdef MMDCN_SANITIZED
  // No byte more than is asked for may be touched.
  void* memory = nullptr;
  if (posix_memalign(&memory, line, bytes) != 0) memory = nullptr;
#else
  constexpr int64_t huge_page = 2 << 20;
  const int64_t border = bytes < huge_page ? line : huge_page;
  void* memory = std::aligned_alloc(border, (bytes + border - 1) / border * border);
#ifdef MADV_HUGEPAGE
  if (border == huge_page && memory != nullptr) {
    // A hint: without support from the system the pages stay small.
    madvise(memory, bytes, MADV_HUGEPAGE);
  }
#endif
#endif
  STD_TORCH_CHECK(memory != nullptr || bytes == 0, "mmdcn: out of memory for ", bytes,
                  " bytes of scratch space");
  return memory;
}

}  // namespace mmdcn
