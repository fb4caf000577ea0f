// What of a vocabulary may be drawn.
//
// A draw is the largest of logits perturbed by Gumbel's noise: with g = -log(-log u), u uniform and
// each token's own, x + g is largest at a token with probability softmax(x). So drawing is greedy
// decoding with other logits, and the token can be sought where that one's can.
#pragma once
#include <cstdint>

#include "loops.h"

namespace seq2seq_fast {

// As DecodingOptions has them.
struct Sampling {
  uint64_t seed;
  float scale;  // 1 / temperature
  int64_t top_k;
  double top_p;
  bool cuts(int64_t V) const { return (top_k > 0 && top_k < V) || top_p < 1; }
  // Whether what may be drawn can be found without all logits.
  bool seeks(int64_t V) const { return !cuts(V) || (top_k > 0 && top_k <= V / 16); }
};

// Sets the logits of what top_k and top_p leave out to -inf. No logit is NaN or +inf.
void cut(const Sampling& sampling, float* logits, int64_t V);
// The k-th largest of n numbers, of which none is NaN.
float kth_largest(const float* x, int64_t n, int64_t k);
// Where the largest of n numbers is, once they are perturbed.
int32_t drawn(const float* x, int64_t n, const Draw& draw);

}  // namespace seq2seq_fast
