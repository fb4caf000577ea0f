// The largest of logits, and what softmax needs of them, as threads find parts of both.
#pragma once
#include "device.cuh"

namespace seq2seq_fast {

// What the lane has that is so many lanes away, of any type made of one word or two. (Not an array
// of words, which ptxas keeps on the stack.)
template <typename T>
__device__ __forceinline__ T shuffle(T x, int lanes) {
  struct Words {
    float first, second;
  };
  union {
    T whole;
    Words words;
  } bits;
  static_assert(sizeof(T) == 4 || sizeof(T) == sizeof(Words));
  bits.whole = x;
  bits.words.first = __shfl_xor_sync(kAll, bits.words.first, lanes);
  if constexpr (sizeof(T) == sizeof(Words))
    bits.words.second = __shfl_xor_sync(kAll, bits.words.second, lanes);
  return bits.whole;
}

// All threads' numbers joined, the same in each; scratch has room for one of each warp.
template <int kWarps, typename T, typename Join>
__device__ __forceinline__ T join_block(T mine, float* scratch, Join join) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) mine = join(mine, shuffle(mine, lanes));
  T* const of_warps = reinterpret_cast<T*>(scratch);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  T all = of_warps[0];
  for (int w = 1; w < kWarps; ++w) all = join(all, of_warps[w]);
  return all;
}

// A place among values; NaN comes before all, as torch.argmax has it, and of equals the first.
struct Best {
  float value;
  int at;
  __device__ __forceinline__ bool before(const Best& other) const {
    const bool nan = value != value, other_nan = other.value != other.value;
    if (nan != other_nan) return nan;
    return nan || value == other.value ? at < other.at : value > other.value;
  }
};

// Largest of some numbers x, and the sum of exp(x - top); any NaN makes the sum NaN.
struct Peak {
  float top, sum;
  __device__ __forceinline__ void add(float x) {
    if (x > top) {
      sum = sum * expf(top - x) + 1.f;
      top = x;
    } else if (x != -INFINITY) {
      sum += expf(x - top);
    }
  }
  // As many at once, whose exponentials do not wait for each other.
  template <int N>
  __device__ __forceinline__ void add(const float (&x)[N]) {
    float highest = top;
#pragma unroll
    for (int i = 0; i < N; ++i) highest = fmaxf(highest, x[i]);
    if (sum != 0.f) sum *= expf(top - highest);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (x[i] != -INFINITY) sum += expf(x[i] - highest);
    top = highest;
  }
  __device__ __forceinline__ void join(const Peak& other) {
    const float highest = fmaxf(top, other.top);
    const float a = sum == 0.f ? 0.f : sum * expf(top - highest);
    const float b = other.sum == 0.f ? 0.f : other.sum * expf(other.top - highest);
    top = highest, sum = a + b;
  }
};

}  // namespace seq2seq_fast
