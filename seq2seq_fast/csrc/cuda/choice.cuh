// The largest of logits, and what softmax needs of them, as threads find parts of both.
#pragma once
#include "device.cuh"

namespace seq2seq_fast {

__device__ __forceinline__ int shuffle(int x, int lanes) {
  return static_cast<int>(
      __float_as_uint(__shfl_xor_sync(kAll, __uint_as_float(static_cast<unsigned>(x)), lanes)));
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
  __device__ __forceinline__ void join(const Peak& other) {
    const float highest = fmaxf(top, other.top);
    const float a = sum == 0.f ? 0.f : sum * expf(top - highest);
    const float b = other.sum == 0.f ? 0.f : other.sum * expf(other.top - highest);
    top = highest, sum = a + b;
  }
};

}  // namespace seq2seq_fast
