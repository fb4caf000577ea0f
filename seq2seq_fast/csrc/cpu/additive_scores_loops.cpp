// Vectorised loops in GCC/Clang vector extensions; AVX-512, AVX2 or plain chosen at load time.
#include <cstring>

#include "additive_scores.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define S2S_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define S2S_CLONES
#endif

namespace seq2seq_fast {
namespace {

typedef float Vec __attribute__((vector_size(32), aligned(4)));
constexpr int64_t kVec = 8;
constexpr float kLargest =
    3.2e9f;  // below exp(22): its fourth power is finite, its inverse < 2^-31

#define LOAD(p) (*reinterpret_cast<const Vec*>(p))
#define STORE(p, x) (*reinterpret_cast<Vec*>(p) = (x))

// x = exp(2(q + k)), which saturates far behind the last bit of tanh
#define POWER(x, j)                      \
  Vec x = Q[j] * LOAD(K + (j) * kLanes); \
  if (clamp) x = x < kLargest ? x : kLargest - Vec{};

}  // namespace

S2S_CLONES void scores_tile(const float* Q, const float* K, const float* v, const float* half_v,
                            int64_t H, bool clamp, float* out) {
  Vec acc0 = {}, acc1 = {};
  const auto run = [&](auto clamp) __attribute__((always_inline)) {
    for (int64_t h = 0; h < H;
         h += kGroup, Q += kGroup, K += kGroup * kLanes, v += kGroup, ++half_v) {
      const float* K0 = K;
      for (int half = 0; half < 2; ++half) {
        const float* K = K0 + half * kVec;
        POWER(xa, 0)
        POWER(xb, 1) POWER(xc, 2) POWER(xd, 3) const Vec a = 1.f + xa,
                                                         b = 1.f + xb, c = 1.f + xc, d = 1.f + xd;
        const Vec ab = a * b, cd = c * d;
        const Vec n1 = v[0] * b + v[1] * a, n2 = v[2] * d + v[3] * c;
        const Vec quotient = (n1 * cd + n2 * ab) / (ab * cd) - *half_v;
        if (half)
          acc1 += quotient;
        else
          acc0 += quotient;
      }
    }
  };
  struct Yes {
    constexpr operator bool() const { return true; }
  };
  struct No {
    constexpr operator bool() const { return false; }
  };
  if (clamp)
    run(Yes{});
  else
    run(No{});
  STORE(out, -2.f * acc0);
  STORE(out + kVec, -2.f * acc1);
}

S2S_CLONES void backward_row(const float* Q, const float* K, const float* g, int64_t blocks,
                             int64_t stride, bool clamp, float* dq, float* dk, float* dv) {
  Vec sq[kGroup] = {}, sv[kGroup] = {};
  for (int64_t i = 0; i < blocks; ++i, K += stride, dk += stride, g += kLanes) {
    const float* K0 = K;
    for (int half = 0; half < 2; ++half) {
      const float* K = K0 + half * kVec;
      float* out = dk + half * kVec;
      const Vec gs = LOAD(g + half * kVec);
      POWER(xa, 0)
      POWER(xb, 1) POWER(xc, 2) POWER(xd, 3) const Vec a = 1.f + xa,
                                                       b = 1.f + xb, c = 1.f + xc, d = 1.f + xd;
      const Vec ab = a * b, cd = c * d, inverse = 1.f / (ab * cd);
      const Vec iab = inverse * cd, icd = inverse * ab;
      const Vec x[kGroup] = {xa, xb, xc, xd};
      const Vec r[kGroup] = {iab * b, iab * a, icd * d, icd * c};
#pragma GCC unroll 4
      for (int j = 0; j < kGroup; ++j) {
        // 1 - r = x r, without the cancellation of 1 - r where r is near 1
        const Vec gr = gs * r[j], grx = gr * x[j], e = grx * r[j];
        sq[j] += e;
        sv[j] += grx - gr;
        STORE(out + j * kLanes, LOAD(out + j * kLanes) + e);
      }
    }
  }
  for (int j = 0; j < kGroup; ++j) {
    float q = 0.f, s = 0.f;
    for (int64_t i = 0; i < kVec; ++i) {
      q += sq[j][i];
      s += sv[j][i];
    }
    dq[j] = q;
    dv[j] += s;
  }
}

S2S_CLONES float largest(const float* x, int64_t n) {
  // Magnitudes order as their bits do, with NaN above infinity.
  int32_t top = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    top = bits > top ? bits : top;
  }
  float m;
  std::memcpy(&m, &top, sizeof m);
  return m;
}

S2S_CLONES void exp2x(const float* x, int64_t n, float* out) {
  constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  for (int64_t i = 0; i < n; ++i) {
    const float y = 2.f * x[i];
    const float k = (y * 1.44269504f + kMagic) - kMagic;
    const float f = (y - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.f / 5040.f;
    p = p * f + 1.f / 720.f;
    p = p * f + 1.f / 120.f;
    p = p * f + 1.f / 24.f;
    p = p * f + 1.f / 6.f;
    p = p * f + 0.5f;
    p = p * f + 1.f;
    p = p * f + 1.f;
    const int32_t bits = (static_cast<int32_t>(k) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    out[i] = p * power;
  }
}

}  // namespace seq2seq_fast
