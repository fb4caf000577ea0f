// Exponentials of queries and keys, made once per element, as every kernel of additive scores reads
// them: float32, aligned, contiguous, whatever the dtype and strides of the tensors were.
#pragma once
#include "device.cuh"

namespace seq2seq_fast {

constexpr int kRowsOfBlock = 16;  // rows that share a maximum
constexpr int kFeatures = 16;     // rows are padded to a multiple of this

// Blocks with a magnitude below this hold exp(2x) - 1 in place of exp(2x), so that a tanh near zero
// keeps its relative accuracy.
constexpr float kSmallMagnitude = 1.25f;
// Range of the pair form: with m = max|q| + max|k|, v exp(4 m) must stay finite.
constexpr float kLargestExponent = 84.f;

// Rows x (N, H) of each batch row: factor exp(2x) or factor (exp(2x) - 1), padded to Hp with the
// value of x = 0; then the largest magnitude of each block of rows.
struct Powers {
  float* data;  // (B, floats())
  int N, Hp;
  __host__ __device__ static int64_t floats(int64_t N, int64_t Hp) {
    return N * Hp + round_up(ceil_div(N, kRowsOfBlock), kFeatures);
  }
  __device__ __forceinline__ float* row(int b, int n) const {
    return data + b * floats(N, Hp) + static_cast<int64_t>(n) * Hp;
  }
  __device__ __forceinline__ float& max(int b, int block) const {
    return data[b * floats(N, Hp) + static_cast<int64_t>(N) * Hp + block];
  }
  __device__ __forceinline__ bool minus_one(int b, int n) const {
    return max(b, n / kRowsOfBlock) < kSmallMagnitude;
  }
  // of rows [n, n + count) and those that share blocks with them
  __device__ __forceinline__ float largest(int b, int n, int count) const {
    float m = 0.f;
    const int end = n + count < N ? n + count : N;
    for (int i = n / kRowsOfBlock; i * kRowsOfBlock < end; ++i) m = larger(m, max(b, i));
    return m;
  }
};

enum class Path { kSmall, kPairs, kExact };

__device__ __forceinline__ Path choose_path(float max_q, float max_k, float max_v) {
  if (!(4.f * (max_q + max_k) + logf(1.f + max_v) < kLargestExponent)) return Path::kExact;
  return max_q < kSmallMagnitude && max_k < kSmallMagnitude ? Path::kSmall : Path::kPairs;
}

}  // namespace seq2seq_fast
