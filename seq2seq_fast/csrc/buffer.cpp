#include "buffer.h"

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <new>
#include <vector>

namespace seq2seq_fast {
namespace {

constexpr std::align_val_t kAlign{64};

struct Block {
  char* data;
  size_t bytes;
};

char* allocate(size_t bytes) { return static_cast<char*>(operator new(bytes, kAlign)); }

struct Kept {
  char* small = nullptr;  // kSmall bytes, of which the first `used` are taken
  size_t used = 0;
  std::vector<Block> large;  // the last given back is the last
  size_t total = 0;

  Kept() {
    large.reserve(kMostKept / kSmall);  // so that giving back never fails
    small = allocate(kSmall);
  }
  ~Kept() {
    while (!large.empty()) drop(large.size() - 1);
    operator delete(small, kAlign);
  }
  Block remove(size_t i) {
    const Block block = large[i];
    total -= block.bytes;
    large.erase(large.begin() + static_cast<std::ptrdiff_t>(i));
    return block;
  }
  void drop(size_t i) { operator delete(remove(i).data, kAlign); }
};

thread_local Kept kept;

}  // namespace

int64_t product_of(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t n : sizes)
    if (n < 0 || __builtin_mul_overflow(product, n, &product)) throw std::bad_alloc();
  return product;
}

#ifdef S2S_SANITIZE  // which sees where a block ends only if every block is one of its own

void* take(size_t& bytes) { return allocate(bytes); }
void give_back(void* data, size_t) { operator delete(data, kAlign); }

#else

void* take(size_t& bytes) {
  Kept& k = kept;
  bytes = (bytes + 63) / 64 * 64;
  if (k.used + bytes < kSmall) {
    void* data = k.small + k.used;
    k.used += bytes;
    return data;
  }
  for (size_t i = k.large.size(); i-- > 0;)
    if (k.large[i].bytes >= bytes && k.large[i].bytes <= 2 * bytes) {
      bytes = k.large[i].bytes;
      return k.remove(i).data;
    }
  return allocate(bytes);
}

void give_back(void* data, size_t bytes) {
  Kept& k = kept;
  const std::less<> before;
  if (!before(data, k.small) && before(data, k.small + kSmall)) {
    k.used -= bytes;
  } else if (bytes < kSmall || bytes > kMostKept) {
    operator delete(data, kAlign);
  } else {
    while (k.total + bytes > kMostKept) k.drop(0);
    k.large.push_back({static_cast<char*>(data), bytes});
    k.total += bytes;
  }
}

#endif

void keep_freed_memory() {
#ifdef __GLIBC__
  [[maybe_unused]] static const bool told = [] {
    for (const char* name : {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"})
      if (std::getenv(name) != nullptr) return false;
    // The largest threshold of blocks with pages of their own that the library would come to by
    // itself; to set one of the two is to end that.
    return mallopt(M_MMAP_THRESHOLD, 32 << 20) == 1 && mallopt(M_TRIM_THRESHOLD, 128 << 20) == 1;
  }();
#endif
}

void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t begin =
      (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  // A refusal costs nothing but time.
  if (end >= begin + 2 * kHugePage)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void collapse_to_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  madvise(data, bytes, MADV_HUGEPAGE);
  constexpr int kCollapse = 25;  // MADV_COLLAPSE of Linux 6.1, which older headers do not have
  madvise(data, bytes, kCollapse);
#endif
}

}  // namespace seq2seq_fast
