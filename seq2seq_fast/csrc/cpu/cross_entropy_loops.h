// The inner loops of cross entropy, from logits to loss and gradient. See loops.h.
#pragma once
#include "vec.h"

namespace seq2seq_fast {
namespace {

// Smaller ones become zero: their products would be subnormal numbers.
constexpr float kLeastProbability = 1e-30f;

Exponentials exponentials(float* x, const float* bias, const float* w, int64_t n) {
  Vec tops = -INFINITY - Vec{};
  for (int64_t i = 0; i < n; i += kVec) {
    Vec y = load_some(x + i, n - i, -INFINITY);
    if (bias) {
      y += load_some(bias + i, n - i);
      store_some(x + i, y, n - i);
    }
    tops = y > tops ? y : tops;
  }
  const float top = largest_lane(tops);
  Vec sums = {}, weighted = {};
  for (int64_t i = 0; i < n; i += kVec) {
    const Vec e = exp_negative(load_some(x + i, n - i, -INFINITY) - top);
    if (w) weighted += load_some(w + i, n - i) * (load_some(x + i, n - i, top) - top);
    store_some(x + i, e, n - i);
    sums += e;
  }
  return {top, sum(sums), sum(weighted)};
}

void logit_gradients(float* x, float factor, const float* subtrahend, int64_t n, bool first,
                     float* sums) {
  const float least = kLeastProbability;
  for (int64_t i = 0; i < n; i += kVec) {
    const Vec e = load_some(x + i, n - i);
    Vec g = e < least ? Vec{} : e * factor;
    if (subtrahend) g -= load_some(subtrahend + i, n - i);
    store_some(x + i, g, n - i);
    if (sums) store_some(sums + i, first ? g : load_some(sums + i, n - i) + g, n - i);
  }
}

}  // namespace
}  // namespace seq2seq_fast
