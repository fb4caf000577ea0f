// What a step is fed of the step before: logits += bias, token = argmax of them, and
// x = embedding[token] factors.
//
// Grid: a block for each row. Of equals the first is taken, and before all the first NaN, as
// torch.argmax has it; that orders all places, so that threads may compare in any order.
#pragma once
#include "choice.cuh"

namespace seq2seq_fast {

constexpr int kFeedbackThreads = 256;

struct FeedbackArguments {
  float* logits;  // (B, V), ld_logits apart, without their bias
  int64_t ld_logits;
  View bias, embedding;  // (1, 1, V), (1, V, E)
  const float* factors;  // (B, E), or null
  int64_t* tokens;       // (B,)
  float* x;              // (B, E)
  int V, E;
};

static __global__ void __launch_bounds__(kFeedbackThreads, 1) feed_back(FeedbackArguments a) {
  const int b = blockIdx.x, thread = threadIdx.x;
  Best* const found = reinterpret_cast<Best*>(shared_memory());  // (threads,)
  float* const logits = a.logits + b * a.ld_logits;
  Best best{-INFINITY, a.V};  // behind all places
  constexpr int kAtOnce = 8;  // reads on their way before the first is waited for
  for (int v0 = thread; v0 < a.V; v0 += kAtOnce * kFeedbackThreads) {
    float x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int v = v0 + i * kFeedbackThreads;
      if (v < a.V) x[i] = logits[v] + a.bias(0, 0, v);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int v = v0 + i * kFeedbackThreads;
      if (v >= a.V) break;
      logits[v] = x[i];
      if (const Best here{x[i], v}; here.before(best)) best = here;
    }
  }
  found[thread] = best;
  for (int n = kFeedbackThreads / 2; n > 0; n /= 2) {
    __syncthreads();
    if (thread < n && found[thread + n].before(found[thread])) found[thread] = found[thread + n];
  }
  __syncthreads();
  const int token = found[0].at;
  if (thread == 0) a.tokens[b] = token;
  for (int e = thread; e < a.E; e += kFeedbackThreads) {
    const int64_t at = static_cast<int64_t>(b) * a.E + e;
    a.x[at] = a.embedding(0, token, e) * (a.factors == nullptr ? 1.f : a.factors[at]);
  }
}

}  // namespace seq2seq_fast
