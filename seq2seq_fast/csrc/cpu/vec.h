// Eight float32 lanes in GCC/Clang vector extensions, and the functions that the loops need on
// them.
#pragma once
#include <cstdint>
#include <cstring>

// AVX-512, AVX2 or plain code, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(S2S_NO_CLONES)
#define S2S_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define S2S_CLONES
#endif
// Inlined everywhere, so that no vector ever crosses a call in the wrong instruction set.
#define S2S_INLINE inline __attribute__((always_inline))
#define S2S_LAMBDA __attribute__((always_inline))
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace seq2seq_fast {

typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t VecInt __attribute__((vector_size(32)));
constexpr int64_t kVec = 8;

S2S_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
S2S_INLINE void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }

S2S_INLINE float sum(Vec x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// out[j][i] = in[i][j]
S2S_INLINE void transpose(const Vec in[8], Vec out[8]) {
  Vec pairs[8], quads[8];
  for (int i = 0; i < 4; ++i) {
    const Vec a = in[2 * i], b = in[2 * i + 1];
    pairs[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[2 * i + 1] = __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      const Vec a = pairs[i + j], b = pairs[i + j + 2];
      quads[i + 2 * j] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
      quads[i + 2 * j + 1] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int j = 0; j < 4; ++j) {
    out[j] = __builtin_shufflevector(quads[j], quads[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    out[j + 4] = __builtin_shufflevector(quads[j], quads[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Eight sums in double.
struct DoubleSum {
  typedef double Half __attribute__((vector_size(32)));
  Half low = {}, high = {};
  S2S_INLINE void add(Vec x) {
    low += __builtin_convertvector(__builtin_shufflevector(x, x, 0, 1, 2, 3), Half);
    high += __builtin_convertvector(__builtin_shufflevector(x, x, 4, 5, 6, 7), Half);
  }
  S2S_INLINE Vec rounded() const {
    typedef float Quarter __attribute__((vector_size(16)));
    const Quarter a = __builtin_convertvector(low, Quarter);
    const Quarter b = __builtin_convertvector(high, Quarter);
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
  }
};

// 2^k for whole k in [-126, 127]
S2S_INLINE Vec power_of_two(Vec k) {
  const VecInt bits = (__builtin_convertvector(k, VecInt) + 127) << 23;
  Vec out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// exp(x) = 2^k (1 + p), |x| < 2^21
struct Exponential {
  Vec k, p;
};
S2S_INLINE Exponential exponential(Vec x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Vec k = (x * 1.44269504f + kRound) - kRound;
  const Vec f = (x - k * 0.693359375f) + k * 2.12194440e-4f;  // ln 2 in two parts
  Vec p = f * (1.f / 5040.f) + 1.f / 720.f;
  p = p * f + 1.f / 120.f;
  p = p * f + 1.f / 24.f;
  p = p * f + 1.f / 6.f;
  p = p * f + 0.5f;
  return {k, p * f * f + f};
}

// exp(x) for |x| < 87
S2S_INLINE Vec exp_moderate(Vec x) {
  const Exponential e = exponential(x);
  const Vec scale = power_of_two(e.k);
  return scale * e.p + scale;
}

// exp(x) - 1 for |x| < 87, without cancellation
S2S_INLINE Vec expm1_moderate(Vec x) {
  const Exponential e = exponential(x);
  const Vec scale = power_of_two(e.k);
  return scale * e.p + (scale - 1.f);
}

// exp(x) for x <= 0, with subnormal results, 0 for -inf, NaN for NaN
S2S_INLINE Vec exp_negative(Vec x) {
  const Vec floored = x < -110.f ? -110.f + Vec{} : x;
  const Exponential e = exponential(floored);
  const Vec half = __builtin_convertvector(__builtin_convertvector(e.k, VecInt) >> 1, Vec);
  const Vec y = (e.p + 1.f) * power_of_two(half) * power_of_two(e.k - half);
  return x == x ? y : x;
}

// tanh to about one unit in the last place; coefficients of the small part from Cephes' tanhf
S2S_INLINE Vec tanh(Vec x) {
  const Vec magnitude = x < 0.f ? -x : x;
  const Vec m = magnitude < 10.f ? magnitude : 10.f + Vec{};  // tanh(10) rounds to 1
  const Vec large = 1.f - 2.f / (exp_moderate(2.f * m) + 1.f);
  const Vec z = x * x;
  Vec p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec y = m < 0.625f ? p * z * x + x : (x < 0.f ? -large : large);
  return x == x ? y : x;
}

}  // namespace seq2seq_fast
