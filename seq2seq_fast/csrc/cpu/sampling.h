// What of a vocabulary may be drawn.
//
// A draw is the largest of logits perturbed by Gumbel's noise: with g = -log(-log u), u uniform and
// each token's own, x + g is largest at a token with probability softmax(x). So drawing is greedy
// decoding with other logits, and the token can be sought where that one's can.
#pragma once
#include <cstdint>

namespace seq2seq_fast {

// As DecodingOptions has them.
struct Sampling {
  uint64_t seed;
  float scale;  // 1 / temperature
  int64_t top_k;
  double top_p;
  bool cuts(int64_t V) const { return (top_k > 0 && top_k < V) || top_p < 1; }
};

// Sets the logits of what top_k and top_p leave out to -inf. No logit is NaN or +inf.
void cut(const Sampling& sampling, float* logits, int64_t V);

}  // namespace seq2seq_fast
