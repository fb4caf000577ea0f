// The inner loops of additive scores. See loops.h for the formulas.
#pragma once
#include "vec.h"

namespace seq2seq_fast {
namespace {

// Clamp of x in gradients, where 4 / x remains of it, as far as x^4 goes.
constexpr float kLargest = 3.2e9f;

// N vectors of features of one query against a block: sums[s] += their part of the score's sum.
// q, v and K begin at these features; streams of q and rows of K are `width` apart.
template <Mode mode, bool minus_one, int N>
S2S_INLINE void scores_of(const float* q, const float* K, int64_t width, int64_t count,
                          const float* v, Vec* sums) {
  // x + 1 = Q K + G and v (x - 1) = P K + R, where K may lack a 1 that G and R then have
  Vec Q[N], G[N], P[N], R[N];
  for (int j = 0; j < N; ++j) {
    const Vec w = load(v + j * kVec);
    Q[j] = load(q + j * kVec);
    if constexpr (mode == Mode::kExact) {
      Q[j] = load(q + kRaw * width + j * kVec);
      P[j] = w;
    } else if constexpr (mode == Mode::kLarge) {
      P[j] = w, G[j] = load(q + kPowerMinusOne * width + j * kVec);
    } else if constexpr (minus_one) {
      const Vec E = load(q + kPowerMinusOne * width + j * kVec);
      G[j] = E + 2.f, P[j] = w * Q[j], R[j] = w * E;
    } else {
      G[j] = Vec{} + 1.f, P[j] = w * Q[j], R[j] = -w;
    }
  }
  for (int64_t s = 0; s < count; ++s, K += width) {
    Vec n[N], d[N];
    for (int j = 0; j < N; ++j) {
      const Vec k = load(K + j * kVec);
      if constexpr (mode == Mode::kExact) {
        n[j] = P[j] * tanh(Q[j] + k);
      } else if constexpr (mode == Mode::kLarge) {
        const Vec y = minus_one ? Q[j] * k + G[j] : Q[j] * k - 1.f;
        n[j] = P[j] * (y / (2.f + y));
      } else {
        n[j] = P[j] * k + R[j], d[j] = Q[j] * k + G[j];
      }
    }
    if constexpr (mode == Mode::kExact || mode == Mode::kLarge) {
      for (int j = 1; j < N; ++j) n[0] += n[j];
      sums[s] += n[0];
      continue;
    }
    // Fractions are added in pairs. Written out: as loops GCC keeps them in memory.
    if constexpr (N >= 2) n[0] = n[0] * d[1] + n[1] * d[0], d[0] *= d[1];
    if constexpr (N == 4) {
      n[2] = n[2] * d[3] + n[3] * d[2], d[2] *= d[3];
      n[0] = n[0] * d[2] + n[2] * d[0], d[0] *= d[2];
    }
    sums[s] += n[0] / d[0];
  }
}

// N keys, one vector of features, n queries; without kAll only dq
template <Mode mode, bool minus_one, bool kAll, int N>
S2S_INLINE void gradients_of(const float* q, int64_t n, const float* K, const float* g, int64_t ldg,
                             const float* w_, int64_t width, float* dq, float* dk, float* dv) {
  constexpr float kOver = mode == Mode::kFast || mode == Mode::kLarge ? 2.f : 1.f;
  Vec k[N], sum_k[N] = {}, sum_v = {}, w;
  for (int j = 0; j < N; ++j) k[j] = load(K + j * width);
  if constexpr (mode == Mode::kExact) w = load(w_);
  for (int64_t t = 0; t < n; ++t, q += kStreams * width, g += ldg, dq += width) {
    const Vec Q = load(q), E = load(q + kPowerMinusOne * width);
    Vec sum_q = load(dq);
    if constexpr (mode == Mode::kExact) {
      const Vec raw = load(q + kRaw * width);
      for (int j = 0; j < N; ++j) {
        const Vec y = tanh(raw + k[j]), e = w * g[j] * ((1.f - y) * (1.f + y));
        sum_v += g[j] * y;
        sum_q += e, sum_k[j] += e;
      }
      store(dq, sum_q);
      continue;
    }
    Vec x[N], y[N], d[N], r[N];  // y = x - 1, d = x + 1, r = kOver / d
    for (int j = 0; j < N; ++j) {
      if constexpr (mode == Mode::kSmall) {
        y[j] = Q * k[j] + E;
        d[j] = 2.f + y[j];
      } else {
        x[j] = minus_one ? Q * k[j] + Q : Q * k[j];
        if constexpr (mode == Mode::kLarge) x[j] = x[j] < kLargest ? x[j] : kLargest - Vec{};
        y[j] = x[j] - 1.f;
        d[j] = 1.f + x[j];
      }
    }
    if constexpr (N == 4) {
      const Vec d01 = d[0] * d[1], d23 = d[2] * d[3], inverse = kOver / (d01 * d23);
      const Vec i01 = inverse * d23, i23 = inverse * d01;
      r[0] = i01 * d[1], r[1] = i01 * d[0], r[2] = i23 * d[3], r[3] = i23 * d[2];
    } else {
      for (int j = 0; j < N; ++j) r[j] = kOver / d[j];
    }
    for (int j = 0; j < N; ++j) {
      // The gradients of a softmax sum to zero, and what differs from 1 in 1 - tanh^2 is what
      // is left of them: near zero it must be small and exact.
      if constexpr (mode == Mode::kSmall) {
        const Vec tanh = y[j] * r[j], e = g[j] - (g[j] * tanh) * tanh;
        sum_v += g[j] * tanh;
        sum_q += e, sum_k[j] += e;
      } else {
        const Vec gr = g[j] * r[j], grx = gr * x[j];
        sum_v += gr * y[j];  // twice g tanh
        sum_q += grx * r[j], sum_k[j] += grx * r[j];
      }
    }
    store(dq, sum_q);
  }
  if constexpr (!kAll) return;
  store(dv, load(dv) + sum_v * (1.f / kOver));
  for (int j = 0; j < N; ++j) store(dk + j * width, load(dk + j * width) + sum_k[j]);
}

// Calls f<mode, minus_one> for the combinations that occur.
template <typename F>
S2S_INLINE void with_mode(Mode mode, bool minus_one, F f) {
  if (mode == Mode::kSmall) return f.template operator()<Mode::kSmall, true>();
  if (mode == Mode::kExact) return f.template operator()<Mode::kExact, false>();
  if (mode == Mode::kFast && minus_one) return f.template operator()<Mode::kFast, true>();
  if (mode == Mode::kFast) return f.template operator()<Mode::kFast, false>();
  if (minus_one) return f.template operator()<Mode::kLarge, true>();
  return f.template operator()<Mode::kLarge, false>();
}

void scores(Mode mode, bool minus_one, const float* q, int64_t T, int64_t t0, int64_t n,
            const float* K, int64_t count, const float* v, int64_t Hp, float* out, int64_t ld) {
  alignas(64) Vec parts[kQueries][kRows];
  std::memset(parts, 0, sizeof(parts[0]) * n);
  // In scores kSmall is no other than kFast.
  with_mode(mode == Mode::kSmall ? Mode::kFast : mode, minus_one,
            [&]<Mode m, bool minus>() S2S_LAMBDA {
              for (int64_t h0 = 0; h0 < Hp; h0 += kGroup) {
                const int64_t width = Hp - h0 < kGroup ? Hp - h0 : kGroup;
                for (int64_t t = 0; t < n; ++t) {
                  const float* to = q + kStreams * (h0 * T + (t0 + t) * width);
                  const float* block = K + count * h0;
                  int64_t h = 0;
                  for (; h + 4 * kVec <= width; h += 4 * kVec)
                    scores_of<m, minus, 4>(to + h, block + h, width, count, v + h0 + h, parts[t]);
                  for (; h + 2 * kVec <= width; h += 2 * kVec)
                    scores_of<m, minus, 2>(to + h, block + h, width, count, v + h0 + h, parts[t]);
                  for (; h < width; h += kVec)
                    scores_of<m, minus, 1>(to + h, block + h, width, count, v + h0 + h, parts[t]);
                }
              }
            });
  for (int64_t t = 0; t < n; ++t)
    for (int64_t s = 0; s < kRows; s += kVec) store(out + t * ld + s, sums(parts[t] + s));
}

void gradients(Mode mode, bool minus_one, const float* q, int64_t n, const float* K, int64_t count,
               const float* g, int64_t ldg, const float* w, int64_t width, float* dq, float* dk,
               float* dv) {
  with_mode(mode, minus_one, [&]<Mode m, bool minus>() S2S_LAMBDA {
    const auto over_all = [&]<bool kAll>() S2S_LAMBDA {
      for (int64_t h = 0; h < width; h += kVec) {
        const auto keys = [&]<int N>(int64_t s) S2S_LAMBDA {
          gradients_of<m, minus, kAll, N>(q + h, n, K + s * width + h, g + s, ldg, w + h, width,
                                          dq + h, kAll ? dk + s * width + h : nullptr,
                                          kAll ? dv + h : nullptr);
        };
        int64_t s = 0;
        for (; s + 4 <= count; s += 4) keys.template operator()<4>(s);
        for (; s < count; ++s) keys.template operator()<1>(s);
      }
    };
    if (dk == nullptr)
      over_all.template operator()<false>();
    else
      over_all.template operator()<true>();
  });
}

float largest(const float* x, int64_t n) {
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

void exp2x(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kVec) store(out + i, exp_moderate(2.f * load(x + i)));
}

void expm1_2x(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kVec) store(out + i, expm1_moderate(2.f * load(x + i)));
}

}  // namespace
}  // namespace seq2seq_fast
