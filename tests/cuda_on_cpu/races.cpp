// What races.h says, with clocks: FastTrack's (Flanagan and Freund, PLDI 2009), where barriers are
// the ticks, and a block knows of how many ticks of each other block are behind it.
#include "races.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <sstream>
#include <unordered_map>
#include <vector>

#define HIDDEN extern "C" __attribute__((visibility("hidden")))

namespace cuda_on_cpu::races {
namespace {

constexpr int kWarp = 32, kMostWarps = 32;
constexpr uintptr_t kGrain = 4;  // bytes that are looked at together
constexpr uintptr_t kGrains = 1024;

using Clocks = std::vector<uint32_t>;  // of each block, how many of its ticks are known of

void join(Clocks& to, const Clocks& from) {
  to.resize(std::max(to.size(), from.size()));
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

// Of a thread that has read a count, or had a fence, since the last barrier.
struct Thread {
  Clocks known;  // beyond what its block knows
  Clocks read;   // of counts, which a fence makes known
  bool fenced = false;
};

struct Block {
  uint32_t ticks = 0;
  std::array<uint32_t, kMostWarps> ticks_of_warp{};
  Clocks known, read;
  bool fenced = false;  // all its threads, before the last barrier
  std::unordered_map<int, Thread> threads;
};

struct Access {
  const void* code;
  uint32_t tick, tick_of_warp, warps;  // the latter a bit for each
  int block;
  int16_t thread;  // one of those, if `several`
  uint8_t bytes;   // a bit for each of the grain's
  bool write, several;
};

using Page = std::array<std::vector<Access>, kGrains>;

bool watching = false;
int block = 0, thread = 0;
uintptr_t stack_begin = 0, stack_end = 0;
std::vector<Block> blocks;
size_t n_threads = 0;  // of each
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_number = 0;  // of the page that was used last
Page* last_page = nullptr;
std::unordered_map<const void*, Clocks> counts;
std::string report;

Thread& own() { return blocks[block].threads[thread]; }

bool before_now(const Access& access) {
  const Block& mine = blocks[block];
  if (access.block == block) {
    if (access.tick < mine.ticks || (access.thread == thread && !access.several)) return true;
    const int warp = thread / kWarp;
    return access.warps == 1u << warp && access.tick_of_warp < mine.ticks_of_warp[warp];
  }
  const auto knows = [&](const Clocks& clocks) {
    return static_cast<size_t>(access.block) < clocks.size() && clocks[access.block] > access.tick;
  };
  if (knows(mine.known)) return true;
  const auto at = mine.threads.find(thread);
  return at != mine.threads.end() && knows(at->second.known);
}

void tell(std::ostream& out, const Access& access) {
  Dl_info info{};
  dladdr(access.code, &info);
  const auto at = reinterpret_cast<uintptr_t>(access.code);
  out << (access.write ? "a write" : "a read") << " by "
      << (access.several ? "several threads with " : "") << "thread " << access.thread
      << " of block " << access.block << ", behind " << access.tick << " barriers, at +0x"
      << std::hex << at - reinterpret_cast<uintptr_t>(info.dli_fbase) << std::dec;
}

void look(std::vector<Access>& others, const Access& now) {
  bool there = false;
  std::erase_if(others, [&](Access& other) {
    if ((other.bytes & now.bytes) == 0) return false;
    if (before_now(other)) return (other.bytes & ~now.bytes) == 0 && (now.write || !other.write);
    if (other.write || now.write) {
      if (!report.empty()) return false;
      std::ostringstream out;
      out << "a race: ";
      tell(out, other), out << ", and ", tell(out, now);
      report = out.str();
    } else if (other.block == now.block && other.tick_of_warp == now.tick_of_warp &&
               other.bytes == now.bytes) {
      other.warps |= now.warps;
      other.several = there = true;
    }
    return false;
  });
  if (!there) others.push_back(now);
}

void see(const void* address, size_t bytes, bool write, const void* code) {
  const auto begin = reinterpret_cast<uintptr_t>(address), end = begin + bytes;
  if (begin >= stack_begin && end <= stack_end) return;
  const Block& mine = blocks[block];
  const uint32_t tick_of_warp = mine.ticks_of_warp[thread / kWarp];
  for (uintptr_t grain = begin / kGrain; grain * kGrain < end; ++grain) {
    uint8_t mask = 0;
    for (uintptr_t i = 0; i < kGrain; ++i)
      if (grain * kGrain + i >= begin && grain * kGrain + i < end) mask |= 1 << i;
    if (last_page == nullptr || grain / kGrains != last_number) {
      auto& page = pages[grain / kGrains];
      if (!page) page = std::make_unique<Page>();
      last_number = grain / kGrains, last_page = page.get();
    }
    look((*last_page)[grain % kGrains], {code, mine.ticks, tick_of_warp, 1u << thread / kWarp,
                                         block, static_cast<int16_t>(thread), mask, write, false});
  }
}

}  // namespace

void launch(size_t n, size_t threads) {
  n_threads = threads;
  watching = false;
  pages.clear(), counts.clear(), report.clear();
  last_page = nullptr;
  blocks.assign(n, {});
}

void enter(int block_, int thread_, const char* stack, size_t stack_bytes) {
  block = block_, thread = thread_;
  stack_begin = reinterpret_cast<uintptr_t>(stack), stack_end = stack_begin + stack_bytes;
  watching = true;
}
void leave() { watching = false; }
bool set_watching(bool now) {
  std::swap(watching, now);
  return now;
}

void barrier(int of) {
  Block& state = blocks[of];
  ++state.ticks;
  state.read.clear();
  size_t fenced = 0;
  for (const auto& [number, one] : state.threads) {
    fenced += one.fenced;
    join(state.known, one.known), join(state.read, one.read);
  }
  state.fenced = fenced == n_threads;
  state.threads.clear();
}
void warp_barrier(int of, int warp) { ++blocks[of].ticks_of_warp[warp]; }

void fence() {
  Thread& mine = own();
  mine.fenced = true;
  join(mine.known, mine.read), join(mine.known, blocks[block].read);
}
void release(const void* count, bool fenced) {
  const Block& state = blocks[block];
  if (fenced && !state.fenced && !own().fenced) return;
  Clocks clocks = state.known;
  join(clocks, own().known);
  clocks.resize(blocks.size());
  clocks[block] = state.ticks;
  join(counts[count], clocks);
}
void acquire(const void* count, bool fenced) {
  join(fenced ? own().read : own().known, counts[count]);
}

void read(const void* at, size_t bytes) { see(at, bytes, false, __builtin_return_address(0)); }
void write(const void* at, size_t bytes) { see(at, bytes, true, __builtin_return_address(0)); }

void forget(const void* address, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(address) / kGrain;
  for (uintptr_t grain = begin; grain < begin + bytes / kGrain; ++grain) {
    const auto page = pages.find(grain / kGrains);
    if (page != pages.end())
      (*page->second)[grain % kGrains].clear();
    else
      grain = (grain / kGrains + 1) * kGrains - 1;
  }
}

std::string found() { return report; }

}  // namespace cuda_on_cpu::races

// The hooks, by the names that compilers give them.
#define HOOK(name, bytes, write)                                      \
  HIDDEN void __tsan_##name(void* at) {                               \
    using namespace cuda_on_cpu::races;                               \
    if (watching) see(at, bytes, write, __builtin_return_address(0)); \
  }
#define HOOKS(bytes)                        \
  HOOK(read##bytes, bytes, false)           \
  HOOK(write##bytes, bytes, true)           \
  HOOK(unaligned_read##bytes, bytes, false) \
  HOOK(unaligned_write##bytes, bytes, true)
#define RANGE_HOOK(name, write)                                       \
  HIDDEN void __tsan_##name(void* at, size_t bytes) {                 \
    using namespace cuda_on_cpu::races;                               \
    if (watching) see(at, bytes, write, __builtin_return_address(0)); \
  }
HOOK(read1, 1, false)
HOOK(write1, 1, true)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
RANGE_HOOK(read_range, false)
RANGE_HOOK(write_range, true)

// What host code that is compiled so calls besides.
HIDDEN void __tsan_init() {}
HIDDEN void __tsan_vptr_update(void**, void*) {}
HIDDEN int __tsan_atomic32_fetch_add(int* at, int x, int) {
  return __atomic_fetch_add(at, x, __ATOMIC_SEQ_CST);
}
