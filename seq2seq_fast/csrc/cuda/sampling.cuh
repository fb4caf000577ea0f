// Draws of tokens as seq2seq_fast/decoding/sampling.py has them: logits are cut to the top_k and to
// the share top_p, and the largest of what is left, perturbed by Gumbel's noise, is the token.
//
// A block of threads has a row of logits in global memory, of which thread i looks at the i-th and
// every kThreads-th behind it.
#pragma once
#include "choice.cuh"

namespace seq2seq_fast {

struct Draw {
  const int64_t* seed;  // null where nothing is drawn
  float scale;          // of logits: 1 / temperature
  int top_k;            // 0: of all
  double top_p;
};

// Word `which` of four that Philox4x32-10 makes of a key and a counter.
__device__ __forceinline__ uint32_t philox(uint64_t key, uint32_t a, uint32_t c, uint32_t d,
                                           int which) {
  uint32_t b = 0, k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t low = uint64_t{0xD2511F53u} * a, high = uint64_t{0xCD9E8D57u} * c;
    a = static_cast<uint32_t>(high >> 32) ^ b ^ k0;
    b = static_cast<uint32_t>(high);
    c = static_cast<uint32_t>(low >> 32) ^ d ^ k1;
    d = static_cast<uint32_t>(low);
  }
  return which == 0 ? a : which == 1 ? b : which == 2 ? c : d;
}

// -log(-log u), u uniform between 0 and 1 and each token's own: 64 counters make 256 of them.
__device__ __forceinline__ float gumbel(int64_t seed, int row, int step, int token) {
  const int block = token / 256, at = token % 256;
  const uint32_t word =
      philox(static_cast<uint64_t>(seed), block * 64 + at % 64, row, step, at / 64);
  const float v = static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
  return -logf(-log1pf(-fminf(v, 1 - 0x1p-24f)));  // 1 - u, which must not round to 1
}

// Whole numbers in the order of floats.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

template <int kWarps>
class Cut {
 public:
  __device__ __forceinline__ Cut(float* x, int V, float* scratch)
      : x_(x), V_(V), scratch_(scratch) {}

  // Keeps the k largest, and those as large as the last of them.
  __device__ __forceinline__ void keep_largest(int k) {
    const uint32_t kth = largest(
        [&](uint32_t key) { return sum([&](float x) { return ordered(x) >= key ? 1 : 0; }) >= k; });
    drop([&](float x, int) { return ordered(x) < kth; });
  }

  // Keeps the largest, of equals the first, as long as what comes before has less than a share of
  // the sum of exp(scale x).
  __device__ __forceinline__ void keep_share(double share, float scale) {
    float top = -INFINITY;
    for (int i = threadIdx.x; i < V_; i += kThreads) top = fmaxf(top, x_[i]);
    top = join_block<kWarps>(top, scratch_, [](float a, float b) { return fmaxf(a, b); });
    if (top == -INFINITY || top == INFINITY) return;
    const auto e = [&](float x) { return static_cast<double>(expf(scale * (x - top))); };
    const double wanted = share * sum(e);
    const uint32_t last = largest([&](uint32_t key) {
      return sum([&](float x) { return ordered(x) >= key ? e(x) : 0.; }) >= wanted;
    });
    const double before = sum([&](float x) { return ordered(x) > last ? e(x) : 0.; });
    const double equals = sum([&](float x) { return ordered(x) == last ? 1. : 0.; });
    const double each = sum([&](float x) { return ordered(x) == last ? e(x) : 0.; }) / equals;
    int end = V_;  // behind the last of the equals that are kept
    if (equals > 1 && each > 0) {
      double kept = ceil((wanted - before) / each);
      kept = kept < 1 ? 1 : kept;
      if (kept < equals)
        for (int i = 0; i < end; ++i)
          if (ordered(x_[i]) == last && --kept == 0) end = i + 1;
      __syncthreads();  // all have read what is dropped next
    }
    drop([&](float x, int i) { return ordered(x) < last || (ordered(x) == last && i >= end); });
  }

 private:
  static constexpr int kThreads = kWarp * kWarps;

  // In whole numbers where f makes them, in double where it makes those.
  template <typename F>
  __device__ __forceinline__ auto sum(F f) {
    using T = decltype(f(0.f));
    T mine = 0;
    for (int i = threadIdx.x; i < V_; i += kThreads) mine += f(x_[i]);
    return join_block<kWarps>(mine, scratch_, [](T a, T b) { return a + b; });
  }
  // The largest number that `reached` is true of, which is true of all below it; 0 if of none.
  template <typename F>
  __device__ __forceinline__ uint32_t largest(F reached) {
    uint32_t found = 0;
    for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1)
      if (reached(found | bit)) found |= bit;
    return found;
  }
  template <typename F>
  __device__ __forceinline__ void drop(F f) {
    for (int i = threadIdx.x; i < V_; i += kThreads)
      if (f(x_[i], i)) x_[i] = -INFINITY;
  }

  float* const x_;
  const int V_;
  float* const scratch_;
};

}  // namespace seq2seq_fast
