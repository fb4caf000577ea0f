// Makes what powers.cuh describes.
//
// Grid: one block per 16 rows of queries, then of keys, then one for v; a warp takes two rows.
#pragma once
#include "powers.cuh"

namespace seq2seq_fast {

constexpr int kPowersThreads = 256;

struct PowersArguments {
  View query, keys, v;  // (B, T, H), (B, S, H), (1, 1, H)
  Powers to_query, to_keys;
  float* to_v;  // (Hp + 1,): v, zeros, max|v|
  int64_t H;
  int64_t query_blocks, key_blocks;  // of all batch rows
};

// Queries are halved: the pair form wants exp(2q) / 2.
__global__ void __launch_bounds__(kPowersThreads, 1) make_powers(PowersArguments a) {
  float* maxima = shared_memory();  // (warps,)
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t i = blockIdx.x;
  const bool is_query = i < a.query_blocks;
  if (!is_query) i -= a.query_blocks;
  const bool is_v = !is_query && i == a.key_blocks;
  const View from = is_query ? a.query : is_v ? a.v : a.keys;
  const Powers to = is_query ? a.to_query : a.to_keys;
  const int64_t blocks = is_v ? 1 : ceil_div(to.N, kRowsOfBlock), b = i / blocks;
  const int64_t block = i % blocks, n0 = block * kRowsOfBlock, N = is_v ? 1 : to.N;

  float m = 0.f;
  for (int64_t n = n0 + warp; n < n0 + kRowsOfBlock && n < N; n += kPowersThreads / kWarp)
    for (int64_t h = lane; h < a.H; h += kWarp) m = larger(m, from(is_v ? 0 : b, n, h));
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) m = larger(m, __shfl_xor_sync(kAll, m, lanes));
  if (lane == 0) maxima[warp] = m;
  __syncthreads();
  for (int w = 0; w < kPowersThreads / kWarp; ++w) m = larger(m, maxima[w]);

  const int64_t Hp = round_up(a.H, kFeatures);
  if (is_v) {
    for (int64_t h = threadIdx.x; h < Hp; h += kPowersThreads)
      a.to_v[h] = h < a.H ? from(0, 0, h) : 0.f;
    if (threadIdx.x == 0) a.to_v[Hp] = m;
    return;
  }
  if (threadIdx.x == 0) to.max(b, block) = m;
  const float factor = is_query ? 0.5f : 1.f;
  for (int64_t n = n0 + warp; n < n0 + kRowsOfBlock && n < N; n += kPowersThreads / kWarp)
    for (int64_t h = lane; h < Hp; h += kWarp) {
      const float x = h < a.H ? 2.f * from(b, n, h) : 0.f;
      to.row(b, n)[h] = factor * (m < kSmallMagnitude ? expm1f(x) : expf(x));
    }
}

}  // namespace seq2seq_fast
