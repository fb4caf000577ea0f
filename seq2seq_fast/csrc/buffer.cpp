#include "buffer.h"

#include <new>
#include <vector>

namespace seq2seq_fast {
namespace {

constexpr std::align_val_t kAlign{64};

struct Block {
  void* data;
  size_t bytes;
};

struct Kept {
  std::vector<Block> blocks;                          // the last given back is the last
  Kept() { blocks.reserve(kMostKept / kLeastKept); }  // so that giving back never fails
  size_t total = 0;
  void drop(size_t i) {
    operator delete(blocks[i].data, kAlign);
    total -= blocks[i].bytes;
    blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(i));
  }
  ~Kept() {
    while (!blocks.empty()) drop(blocks.size() - 1);
  }
};

thread_local Kept kept;

}  // namespace

void* take(size_t& bytes) {
  if (bytes >= kLeastKept) {
    for (size_t i = kept.blocks.size(); i-- > 0;) {
      const Block block = kept.blocks[i];
      if (block.bytes < bytes || block.bytes > 2 * bytes) continue;
      kept.blocks.erase(kept.blocks.begin() + static_cast<std::ptrdiff_t>(i));
      kept.total -= block.bytes;
      bytes = block.bytes;
      return block.data;
    }
  }
  return operator new(bytes, kAlign);
}

void give_back(void* data, size_t bytes) {
#ifndef S2S_SANITIZE  // which would no longer see where a block ends
  if (bytes >= kLeastKept && bytes <= kMostKept) {
    while (kept.total + bytes > kMostKept) kept.drop(0);
    kept.blocks.push_back({data, bytes});
    kept.total += bytes;
    return;
  }
#endif
  operator delete(data, kAlign);
}

}  // namespace seq2seq_fast
