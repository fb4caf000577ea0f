// kVec float32 lanes in GCC/Clang vector extensions, and the functions that the loops need on
// them. Included once per instruction set, behind isa.h, which sets S2S_LANES.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

// Inlined everywhere, so that no vector ever crosses a call in the wrong instruction set.
#define S2S_INLINE inline __attribute__((always_inline))
#define S2S_LAMBDA __attribute__((always_inline))
#pragma GCC diagnostic ignored "-Wpsabi"
// Vec as an argument of a template loses its alignment and aliasing, which only memory needs.
#pragma GCC diagnostic ignored "-Wignored-attributes"

namespace seq2seq_fast {
namespace {

constexpr int64_t kVec = S2S_LANES;
typedef float Vec __attribute__((vector_size(4 * S2S_LANES), aligned(4), may_alias));
typedef int32_t VecInt __attribute__((vector_size(4 * S2S_LANES)));

S2S_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
S2S_INLINE void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
// The first n lanes, if there are so few; the others are `rest`, and are not stored.
S2S_INLINE Vec load_some(const float* p, int64_t n, float rest = 0.f) {
  if (n >= kVec) return load(p);
  Vec x = rest + Vec{};
  std::memcpy(&x, p, sizeof(float) * n);
  return x;
}
S2S_INLINE void store_some(float* p, Vec x, int64_t n) {
  if (n >= kVec) return store(p, x);
  std::memcpy(p, &x, sizeof(float) * n);
}

// Lane i of the result is the sum of the lanes of in[i]. Overwrites `in`.
S2S_INLINE Vec sums(Vec in[kVec]) {
#if S2S_LANES == 16
  // Each step adds up halves of two vectors, so that one vector holds what two did: lane groups of
  // eight, of four, of two, of one.
  for (int i = 0; i < 8; ++i)
    in[i] = __builtin_shufflevector(in[i], in[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20,
                                    21, 22, 23) +
            __builtin_shufflevector(in[i], in[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27,
                                    28, 29, 30, 31);
  for (int i = 0; i < 4; ++i)
    in[i] = __builtin_shufflevector(in[i], in[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24,
                                    25, 26, 27) +
            __builtin_shufflevector(in[i], in[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15,
                                    28, 29, 30, 31);
  for (int i = 0; i < 2; ++i)
    in[i] = __builtin_shufflevector(in[i], in[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12,
                                    13, 28, 29) +
            __builtin_shufflevector(in[i], in[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27,
                                    14, 15, 30, 31);
  return __builtin_shufflevector(in[0], in[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28,
                                 14, 30) +
         __builtin_shufflevector(in[0], in[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29,
                                 15, 31);
#else
  for (int i = 0; i < 4; ++i)
    in[i] = __builtin_shufflevector(in[i], in[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
            __builtin_shufflevector(in[i], in[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  for (int i = 0; i < 2; ++i)
    in[i] = __builtin_shufflevector(in[i], in[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
            __builtin_shufflevector(in[i], in[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(in[0], in[1], 0, 8, 2, 10, 4, 12, 6, 14) +
         __builtin_shufflevector(in[0], in[1], 1, 9, 3, 11, 5, 13, 7, 15);
#endif
}

S2S_INLINE float sum(Vec x) {
  float lanes[kVec];
  std::memcpy(lanes, &x, sizeof x);
  for (int n = kVec / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
}

S2S_INLINE float largest_lane(Vec x) {
  float lanes[kVec];
  std::memcpy(lanes, &x, sizeof x);
  for (int n = kVec / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
  return lanes[0];
}

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

S2S_INLINE Vec sigmoid(Vec x) {
  const Vec low = x < -87.f ? -87.f + Vec{} : x;
  const Vec y = 1.f / (1.f + exp_moderate(-(low < 87.f ? low : 87.f + Vec{})));
  return x == x ? y : x;
}

}  // namespace
}  // namespace seq2seq_fast
