// Inner loops of additive scores; no torch header. See additive_scores.cpp for the formula.
//
// Source positions come in blocks of kLanes, features in groups of kGroup that share one division:
// v1/a + v2/b = (v1 b + v2 a) / (a b), twice. exp(2q) and exp(2k) are made once per element of q
// and k, so that no transcendental is left in the loop.
#pragma once
#include <cstdint>

namespace seq2seq_fast {

constexpr int64_t kLanes = 16;
constexpr int64_t kGroup = 4;

// How a tile is computed, from the largest |q| + |k| in it: a product of four (1 + exp(2(q+k)))
// stays finite below 11; clamped factors do where a single exponential stays finite; else tanh.
enum class Path { kFast, kClamped, kExact };

inline Path choose(float max_q, float max_k) {
  const float m = max_q + max_k;
  return m < 10.9f                                    ? Path::kFast
         : (max_q < 43.f && max_k < 43.f && m < 43.f) ? Path::kClamped
                                                      : Path::kExact;
}

// out[s] = sum_h v[h] (1 - 2 / (1 + Q[h] K[h][s])), centred group by group so that rounding stays
// small.  Q (H,), K (H, kLanes), v (H,), half_v (H / kGroup,) half the sum of each group of v
void scores_tile(const float* Q, const float* K, const float* v, const float* half_v, int64_t H,
                 bool clamp, float* out);

// One group of features over all blocks: with e = g r (1 - r) and r = 1 / (1 + Q K),
//   dq[j] = sum_s e;  dk[block][j][s] += e;  dv[j] += sum_s g tanh;  blocks are `stride` floats
//   apart.
// Q (kGroup,), K and dk (blocks, kGroup, kLanes) strided, g (blocks, kLanes)
void backward_row(const float* Q, const float* K, const float* g, int64_t blocks, int64_t stride,
                  bool clamp, float* dq, float* dk, float* dv);

// The largest magnitude, or NaN if there is one.
float largest(const float* x, int64_t n);

// out[i] = exp(2 x[i]), to float32 rounding, for |x| < 43
void exp2x(const float* x, int64_t n, float* out);

}  // namespace seq2seq_fast
