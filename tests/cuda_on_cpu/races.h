// Races among a kernel's threads, found by what orders them and not by what came of it.
//
// Two accesses to the same bytes, one of them a write, race unless something makes one happen
// before the other: a barrier of their block or warp, or a count that one block announces and
// another waits for. A shuffle does not: it hands over a value, and orders no memory. The compiler
// calls the hooks in races.cpp at every access (-fsanitize=thread, without the runtime that goes
// with it); the harness tells what runs, and what is ordered. Without that flag nothing of it is
// there.
#pragma once
#include <cstddef>
#include <string>

#ifdef __SANITIZE_THREAD__
#define IF_WATCHED(...) __VA_ARGS__
#else
#define IF_WATCHED(...)
#endif

namespace cuda_on_cpu::races {

// What is known of accesses ends with a launch of so many blocks of threads.
void launch(size_t blocks, size_t threads);
// From here on a thread of a block runs, whose stack is its own; from `leave` on, none.
void enter(int block, int thread, const char* stack, size_t stack_bytes);
void leave();
// All threads of a block, or of a warp, are at one.
void barrier(int block);
void warp_barrier(int block, int warp);
// What a thread does to a count. Where the instruction itself orders nothing (`fenced`), a fence
// before or behind it does.
void fence();
void release(const void* count, bool fenced);
void acquire(const void* count, bool fenced);
// Accesses the compiler does not see.
void read(const void* at, size_t bytes);
void write(const void* at, size_t bytes);
// The memory goes to another block.
void forget(const void* at, size_t bytes);
// What was found first in this launch, or nothing: where both are in the library's code, which
// `addr2line -ifCe cuda_on_cpu.so` turns into lines.
std::string found();

bool set_watching(bool watching);  // what it was before

// The harness's own accesses, on a thread's behalf.
class Unwatched {
 public:
  ~Unwatched() { IF_WATCHED(set_watching(before_)); }

 private:
  [[maybe_unused]] const bool before_ = false IF_WATCHED(|| set_watching(false));
};

}  // namespace cuda_on_cpu::races
