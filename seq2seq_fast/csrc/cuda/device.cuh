// What device code needs of the machine beyond CUDA C++: approximate instructions, asynchronous
// copies, dtypes. tests/cuda_on_cpu has the same for the host compiler, so that every kernel here
// also runs without a GPU.
#pragma once
#include <cstdint>

namespace seq2seq_fast {

// Blocks of a launch.
struct Grid {
  int64_t x, y = 1, z = 1;
  Grid(int64_t x_) : x(x_) {}
  Grid(int64_t x_, int64_t y_, int64_t z_) : x(x_), y(y_), z(z_) {}
};

}  // namespace seq2seq_fast

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "cuda_on_cpu.h"
#endif

namespace seq2seq_fast {

// Whether a count has come to `target`. Counts go on from 0 behind 2^32 - 1, and those compared are
// fewer than 2^31 apart.
__device__ __forceinline__ bool reached(unsigned seen, unsigned target) {
  return static_cast<int>(seen - target) >= 0;
}

#ifdef __CUDACC__

using Half = __half;
using BFloat16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(BFloat16 x) { return __bfloat162float(x); }
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else
    return T(x);
}

// 1 / x with an error of one unit in the last place; x and 1 / x must be normal numbers.
__device__ __forceinline__ float reciprocal(float x) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
// 2^x with an error of two units in the last place, 0 in place of subnormal numbers.
__device__ __forceinline__ float exp2_approximate(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

// Two numbers rounded to bfloat16, the first in the lower half.
__device__ __forceinline__ uint32_t bfloat16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
// d += a b by a warp's lanes together, of bfloat16 a (16, 16) and b (16, 8). With g = lane / 4 and
// t = lane % 4, a lane has of a, rows g and g + 8, the columns 2t and 2t + 1 and then eight behind
// them; of b, column g, the same rows; and of d, rows g and g + 8, the columns 2t and 2t + 1.
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Copies 16 aligned bytes from global to shared memory; they are there when the thread that asked
// has waited for all groups but the last `pending` it has closed.
__device__ __forceinline__ void copy_async(float* shared, const float* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;"); }
template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// A count that blocks which run at the same time meet by. What a thread has written, or has seen
// written before a barrier of its block, is there for those behind its announcement, and those
// behind a barrier after them.
__device__ __forceinline__ void announce(unsigned* count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}
__device__ __forceinline__ void await(const unsigned* count, unsigned target) {
  unsigned seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(count) : "memory");
  } while (!reached(seen, target));
}

// Stores what other threads may store at the same place and time, all of them the same.
__device__ __forceinline__ void store_alike(float* global, float x) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(global), "f"(x) : "memory");
}

// Brings the line of global memory to the second-level cache.
__device__ __forceinline__ void ask_for_line(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

__device__ __forceinline__ float* shared_memory() {
  extern __shared__ float4 memory[];
  return reinterpret_cast<float*>(memory);
}

#endif

constexpr int kWarp = 32;
constexpr uint32_t kAll = 0xffffffffu;  // lanes

enum class Type : int { kFloat, kHalf, kBFloat16 };

__device__ __forceinline__ float load(const void* data, Type type, int64_t at) {
  if (type == Type::kFloat) return static_cast<const float*>(data)[at];
  if (type == Type::kHalf) return to_float(static_cast<const Half*>(data)[at]);
  return to_float(static_cast<const BFloat16*>(data)[at]);
}
__device__ __forceinline__ void store(void* data, Type type, int64_t at, float x) {
  if (type == Type::kFloat)
    static_cast<float*>(data)[at] = x;
  else if (type == Type::kHalf)
    static_cast<Half*>(data)[at] = from_float<Half>(x);
  else
    static_cast<BFloat16*>(data)[at] = from_float<BFloat16>(x);
}

// A (B, N, W) tensor of any dtype and strides.
struct View {
  const void* data;
  Type type;
  int64_t stride[3];
  __device__ __forceinline__ float operator()(int64_t b, int64_t n, int64_t w) const {
    return load(data, type, b * stride[0] + n * stride[1] + w * stride[2]);
  }
};

// Rows (B, width) of float32, ld apart; data null: absent.
struct FloatRows {
  float* data;
  int64_t ld;
  __device__ __forceinline__ float& operator()(int b, int h) const { return data[b * ld + h]; }
  // zero where absent
  __device__ __forceinline__ float get(int b, int h) const {
    return data == nullptr ? 0.f : data[b * ld + h];
  }
};

// Those at place i of a contiguous (.., B, width).
__device__ __forceinline__ FloatRows rows_at(float* of, int64_t i, int B, int width) {
  return {of + i * B * width, width};
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAll, x, lanes);
  return x;
}
// Sums of four numbers over the lanes: lane l gets that of x[l / 8].
__device__ __forceinline__ float warp_sum_of_four(const float (&x)[4]) {
  const int lane = threadIdx.x % kWarp;
  const bool high = lane & 16, odd = lane & 8;
  float a = high ? x[2] : x[0], b = high ? x[3] : x[1];
  a += __shfl_xor_sync(kAll, high ? x[0] : x[2], 16);
  b += __shfl_xor_sync(kAll, high ? x[1] : x[3], 16);
  float sum = (odd ? b : a) + __shfl_xor_sync(kAll, odd ? a : b, 8);
  for (int lanes = 4; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAll, sum, lanes);
  return sum;
}
__device__ __forceinline__ float warp_max(float x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, lanes));
  return x;
}

// Magnitudes order as their bits do, with NaN above infinity.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }
__device__ __forceinline__ float larger(float x, float y) {
  return magnitude(x) > magnitude(y) ? __uint_as_float(magnitude(x))
                                     : __uint_as_float(magnitude(y));
}

__host__ __device__ constexpr int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}
__host__ __device__ constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

}  // namespace seq2seq_fast
