// CUDA for the host compiler: what csrc/cuda needs of it, run by one thread of the CPU.
//
// Each thread of a block is a fiber that runs until it has to wait, at a barrier or for its warp.
// Which fiber runs next, and which block, is drawn anew for every launch, so that a result that
// depends on the order differs from run to run. Blocks run one after another, or, where they wait
// for each other, all at once. Shared memory is NaN when a block begins, and so is the place an
// asynchronous copy goes to until it is waited for. A block whose threads wait for what never
// comes, or that writes past its shared memory, is an error.
#pragma once
#include <setjmp.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "races.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)

#define S2S_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast_cuda_on_cpu, CPU, m)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct alignas(8) uint2 {
  unsigned x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace seq2seq_fast {
inline bool reached(unsigned seen, unsigned target);  // device.cuh
}

namespace cuda_on_cpu {
using seq2seq_fast::reached;

enum class Wait { kNothing, kBarrier, kWarp, kCount, kEnd };
enum class Exchange { kNothing, kShuffleXor, kAny, kMultiply };

struct Copy {
  float* to;
  const float* from;
};

struct Fiber {
  dim3 thread;
  int block, number;  // of the launch's, and of the block's threads
  Wait wait;
  Exchange exchange;
  uint32_t value, argument, result;
  uint32_t a[4], b[2];  // of a product by the warp, and what it adds
  float d[4];
  const unsigned* count;                  // waited for until it is `argument`
  std::vector<std::vector<Copy>> copies;  // groups that are closed, and an open one
  jmp_buf state;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
};

constexpr size_t kStack = 128 << 10;
constexpr int kWarpSize = 32;

inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline std::function<void()> kernel;
inline dim3 block_size, grid_size;
inline std::mt19937 draw(0);
inline int multiprocessors = 16;
inline int64_t launches_together = 0;
// So many of them more have room beside what else runs, which is told before or is not.
inline int64_t launches_left = std::numeric_limits<int64_t>::max();
inline bool told = true;
inline char asked;
inline bool misaligned = false;  // whether something was read so; told when the launch ends

inline void wait(Wait reason) {
  IF_WATCHED(races::leave());
  current->wait = reason;
  if (_setjmp(current->state) == 0) _longjmp(scheduler, 1);
}

inline void run_fiber() {
  kernel();
  IF_WATCHED(races::leave());
  current->wait = Wait::kEnd;
  _longjmp(scheduler, 1);
}

// Runs a fiber until it waits, from its beginning or where it waited.
inline void resume(Fiber& fiber, bool begin) {
  current = &fiber;
  fiber.wait = Wait::kNothing;
  if (begin) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  if (_setjmp(scheduler) != 0) return;
  IF_WATCHED(races::enter(fiber.block, fiber.number, fiber.stack.get(), kStack));
  if (begin)
    setcontext(&fiber.context);
  else
    _longjmp(fiber.state, 1);
}

class Block {
 public:
  dim3 index;
  std::vector<float> shared;

  void begin(unsigned block, int threads, size_t shared_floats) {
    constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();
    number_ = static_cast<int>(block);
    index = dim3(block % grid_size.x, block / grid_size.x % grid_size.y,
                 block / grid_size.x / grid_size.y);
    shared_floats_ = shared_floats;
    shared.assign(shared_floats + kGuard, kPoison);
    IF_WATCHED(races::forget(shared.data(), shared.size() * sizeof(float)));
    while (fibers_.size() < static_cast<size_t>(threads)) {
      fibers_.push_back(std::make_unique<Fiber>());
      fibers_.back()->stack = std::make_unique_for_overwrite<char[]>(kStack);
    }
    order_.resize(threads);
    std::iota(order_.begin(), order_.end(), 0);
    for (int i = 0; i < threads; ++i) {
      fibers_[i]->block = number_, fibers_[i]->number = i;
      fibers_[i]->copies.assign(1, {});
      fibers_[i]->wait = Wait::kNothing;
      fibers_[i]->thread =
          dim3(i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y);
    }
    begun_ = false;
  }

  // Runs all threads that can until they wait again; false if there is none.
  bool run();
  bool ended() const { return waiting(Wait::kEnd) == order_.size(); }
  void end() const {
    for (size_t i = 0; i < kGuard; ++i)
      STD_TORCH_CHECK(std::isnan(shared[shared_floats_ + i]), "a write past the shared memory");
  }

 private:
  static constexpr size_t kGuard = 64;

  size_t waiting(Wait reason) const {
    return std::count_if(order_.begin(), order_.end(),
                         [&](int i) { return fibers_[i]->wait == reason; });
  }

  // Hands a warp what its lanes exchange, if all of them have come for it.
  bool serve_warp(int first) {
    for (int i = first; i < first + kWarpSize; ++i)
      if (fibers_[i]->wait != Wait::kWarp || fibers_[i]->exchange != fibers_[first]->exchange)
        return false;
    if (fibers_[first]->exchange == Exchange::kMultiply) multiply(first);
    IF_WATCHED(if (fibers_[first]->exchange == Exchange::kNothing)
                   races::warp_barrier(number_, first / kWarpSize));
    bool any = false;
    for (int i = first; i < first + kWarpSize; ++i) any = any || fibers_[i]->value != 0;
    for (int i = 0; i < kWarpSize; ++i) {
      Fiber& fiber = *fibers_[first + i];
      fiber.wait = Wait::kNothing;
      fiber.result = fiber.exchange == Exchange::kAny
                         ? any
                         : fibers_[first + (i ^ static_cast<int>(fiber.argument))]->value;
    }
    return true;
  }

  // The product of the fragments that a warp's lanes hold, as device.cuh has them.
  void multiply(int first) {
    const auto half = [](uint32_t pair, int upper) {
      const uint32_t bits = upper ? pair & 0xffff0000u : pair << 16;
      float x;
      std::memcpy(&x, &bits, sizeof x);
      return static_cast<double>(x);
    };
    const auto a = [&](int row, int k) {
      const Fiber& lane = *fibers_[first + row % 8 * 4 + k % 8 / 2];
      return half(lane.a[row / 8 + k / 8 * 2], k % 2);
    };
    const auto b = [&](int k, int column) {
      return half(fibers_[first + column * 4 + k % 8 / 2]->b[k / 8], k % 2);
    };
    for (int lane = 0; lane < kWarpSize; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = 0;
        for (int k = 0; k < 16; ++k) sum += a(row, k) * b(k, column);
        fibers_[first + lane]->d[i] = static_cast<float>(sum);
      }
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;  // kept for the next launch
  std::vector<int> order_;
  size_t shared_floats_ = 0;
  int number_ = 0;
  bool begun_ = false;
};

inline std::vector<std::unique_ptr<Block>> blocks;  // of a launch; kept for the next
inline Block* block = nullptr;

inline bool Block::run() {
  block = this;
  bool ran = false;
  std::shuffle(order_.begin(), order_.end(), draw);
  for (int i : order_) {
    Fiber& fiber = *fibers_[i];
    if (fiber.wait != Wait::kNothing &&
        (fiber.wait != Wait::kCount || !reached(*fiber.count, fiber.argument)))
      continue;
    resume(fiber, !begun_);
    ran = true;
  }
  begun_ = true;
  bool served = false;
  for (size_t i = 0; i < order_.size(); i += kWarpSize) served |= serve_warp(static_cast<int>(i));
  if (served || ended()) return true;
  if (waiting(Wait::kBarrier) < order_.size()) {
    STD_TORCH_CHECK(ran || waiting(Wait::kCount) > 0, "threads wait for others that never come");
    return ran;
  }
  uint32_t any = 0;
  IF_WATCHED(races::barrier(number_));
  for (int i : order_) any |= fibers_[i]->value;
  for (int i : order_) fibers_[i]->wait = Wait::kNothing, fibers_[i]->result = any;
  return true;
}

// `together`: blocks may wait for each other.
inline void run(dim3 grid, dim3 size, size_t shared_floats, bool together = false) {
  misaligned = false;
  const int threads = static_cast<int>(size.x * size.y * size.z);
  IF_WATCHED(races::launch(size_t{grid.x} * grid.y * grid.z, threads));
  STD_TORCH_CHECK(threads % kWarpSize == 0 && threads <= 1024, "a block of ", threads, " threads");
  block_size = size;
  grid_size = grid;
  std::vector<unsigned> order(size_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), draw);
  const size_t at_once = together ? order.size() : 1;
  while (blocks.size() < at_once) blocks.push_back(std::make_unique<Block>());
  for (size_t first = 0; first < order.size(); first += at_once) {
    std::vector<Block*> running;
    for (size_t i = 0; i < at_once; ++i) {
      blocks[i]->begin(order[first + i], threads, shared_floats);
      running.push_back(blocks[i].get());
    }
    while (!running.empty()) {
      std::shuffle(running.begin(), running.end(), draw);
      bool ran = false;
      for (Block* one : running)  // some of them as far as they get
        for (int i = draw() % 2 ? 1 : 1000; i > 0 && !one->ended() && one->run(); --i) ran = true;
      STD_TORCH_CHECK(ran, "blocks wait for others that never come");
      std::erase_if(running, [](Block* one) {
        if (one->ended()) one->end();
        return one->ended();
      });
    }
  }
  STD_TORCH_CHECK(!misaligned, "a misaligned read");
  IF_WATCHED(const std::string race = races::found(); STD_TORCH_CHECK(race.empty(), race));
}

inline uint32_t exchange(Exchange kind, uint32_t value, uint32_t argument) {
  const races::Unwatched own;
  current->exchange = kind, current->value = value, current->argument = argument;
  wait(Wait::kWarp);
  return current->result;
}

// What atomic operations are here, where no thread comes in between: x becomes f(x).
template <typename F>
unsigned atomically(unsigned* x, F f) {
  const races::Unwatched own;
  IF_WATCHED(races::release(x, true), races::acquire(x, true));
  const unsigned old = *x;
  *x = f(old);
  return old;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::current->thread)
#define blockIdx (cuda_on_cpu::block->index)
#define blockDim (cuda_on_cpu::block_size)
#define gridDim (cuda_on_cpu::grid_size)

using std::max;
using std::min;
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline int __syncthreads_or(int x) {
  using namespace cuda_on_cpu;
  const races::Unwatched own;
  current->value = x != 0;
  wait(Wait::kBarrier);
  return static_cast<int>(current->result);
}
inline void __syncthreads() { __syncthreads_or(0); }
inline void __syncwarp() { cuda_on_cpu::exchange(cuda_on_cpu::Exchange::kNothing, 0, 0); }
inline void __threadfence() { IF_WATCHED(cuda_on_cpu::races::fence()); }
inline float __shfl_xor_sync(uint32_t, float x, int lanes) {
  using namespace cuda_on_cpu;
  return __uint_as_float(
      exchange(Exchange::kShuffleXor, __float_as_uint(x), static_cast<uint32_t>(lanes)));
}
inline int __any_sync(uint32_t, int x) {
  return static_cast<int>(cuda_on_cpu::exchange(cuda_on_cpu::Exchange::kAny, x != 0, 0));
}
inline unsigned atomicAdd(unsigned* x, unsigned y) {
  return cuda_on_cpu::atomically(x, [&](unsigned old) { return old + y; });
}
// One more, or 0 behind `most`.
inline unsigned atomicInc(unsigned* x, unsigned most) {
  return cuda_on_cpu::atomically(x, [&](unsigned old) { return old >= most ? 0 : old + 1; });
}
template <typename T>
T __ldcg(const T* x) {
  using namespace cuda_on_cpu;
  const races::Unwatched own;
  IF_WATCHED(races::read(x, sizeof *x));
  misaligned |= reinterpret_cast<uintptr_t>(x) % sizeof(T) != 0;
  T y;
  std::memcpy(&y, x, sizeof y);
  return y;
}

namespace seq2seq_fast {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;
template <typename T>
float to_float(T x) {
  return static_cast<float>(x);
}
template <typename T>
T from_float(float x) {
  return static_cast<T>(x);
}

// Off by up to `most` units in the last place, as the instructions may be: by how many, x tells.
inline float blur(float x, float y, int most) {
  if (!std::isfinite(y) || y == 0.f) return y;
  const int units = static_cast<int>((__float_as_uint(x) * 2654435761u >> 16) % (2 * most + 1));
  return __uint_as_float(__float_as_uint(y) + static_cast<uint32_t>(units - most));
}
inline float reciprocal(float x) { return blur(x, 1.f / x, 1); }
inline float exp2_approximate(float x) { return blur(x, std::exp2(x), 2); }

inline uint32_t bfloat16_pair(float low, float high) {
  const auto bits = [](float x) -> uint32_t { return BFloat16(x).x; };
  return bits(low) | bits(high) << 16;
}
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using namespace cuda_on_cpu;
  const races::Unwatched own;
  std::copy_n(a, 4, current->a), std::copy_n(b, 2, current->b);
  exchange(Exchange::kMultiply, 0, 0);
  for (int i = 0; i < 4; ++i) d[i] += current->d[i];
}

inline void copy_async(float* shared, const float* global) {
  using namespace cuda_on_cpu;
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(global) % 16 == 0, "a misaligned copy");
  const races::Unwatched own;
  IF_WATCHED(races::read(global, 16), races::write(shared, 16));
  std::fill_n(shared, 4, std::numeric_limits<float>::quiet_NaN());
  current->copies.back().push_back({shared, global});
}
inline void close_copies() {
  const cuda_on_cpu::races::Unwatched own;
  cuda_on_cpu::current->copies.emplace_back();
}
template <int pending>
void wait_copies() {
  using namespace cuda_on_cpu;
  const races::Unwatched own;
  auto& groups = current->copies;
  for (size_t i = 0; i + pending + 1 < groups.size(); ++i) {
    for (const auto& copy : groups[i]) {
      IF_WATCHED(races::read(copy.from, 16), races::write(copy.to, 16));
      std::copy_n(copy.from, 4, copy.to);
    }
    groups[i].clear();
  }
}
inline void announce(unsigned* count) {
  IF_WATCHED(cuda_on_cpu::races::release(count, false));
  const cuda_on_cpu::races::Unwatched own;
  ++*count;
}
inline void await(const unsigned* count, unsigned target) {
  using namespace cuda_on_cpu;
  {
    const races::Unwatched own;
    if (!reached(*count, target)) {
      current->count = count, current->argument = target;
      wait(Wait::kCount);
    }
  }
  IF_WATCHED(races::acquire(count, false));
}
inline void store_alike(float* global, float x) {
  const cuda_on_cpu::races::Unwatched own;
  *global = x;
}
inline void ask_for_line(const void* at) {
  const cuda_on_cpu::races::Unwatched own;
  cuda_on_cpu::asked = *static_cast<const volatile char*>(at);  // faults where nothing is
}
inline float* shared_memory() { return cuda_on_cpu::block->shared.data(); }

class Device {
 public:
  explicit Device(const torch::stable::Tensor&) {}
  template <typename... P>
  void launch(void (*kernel)(P...), Grid grid, dim3 threads, int64_t shared_floats,
              std::type_identity_t<P>... arguments) const {
    cuda_on_cpu::kernel = [&] { kernel(arguments...); };
    cuda_on_cpu::run(dim3(grid.x, grid.y, grid.z), threads, static_cast<size_t>(shared_floats));
  }
  template <typename... P>
  bool fits_together(void (*)(P...), int64_t, dim3, int64_t) const {
    return cuda_on_cpu::launches_left > 0 || !cuda_on_cpu::told;
  }
  template <typename... P>
  bool launch_together(void (*kernel)(P...), int64_t blocks, dim3 threads, int64_t shared_floats,
                       std::type_identity_t<P>... arguments) const {
    STD_TORCH_CHECK(blocks <= multiprocessors && shared_floats <= shared_floats_of_block,
                    "more than can run at once");
    if (cuda_on_cpu::launches_left == 0) return false;
    --cuda_on_cpu::launches_left;
    cuda_on_cpu::kernel = [&] { kernel(arguments...); };
    ++cuda_on_cpu::launches_together;
    cuda_on_cpu::run(dim3(blocks), threads, static_cast<size_t>(shared_floats), true);
    return true;
  }
  void zero(void* data, int64_t bytes) const { std::memset(data, 0, static_cast<size_t>(bytes)); }

  int multiprocessors = cuda_on_cpu::multiprocessors;
  int shared_floats_of_block = 227 << 8;  // what an H100 lends
};

}  // namespace seq2seq_fast
