// weights = softmax(scale scores + score_bias), context = weights values.
//
// Few queries: all in one launch, see one_query.cuh. Many: the scores' own kernel, softmax over its
// rows here, and torch's batched product for the context, which is a matrix product like any other
// and, in 16 bits, one for the tensor cores.
#pragma once
#include "softmax.cuh"

namespace seq2seq_fast {

constexpr int kRowWarps = 8;  // warps of a block, each with a row of its own

struct SoftmaxArguments {
  float* scores;  // (B, T, S), overwritten
  Softmax softmax;
  void* weights;  // (B, T, S) of `type`
  Type type;
  int T, S;
  int64_t rows;  // B T
};

// blockDim (32, kRowWarps)
static __global__ void __launch_bounds__(kWarp* kRowWarps, 1) softmax_rows(SoftmaxArguments a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.y;
  if (row >= a.rows) return;
  const int b = row / a.T, t = row % a.T, lane = threadIdx.x;
  float *const x = a.scores + row * a.S, top = -INFINITY, total = 0.f;
  for (int s = lane; s < a.S; s += kWarp) {
    if (!a.softmax.attended(b, t, s)) continue;
    x[s] = a.softmax(x[s], b, t, s);
    top = fmaxf(top, x[s]);
  }
  top = warp_max(top);
  for (int s = lane; s < a.S; s += kWarp) {
    x[s] = a.softmax.attended(b, t, s) ? expf(x[s] - top) : 0.f;
    total += x[s];
  }
  total = warp_sum(total);
  for (int s = lane; s < a.S; s += kWarp)
    store(a.weights, a.type, row * a.S + s, a.softmax.attended(b, t, s) ? x[s] / total : 0.f);
}

struct SoftmaxBackwardArguments {
  View weights;       // (B, T, S)
  View grad_weights;  // (B, T, S): what comes through the weights, beside the context
  // grad_context (B, T, D) times values (B, S, D): the product (B, T, S), or the two
  View from_context, grad_context, values;
  float* grad_scores;  // (B, T, S) of the unscaled scores, or null
  void* grad_bias;     // (B, T, S) of `type`, or null
  Type type;
  float scale;
  int T, S, D;
  int64_t rows;
};

// The gradient of softmax's input at x, of that of its output less its mean, the latter weighted.
__device__ __forceinline__ void store_softmax_gradient(const SoftmaxBackwardArguments& a,
                                                       int64_t row, int s, float weight, float grad,
                                                       float mean) {
  const float x = weight * (grad - mean);
  if (a.grad_bias != nullptr) store(a.grad_bias, a.type, row * a.S + s, x);
  if (a.grad_scores != nullptr) a.grad_scores[row * a.S + s] = a.scale * x;
}

// Weights that were rounded to 16 bits do not add up to one; the gradients must to zero.
__device__ __forceinline__ float weighted_mean(float dot, float total) {
  return total > 0.f ? dot / total : dot;
}

// blockDim (32, kRowWarps), a row for each warp; the product is given
static __global__ void __launch_bounds__(kWarp* kRowWarps, 1)
    softmax_backward_rows(SoftmaxBackwardArguments a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.y;
  if (row >= a.rows) return;
  const int b = row / a.T, t = row % a.T, lane = threadIdx.x;
  const auto grad = [&](int s) { return a.from_context(b, t, s) + a.grad_weights(b, t, s); };
  float dot = 0.f, total = 0.f;
  for (int s = lane; s < a.S; s += kWarp) {
    dot += a.weights(b, t, s) * grad(s);
    total += a.weights(b, t, s);
  }
  const float mean = weighted_mean(warp_sum(dot), warp_sum(total));
  for (int s = lane; s < a.S; s += kWarp)
    store_softmax_gradient(a, row, s, a.weights(b, t, s), grad(s), mean);
}

// The same for few queries: a block for each row, and the product within, which is bound by reading
// the values. blockDim (32, kRowWarps)
static __global__ void __launch_bounds__(kWarp* kRowWarps, 1)
    few_softmax_backward_rows(SoftmaxBackwardArguments a) {
  const int64_t row = blockIdx.x;
  const int b = row / a.T, t = row % a.T, lane = threadIdx.x, warp = threadIdx.y;
  float *const grads = shared_memory(), *const sums = grads + a.S;  // (S,), (2, warps)
  float dot = 0.f, total = 0.f;
  for (int s = warp; s < a.S; s += kRowWarps) {
    float product = 0.f;
    for (int d = lane; d < a.D; d += kWarp) product += a.grad_context(b, t, d) * a.values(b, s, d);
    product = warp_sum(product) + a.grad_weights(b, t, s);
    if (lane == 0) grads[s] = product;
    dot += a.weights(b, t, s) * product;
    total += a.weights(b, t, s);
  }
  if (lane == 0) sums[warp] = dot, sums[kRowWarps + warp] = total;
  __syncthreads();
  dot = 0.f, total = 0.f;
  for (int w = 0; w < kRowWarps; ++w) dot += sums[w], total += sums[kRowWarps + w];
  const float mean = weighted_mean(dot, total);
  for (int s = warp * kWarp + lane; s < a.S; s += kRowWarps * kWarp)
    store_softmax_gradient(a, row, s, a.weights(b, t, s), grads[s], mean);
}

}  // namespace seq2seq_fast
