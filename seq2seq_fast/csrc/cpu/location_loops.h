// The inner loops of location-sensitive attention. See loops.h.
#pragma once
#include "vec.h"

namespace seq2seq_fast {
namespace {

// Places by two vectors of features, whose sums stay in registers.
constexpr int kPlaces = kRegisters / 4;

// M filters at V vectors of places.
template <int M, int V>
S2S_INLINE void filter_tile(const float* x, int64_t ldx, int64_t C, int64_t K, const float* w,
                            int64_t ld_w, float* out, int64_t ldo) {
  Vec acc[M][V] = {};
  for (int64_t c = 0; c < C; ++c)
    for (int64_t j = 0; j < K; ++j) {
      Vec row[V];
      for (int i = 0; i < V; ++i) row[i] = load(x + c * ldx + j + i * kVec);
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < V; ++i) acc[m][i] += w[m * ld_w + c * K + j] * row[i];
    }
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < V; ++i) store(out + m * ldo + i * kVec, acc[m][i]);
}

void convolve(const float* x, int64_t ldx, int64_t C, int64_t K, const float* w, int64_t N,
              int64_t n, float* out, int64_t ldo) {
  constexpr int M = kRegisters / 8, kVectors = 4;
  int64_t s = 0;
  const auto strip = [&]<int V>() S2S_LAMBDA {
    int64_t i = 0;
    for (; i + M <= N; i += M)
      filter_tile<M, V>(x + s, ldx, C, K, w + i * C * K, C * K, out + i * ldo + s, ldo);
    for (; i < N; ++i)
      filter_tile<1, V>(x + s, ldx, C, K, w + i * C * K, C * K, out + i * ldo + s, ldo);
    s += V * kVec;
  };
  while (s + kVectors * kVec <= n) strip.template operator()<kVectors>();
  while (s < n) strip.template operator()<1>();
}

// As many filters by taps as a vector has lanes: their sums are added up together.
void correlate(const float* d, int64_t ld, int64_t N, const float* x, int64_t K, int64_t n,
               float* out, int64_t ldo) {
  constexpr int kTaps = 4, M = kVec / kTaps;
  for (int64_t m = 0; m < N; m += M) {
    const float* row[M];  // behind the last: that one again
    for (int i = 0; i < M; ++i) row[i] = d + (m + i < N ? m + i : N - 1) * ld;
    for (int64_t j = 0; j < K; j += kTaps) {
      Vec acc[M * kTaps] = {};
      for (int64_t s = 0; s < n; s += kVec) {
        Vec in[kTaps];
        for (int k = 0; k < kTaps; ++k) in[k] = load(x + s + j + k);
        for (int i = 0; i < M; ++i)
          for (int k = 0; k < kTaps; ++k) acc[i * kTaps + k] += load(row[i] + s) * in[k];
      }
      const Vec total = sums(acc);
      for (int i = 0; i < M && m + i < N; ++i)
        for (int k = 0; k < kTaps && j + k < K; ++k)
          out[(m + i) * ldo + j + k] += total[i * kTaps + k];
    }
  }
}

// The places of a tile, behind the last: that one again.
struct PlaceRows {
  const float* keys[kPlaces];
  int64_t at[kPlaces];  // of a row in anything that lies as the keys do
};
S2S_INLINE PlaceRows rows_of(const Places& p, int64_t s) {
  PlaceRows rows;
  for (int r = 0; r < kPlaces; ++r) {
    rows.at[r] = (s + r < p.count ? s + r : p.count - 1) * p.ld;
    rows.keys[r] = p.keys + rows.at[r];
  }
  return rows;
}

// exp(2 x) - 1 of x = query + keys + projection features, |x| at most `most`, for two vectors of
// features from a on; tanh(x) = e / (e + 2).
S2S_INLINE void exponentials_of(const Places& p, const PlaceRows& rows, int64_t s, int64_t a,
                                float most, Vec (&e)[kPlaces][2]) {
  const Vec query[2] = {load(p.query + a), load(p.query + a + kVec)};
  for (int r = 0; r < kPlaces; ++r)
    for (int i = 0; i < 2; ++i) e[r][i] = load(rows.keys[r] + a + i * kVec) + query[i];
  for (int64_t n = 0; n < p.N; ++n) {
    const float* w = p.projection + n * p.width + a;
    const Vec of_feature[2] = {load(w), load(w + kVec)};
    const float* f = p.features + n * p.ld_features + s;
    for (int r = 0; r < kPlaces; ++r)
      for (int i = 0; i < 2; ++i) e[r][i] += f[r] * of_feature[i];
  }
  for (int r = 0; r < kPlaces; ++r)
    for (int i = 0; i < 2; ++i)
      e[r][i] = expm1_moderate(at_least(-2 * most, at_most(2 * most, e[r][i] + e[r][i])));
}

void place_scores(const Places& p, float* out) {
  for (int64_t s = 0; s < p.count; s += kPlaces) {
    const PlaceRows rows = rows_of(p, s);
    Vec acc[kPlaces] = {}, e[kPlaces][2];
    for (int64_t a = 0; a < p.width; a += 2 * kVec) {
      exponentials_of(p, rows, s, a, 9.1f, e);  // whose tanh rounds to 1
      const Vec v[2] = {load(p.v + a), load(p.v + a + kVec)};
      for (int r = 0; r < kPlaces; ++r) {
        const Vec d[2] = {e[r][0] + 2.f, e[r][1] + 2.f}, both = 1.f / (d[0] * d[1]);
        acc[r] += v[0] * (e[r][0] * (d[1] * both)) + v[1] * (e[r][1] * (d[0] * both));
      }
    }
    for (int r = 0; r < kPlaces && s + r < p.count; ++r) out[s + r] = sum(acc[r]);
  }
}

// Gradients of the features at a tile's places, given those of what stands before tanh.
template <int V>
S2S_INLINE void features_tile(const float* before, int64_t A, const float* w, int64_t Np,
                              int64_t used, float* out, int64_t ldo) {
  Vec acc[kPlaces][V] = {};
  for (int64_t a = 0; a < A; ++a) {
    Vec row[V];
    for (int i = 0; i < V; ++i) row[i] = load(w + a * Np + i * kVec);
    for (int r = 0; r < kPlaces; ++r)
      for (int i = 0; i < V; ++i) acc[r][i] += before[r * A + a] * row[i];
  }
  alignas(64) float rows[kPlaces][V * kVec];
  for (int r = 0; r < kPlaces; ++r)
    for (int i = 0; i < V; ++i) store(rows[r] + i * kVec, acc[r][i]);
  for (int64_t n = 0; n < used; ++n)
    for (int r = 0; r < kPlaces; ++r) out[n * ldo + r] = rows[r][n];
}

void place_gradients(const Places& p, const float* g, const PlaceGradients& d) {
  for (int64_t s = 0; s < p.count; s += kPlaces) {
    bool any = false;
    for (int r = 0; r < kPlaces; ++r) any |= g[s + r] != 0.f;
    if (!any) {  // hidden by a mask
      for (int64_t n = 0; n < p.N; ++n)
        for (int r = 0; r < kPlaces; ++r) d.features[n * d.ld_features + s + r] = 0.f;
      continue;
    }
    const PlaceRows rows = rows_of(p, s);
    for (int64_t a = 0; a < p.width; a += 2 * kVec) {
      Vec x[kPlaces][2];
      exponentials_of(p, rows, s, a, 20.f, x);
      Vec of_query[2] = {}, of_v[2] = {};
      const Vec v[2] = {load(p.v + a), load(p.v + a + kVec)};
      for (int r = 0; r < kPlaces; ++r) {
        const Vec e[2] = {x[r][0], x[r][1]}, sum[2] = {e[0] + 2.f, e[1] + 2.f};
        const Vec both = 1.f / (sum[0] * sum[1]);
        const Vec inverse[2] = {sum[1] * both, sum[0] * both};
        for (int i = 0; i < 2; ++i) {
          // What a mask hides has none, not even of keys that are no numbers. 1 - tanh^2 without
          // cancellation.
          const Vec none = {}, all = none + g[s + r];
          of_v[i] += all == 0.f ? none : all * (e[i] * inverse[i]);
          x[r][i] =
              all == 0.f ? none : (all * 4.f) * v[i] * ((e[i] + 1.f) * inverse[i]) * inverse[i];
          of_query[i] += x[r][i];
          store(d.before + r * p.width + a + i * kVec, x[r][i]);
          float* key = d.keys + rows.at[r] + a + i * kVec;
          store(key, load(key) + x[r][i]);
        }
      }
      for (int i = 0; i < 2; ++i) {
        float *query = d.query + a + i * kVec, *of = d.v + a + i * kVec;
        store(query, load(query) + of_query[i]);
        store(of, load(of) + of_v[i]);
      }
      for (int64_t n = 0; n < p.N; ++n) {
        const float* f = p.features + n * p.ld_features + s;
        float* w = d.projection + n * p.width + a;
        Vec acc[2] = {load(w), load(w + kVec)};
        for (int r = 0; r < kPlaces; ++r)
          for (int i = 0; i < 2; ++i) acc[i] += f[r] * x[r][i];
        store(w, acc[0]), store(w + kVec, acc[1]);
      }
    }
    int64_t n = 0;
    const auto features = [&]<int V>() S2S_LAMBDA {
      const int64_t used = p.N - n < V * kVec ? p.N - n : V * kVec;
      features_tile<V>(d.before, p.width, d.projected + n, d.ld_projected, used,
                       d.features + n * d.ld_features + s, d.ld_features);
      n += V * kVec;
    };
    while (n + 2 * kVec <= d.ld_projected) features.template operator()<2>();
    while (n < p.N) features.template operator()<1>();
  }
}

}  // namespace
}  // namespace seq2seq_fast
