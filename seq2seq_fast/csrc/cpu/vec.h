// kVec float32 lanes in GCC/Clang vector extensions, and the functions that the loops need on
// them. Included once per instruction set, by a loops_*.cpp, which sets S2S_LANES.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(S2S_INTRINSICS)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Inlined everywhere, so that no vector ever crosses a call in the wrong instruction set.
#define S2S_INLINE inline __attribute__((always_inline))
#define S2S_LAMBDA __attribute__((always_inline))
#pragma GCC diagnostic ignored "-Wpsabi"
// Vec as an argument of a template loses its alignment and aliasing, which only memory needs.
#pragma GCC diagnostic ignored "-Wignored-attributes"

namespace seq2seq_fast {
namespace {

constexpr int64_t kVec = S2S_LANES;
#if S2S_LANES == 16 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
// Rows by a block of columns whose sums stay in registers.
constexpr int kRowsByBlock = kVec == 4 && kRegisters == 16 ? 2 : 6;
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

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

#if S2S_LANES == 16
// Four columns of sixteen rows; row(i) is a Four of the i-th.
template <typename F>
S2S_INLINE void four_columns(F row, Vec (&columns)[4]) {
  Vec x[4], y[4];  // quarter q of x[r] is of row 4 q + r
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
    x[r] = __builtin_shufflevector(
        __builtin_shufflevector(row(r), row(4 + r), 0, 1, 2, 3, 4, 5, 6, 7),
        __builtin_shufflevector(row(8 + r), row(12 + r), 0, 1, 2, 3, 4, 5, 6, 7), 0, 1, 2, 3, 4, 5,
        6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 2
  for (int r = 0; r < 4; r += 2) {
    y[r] = __builtin_shufflevector(x[r], x[r + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28,
                                   13, 29);
    y[r + 1] = __builtin_shufflevector(x[r], x[r + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27,
                                       14, 30, 15, 31);
  }
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
    columns[2 * r] = __builtin_shufflevector(y[r], y[r + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24,
                                             25, 12, 13, 28, 29);
    columns[2 * r + 1] = __builtin_shufflevector(y[r], y[r + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11,
                                                 26, 27, 14, 15, 30, 31);
  }
}
#endif

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
#elif S2S_LANES == 8
  for (int i = 0; i < 4; ++i)
    in[i] = __builtin_shufflevector(in[i], in[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
            __builtin_shufflevector(in[i], in[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  for (int i = 0; i < 2; ++i)
    in[i] = __builtin_shufflevector(in[i], in[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
            __builtin_shufflevector(in[i], in[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(in[0], in[1], 0, 8, 2, 10, 4, 12, 6, 14) +
         __builtin_shufflevector(in[0], in[1], 1, 9, 3, 11, 5, 13, 7, 15);
#else
  for (int i = 0; i < 2; ++i)
    in[i] = __builtin_shufflevector(in[i], in[i + 2], 0, 1, 4, 5) +
            __builtin_shufflevector(in[i], in[i + 2], 2, 3, 6, 7);
  return __builtin_shufflevector(in[0], in[1], 0, 4, 2, 6) +
         __builtin_shufflevector(in[0], in[1], 1, 5, 3, 7);
#endif
}

// All lanes as one: f(x, y) of each half and the other, and so on.
template <int N = kVec / 2, typename F>
S2S_INLINE float folded(Vec x, F f) {
  if constexpr (N == 0) {
    return x[0];
  } else {
    const Vec others = [&]<int... I>(std::integer_sequence<int, I...>) S2S_LAMBDA {
      return __builtin_shufflevector(x, x, (I + N) % kVec...);
    }(std::make_integer_sequence<int, kVec>());
    return folded<N / 2>(f(x, others), f);
  }
}

S2S_INLINE float sum(Vec x) {
  return folded(x, [](Vec a, Vec b) S2S_LAMBDA { return a + b; });
}

S2S_INLINE float largest_lane(Vec x) {
  return folded(x, [](Vec a, Vec b) S2S_LAMBDA { return a > b ? a : b; });
}

// x where it lies above the bound, or below it, and a NaN where x is one.
S2S_INLINE Vec at_least(float bound, Vec x) {
#if defined(S2S_INTRINSICS) && S2S_LANES == 16
  return (Vec)_mm512_max_ps(_mm512_set1_ps(bound), (__m512)x);
#elif defined(S2S_INTRINSICS)
  return (Vec)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)x);
#else
  return x < bound ? bound + Vec{} : x;
#endif
}
S2S_INLINE Vec at_most(float bound, Vec x) {
#if defined(S2S_INTRINSICS) && S2S_LANES == 16
  return (Vec)_mm512_min_ps(_mm512_set1_ps(bound), (__m512)x);
#elif defined(S2S_INTRINSICS)
  return (Vec)_mm256_min_ps(_mm256_set1_ps(bound), (__m256)x);
#else
  return x > bound ? bound + Vec{} : x;
#endif
}

// x without its sign, and y, which has none, with that of x.
S2S_INLINE Vec magnitude(Vec x) {
  VecInt bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= 0x7fffffff;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}
S2S_INLINE Vec with_sign_of(Vec x, Vec y) {
  VecInt from, bits;
  std::memcpy(&from, &x, sizeof from);
  std::memcpy(&bits, &y, sizeof bits);
  bits |= from & INT32_MIN;
  std::memcpy(&y, &bits, sizeof bits);
  return y;
}

// 2^k for k in [-126, 127]
S2S_INLINE Vec power_of_two(VecInt k) {
  const VecInt bits = (k + 127) << 23;
  Vec out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// exp(x) = 2^k (1 + p), |x| < 2^21; p is NaN where x is. The polynomial is the best of its degree
// for exp(f) and for the relative error of exp(f) - 1 together, |f| < ln(2) / 2: 2^-27 and 2^-26.
struct Exponential {
  VecInt k;
  Vec p;
};
S2S_INLINE Exponential exponential(Vec x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
  constexpr int32_t kRoundBits = 0x4b400000;
  const Vec shifted = x * 1.44269504f + kRound, k = shifted - kRound;
  VecInt bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const Vec f = (x - k * 0.693359375f) + k * 2.12194440e-4f;  // ln 2 in two parts
  const Vec ff = f * f;
  const Vec low = f * 0.16666542f + 0.49999997f,
            high = f * 8.366747759282589e-3f + 4.1667431592941284e-2f;
  const Vec p = (ff * 1.386428251862526e-3f + high) * ff + low;
  return {bits - kRoundBits, p * ff + f};
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
  const Exponential e = exponential(at_least(-110.f, x));
  const VecInt half = e.k >> 1;
  return (e.p + 1.f) * power_of_two(half) * power_of_two(e.k - half);
}

// log(x) of a positive normal number, to about one unit in the last place; coefficients from
// Cephes' logf.
S2S_INLINE Vec log_positive(Vec x) {
  constexpr int32_t kRootHalf = 0x3f3504f3;
  VecInt bits;
  std::memcpy(&bits, &x, sizeof bits);
  const VecInt k = (bits - kRootHalf) >> 23;  // x = 2^k m, m from sqrt(1/2) to sqrt(2)
  bits -= k << 23;
  Vec m;
  std::memcpy(&m, &bits, sizeof m);
  const Vec f = m - 1.f, ff = f * f, e = __builtin_convertvector(k, Vec);
  Vec p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec low = p * f * ff + e * -2.12194440e-4f;  // ln 2 in two parts
  return e * 0.693359375f + (f + (low - 0.5f * ff));
}

// tanh to about one unit in the last place; coefficients of the small part from Cephes' tanhf
S2S_INLINE Vec tanh(Vec x) {
  const Vec m = magnitude(x);
  const Vec large = 1.f - 2.f / (exp_moderate(2.f * at_most(10.f, m)) + 1.f);  // tanh(10) is 1
  const Vec z = x * x;
  const Vec low = z * 1.33314422036e-1f - 3.33332819422e-1f;
  const Vec high = z * -5.70498872745e-3f + 2.06390887954e-2f;
  const Vec p = ((z * high - 5.37397155531e-2f) * (z * z)) + low;
  return m < 0.625f ? p * z * x + x : with_sign_of(x, large);
}

// Exactly 0 below -87, where gradients of a closed gate would be subnormal numbers.
S2S_INLINE Vec sigmoid(Vec x) {
  const Vec y = 1.f / (1.f + exp_moderate(at_least(-87.f, at_most(87.f, -x))));
  return x < -87.f ? Vec{} : y;
}

}  // namespace
}  // namespace seq2seq_fast
