// An allocator that puts each block between two pages that nobody may touch, for LD_PRELOAD.
//
// Between guard_start() and guard_stop(), what torch allocates for tensors on the CPU, and the
// operators for their scratch memory, lies against the page behind it, or where asked for, against
// the one before it: an access of one element too far ends the process. What was freed is touched
// by nobody either, as its pages are not used again. New blocks are full of NaN.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>

extern "C" void* __libc_memalign(size_t alignment, size_t size);
extern "C" void __libc_free(void* pointer);

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kPages = size_t(1) << 26;  // 256 GiB of addresses

struct Block {
  uint32_t first, count;  // pages, guards included
};

std::atomic<bool> active{false}, behind{true};
std::atomic<size_t> next_page{0}, block_count{0};
char* region = nullptr;
Block* blocks = nullptr;  // by the page that a pointer points to

void* reserve(size_t bytes, int protection) {
  void* memory =
      mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : memory;
}

bool is_guarded(const void* pointer) {
  const char* at = static_cast<const char*>(pointer);
  return region != nullptr && at >= region && at < region + kPages * kPage;
}

// `alignment` is of what lies against the page before it; against the page behind it lies what is
// as large as it says, as a tensor that is a view of another may.
void* allocate_guarded(size_t alignment, size_t size) {
  const size_t data_pages = (size + kPage - 1) / kPage;
  const size_t slack = alignment > kPage ? alignment / kPage : 0;
  const size_t count = data_pages + 2 + slack;
  const size_t first = next_page.fetch_add(count);
  if (first + count > kPages) {
    errno = ENOMEM;
    return nullptr;
  }
  uintptr_t data = reinterpret_cast<uintptr_t>(region) + (first + 1) * kPage;
  if (slack > 0) data = (data + alignment - 1) / alignment * alignment;
  if (size > 0 &&
      mprotect(reinterpret_cast<void*>(data), data_pages * kPage, PROT_READ | PROT_WRITE) != 0) {
    abort();
  }
  if (behind) data += data_pages * kPage - size;
  char* pointer = reinterpret_cast<char*>(data);
  // A pointer to no bytes points to the page behind.
  blocks[(pointer - region) / kPage] = {static_cast<uint32_t>(first), static_cast<uint32_t>(count)};
  std::memset(pointer, 0xff, size);
  ++block_count;
  return pointer;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Against the page behind it, if `at_end` is not 0.
EXPORT void guard_start(int at_end) {
  if (region == nullptr) {
    blocks = static_cast<Block*>(reserve(kPages * sizeof(Block), PROT_READ | PROT_WRITE));
    region = static_cast<char*>(reserve(kPages * kPage, PROT_NONE));
    if (blocks == nullptr || region == nullptr) abort();
  }
  behind = at_end != 0;
  active = true;
}

EXPORT void guard_stop() { active = false; }

// The number of blocks that have been guarded.
EXPORT size_t guard_count() { return block_count; }

EXPORT int posix_memalign(void** pointer, size_t alignment, size_t size) {
  *pointer = active ? allocate_guarded(alignment, size) : __libc_memalign(alignment, size);
  return *pointer == nullptr ? ENOMEM : 0;
}

EXPORT void* aligned_alloc(size_t alignment, size_t size) {
  return active ? allocate_guarded(alignment, size) : __libc_memalign(alignment, size);
}

EXPORT void free(void* pointer) {
  if (!is_guarded(pointer)) {
    __libc_free(pointer);
    return;
  }
  const Block block = blocks[(static_cast<char*>(pointer) - region) / kPage];
  if (block.count == 0) abort();  // freed twice, or not where it begins
  blocks[(static_cast<char*>(pointer) - region) / kPage] = {0, 0};
  mmap(region + block.first * kPage, block.count * kPage, PROT_NONE,
       MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
