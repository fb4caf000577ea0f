// The inner loops of cross entropy, from logits to loss and gradient. See loops.h.
#pragma once
#include "vec.h"

namespace seq2seq_fast {
namespace {

// Smaller ones become zero: their products would be subnormal numbers.
constexpr float kLeastProbability = 1e-30f;

// The lanes of p[i ...) that lie below n; those behind are `rest`.
S2S_INLINE Vec load_or(const float* p, int64_t i, int64_t n, float rest) {
  if (i + kVec <= n) return load(p + i);
  Vec x = rest + Vec{};
  std::memcpy(&x, p + i, sizeof(float) * (n - i));
  return x;
}
S2S_INLINE void store_below(float* p, int64_t i, int64_t n, Vec x) {
  if (i + kVec <= n) return store(p + i, x);
  std::memcpy(p + i, &x, sizeof(float) * (n - i));
}

Exponentials exponentials(float* x, const float* bias, const float* w, int64_t n) {
  Vec tops = -INFINITY - Vec{};
  for (int64_t i = 0; i < n; i += kVec) {
    Vec y = load_or(x, i, n, -INFINITY);
    if (bias) {
      y += load_or(bias, i, n, 0.f);
      store_below(x, i, n, y);
    }
    tops = y > tops ? y : tops;
  }
  const float top = largest_lane(tops);
  Vec sums = {}, weighted = {};
  for (int64_t i = 0; i < n; i += kVec) {
    const Vec e = exp_negative(load_or(x, i, n, -INFINITY) - top);
    if (w) weighted += load_or(w, i, n, 0.f) * (load_or(x, i, n, top) - top);
    store_below(x, i, n, e);
    sums += e;
  }
  return {top, sum(sums), sum(weighted)};
}

void logit_gradients(float* x, float factor, const float* subtrahend, int64_t n, bool first,
                     float* sums) {
  const float least = kLeastProbability;
  for (int64_t i = 0; i < n; i += kVec) {
    const Vec e = load_or(x, i, n, 0.f);
    Vec g = e < least ? Vec{} : e * factor;
    if (subtrahend) g -= load_or(subtrahend, i, n, 0.f);
    store_below(x, i, n, g);
    if (sums) store_below(sums, i, n, first ? g : load_or(sums, i, n, 0.f) + g);
  }
}

}  // namespace
}  // namespace seq2seq_fast
