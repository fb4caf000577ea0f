// The inner loops of additive scores. See the header for the formulas.
#include "additive_scores_loops.h"

#include "vec.h"

namespace seq2seq_fast::loops {
namespace {

// Clamps of x: in scores behind 2^26, where tanh rounds to 1, so that v x^4 is
// finite for |v| < 1e5; in gradients, where 4 / x remains, as far as x^4 goes.
constexpr float kLargestInScores = 2e8f, kLargestInGradients = 3.2e9f;

// x = exp(2(q + k)) from Q and K, or from Q and K - 1
template <Mode mode, bool minus_one>
S2S_INLINE Vec product(float Q, Vec K, float largest) {
  const Vec x = minus_one ? Q * K + Q : Q * K;
  return mode == Mode::kClamped ? (x < largest ? x : largest - Vec{}) : x;
}

template <Mode mode, bool minus_one>
S2S_INLINE void scores_of(const float* q, int64_t ldq, const float* K, const float* v, int64_t H4,
                          float* out) {
  const float *Q = q, *E = Q + ldq, *raw = E + ldq;
  for (int64_t half = 0; half < kLanes; half += kVec) {
    // Sums of eight features are added up in double: the rounding of a long sum is what most of a
    // float32 score's error would be.
    DoubleSum total;
    for (int64_t first = 0; first < H4; first += 2 * kGroup) {
      Vec acc = {};
      const int64_t last = first + 2 * kGroup < H4 ? first + 2 * kGroup : H4;
      for (int64_t h = first; h < last; h += kGroup) {
        const auto k = [&](int64_t j) S2S_LAMBDA { return load(K + (h + j) * kLanes + half); };
        if constexpr (mode == Mode::kExact) {
          Vec y[kGroup];
          for (int64_t j = 0; j < kGroup; ++j) y[j] = v[h + j] * tanh(raw[h + j] + k(j));
          acc += (y[0] + y[1]) + (y[2] + y[3]);
          continue;
        }
        // tanh = (x - 1) / (x + 1): numerators v (x - 1), denominators x + 1
        Vec n[kGroup], d[kGroup];
        for (int64_t j = 0; j < kGroup; ++j) {
          if constexpr (mode == Mode::kSmall) {
            const Vec y = Q[h + j] * k(j) + E[h + j];
            n[j] = v[h + j] * y, d[j] = 2.f + y;
          } else {
            const Vec x = product<mode, minus_one>(Q[h + j], k(j), kLargestInScores);
            n[j] = v[h + j] * x - v[h + j], d[j] = 1.f + x;
          }
        }
        const Vec n01 = n[0] * d[1] + n[1] * d[0], n23 = n[2] * d[3] + n[3] * d[2];
        const Vec d01 = d[0] * d[1], d23 = d[2] * d[3];
        acc += (n01 * d23 + n23 * d01) / (d01 * d23);
      }
      total.add(acc);
    }
    store(out + half, total.rounded());
  }
}

template <Mode mode, bool minus_one>
S2S_INLINE void gradients_of_group(const float* q, int64_t ldq, const float* K, const float* g,
                                   int64_t ldg, const float* w, int64_t n, float* dq, int64_t lddq,
                                   float* dk, float* dv) {
  for (int64_t half = 0; half < kLanes; half += kVec) {
    const auto k = [&](int64_t j) S2S_LAMBDA { return load(K + j * kLanes + half); };
    Vec sum_k[kGroup], sum_v[kGroup];
    for (int64_t j = 0; j < kGroup; ++j) {
      sum_k[j] = load(dk + j * kLanes + half);
      sum_v[j] = load(dv + j * kVec);
    }
    for (int64_t t = 0; t < n; ++t) {
      const float *Q = q + t * 3 * ldq, *E = Q + ldq, *raw = E + ldq;
      const Vec gs = load(g + t * ldg + half);
      Vec e[kGroup];
      if constexpr (mode == Mode::kExact) {
        for (int64_t j = 0; j < kGroup; ++j) {
          const Vec y = tanh(raw[j] + k(j));
          e[j] = w[j] * gs * ((1.f - y) * (1.f + y));
          sum_v[j] += gs * y;
        }
      } else {
        Vec x[kGroup], y[kGroup], d[kGroup];  // y = x - 1, d = x + 1
        for (int64_t j = 0; j < kGroup; ++j) {
          if constexpr (mode == Mode::kSmall) {
            y[j] = Q[j] * k(j) + E[j];
            d[j] = 2.f + y[j];
          } else {
            x[j] = product<mode, minus_one>(Q[j], k(j), kLargestInGradients);
            y[j] = x[j] - 1.f;
            d[j] = 1.f + x[j];
          }
        }
        const Vec d01 = d[0] * d[1], d23 = d[2] * d[3], inverse = 1.f / (d01 * d23);
        const Vec i01 = inverse * d23, i23 = inverse * d01;
        const Vec r[kGroup] = {i01 * d[1], i01 * d[0], i23 * d[3], i23 * d[2]};
        for (int64_t j = 0; j < kGroup; ++j) {
          // The gradients of a softmax sum to zero, and what differs from 1 in 1 - tanh^2 is what
          // is left of them: near zero it must be small and exact.
          if constexpr (mode == Mode::kSmall) {
            const Vec tanh = y[j] * r[j];
            e[j] = 0.25f * gs * (1.f - tanh * tanh);
            sum_v[j] += gs * tanh;
          } else {
            const Vec gr = gs * r[j];
            e[j] = gr * x[j] * r[j];
            sum_v[j] += gr * y[j];
          }
        }
      }
      float* o = dq + t * lddq;
      for (int64_t j = 0; j < kGroup; ++j) {
        store(o + j * kVec, load(o + j * kVec) + e[j]);
        sum_k[j] += e[j];
      }
    }
    for (int64_t j = 0; j < kGroup; ++j) {
      store(dk + j * kLanes + half, sum_k[j]);
      store(dv + j * kVec, sum_v[j]);
    }
  }
}

// Calls f<mode, minus_one> for the combinations that occur.
template <typename F>
S2S_INLINE void with_mode(Mode mode, bool minus_one, F f) {
  if (mode == Mode::kSmall) return f.template operator()<Mode::kSmall, true>();
  if (mode == Mode::kExact) return f.template operator()<Mode::kExact, false>();
  if (mode == Mode::kFast && minus_one) return f.template operator()<Mode::kFast, true>();
  if (mode == Mode::kFast) return f.template operator()<Mode::kFast, false>();
  if (minus_one) return f.template operator()<Mode::kClamped, true>();
  return f.template operator()<Mode::kClamped, false>();
}

}  // namespace

S2S_CLONES void scores(Mode mode, bool minus_one, const float* q, int64_t ldq, const float* K,
                       const float* v, int64_t H4, float* out) {
  with_mode(mode, minus_one,
            [&]<Mode m, bool minus>() S2S_LAMBDA { scores_of<m, minus>(q, ldq, K, v, H4, out); });
}

S2S_CLONES void gradients(Mode mode, bool minus_one, const float* q, int64_t ldq, const float* K,
                          const float* g, int64_t ldg, const float* w, int64_t n, int64_t width,
                          float* dq, float* dk, float* dv) {
  with_mode(mode, minus_one, [&]<Mode m, bool minus>() S2S_LAMBDA {
    for (int64_t j = 0; j < width; j += kGroup)
      gradients_of_group<m, minus>(q + j, ldq, K + j * kLanes, g, ldg, w + j, n, dq + j * kVec,
                                   width * kVec, dk + j * kLanes, dv + j * kVec);
  });
}

S2S_CLONES void transpose_block(const float* rows, int64_t ld, int64_t width, int64_t H,
                                float* out) {
  if (width < kLanes) std::memset(out, 0, sizeof(float) * H * kLanes);
  const int64_t whole = width == kLanes ? H / kVec * kVec : 0;
  for (int64_t h = 0; h < whole; h += kVec)
    for (int64_t s = 0; s < kLanes; s += kVec) {
      Vec in[kVec], columns[kVec];
      for (int64_t i = 0; i < kVec; ++i) in[i] = load(rows + (s + i) * ld + h);
      transpose(in, columns);
      for (int64_t i = 0; i < kVec; ++i) store(out + (h + i) * kLanes + s, columns[i]);
    }
  for (int64_t s = 0; s < width; ++s)
    for (int64_t h = whole; h < H; ++h) out[h * kLanes + s] = rows[s * ld + h];
}

S2S_CLONES void scaled_transpose(const float* in, const float* scale, float* out) {
  for (int64_t h = 0; h < kLanes; h += kVec)
    for (int64_t s = 0; s < kLanes; s += kVec) {
      Vec rows[kVec], columns[kVec];
      for (int64_t i = 0; i < kVec; ++i) rows[i] = load(in + (h + i) * kLanes + s);
      transpose(rows, columns);
      for (int64_t i = 0; i < kVec; ++i)
        store(out + (s + i) * kLanes + h, columns[i] * load(scale + h));
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
  for (int64_t i = 0; i < n; i += kVec) store(out + i, exp_moderate(2.f * load(x + i)));
}

S2S_CLONES void expm1_2x(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kVec) store(out + i, expm1_moderate(2.f * load(x + i)));
}

S2S_CLONES void lane_sums(const float* in, int64_t n, float* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = sum(load(in + j * kVec));
}

}  // namespace seq2seq_fast::loops
