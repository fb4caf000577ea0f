// scores[b,t,s] = sum_h v[h] tanh(q[b,t,h] + k[b,s,h]) and its gradients: inner loops.
//
// With x = exp(2q) exp(2k), tanh(q + k) = (x - 1) / (x + 1), and 1 - tanh^2 = 4 x / (x + 1)^2.
// Exponentials are made once per element of q and k. Source positions come in blocks of kLanes,
// features in groups of kGroup that share one division: n1/d1 + n2/d2 = (n1 d2 + n2 d1) / (d1 d2),
// twice. Numerators x - 1, not 1 - 2 / (x + 1): what is rounded is then of the size of tanh.
#pragma once
#include <cstdint>

namespace seq2seq_fast {

constexpr int64_t kLanes = 16;
constexpr int64_t kGroup = 4;

// How a query meets a block of keys, from m = max|q| + max|k|:
//   kSmall    x - 1 made of exp(2q) - 1 and exp(2k) - 1, so that a tanh near zero keeps its
//             relative accuracy. m < 2
//   kFast     as above, while v x^4 stays finite. m < 9.5
//   kClamped  x clamped far behind the last bit of tanh. m < 43, so that both factors are finite
//   kExact    tanh itself; everything else, infinities and NaN among it
enum class Mode : uint8_t { kSmall, kFast, kClamped, kExact };

// Blocks with max|k| below this hold exp(2k) - 1 in place of exp(2k).
constexpr float kSmallKeys = 1.f;

namespace loops {

// One query and one block. q (3, ldq), K (H4, kLanes), v (H4,)
// minus_one: K holds exp(2k) - 1.
void scores(Mode mode, bool minus_one, const float* q, int64_t ldq, const float* K, const float* v,
            int64_t H4, float* out);

// `width` features, whole groups, of one block with n queries; with e = g x / (x + 1)^2
//   dq[t][h][lane] += e;  dk[h][s] += e;  dv[h][lane] += g tanh
// q (n, 3, ldq) from the first feature on, K and dk (width, kLanes), g (n, ldg), dq (n, width, 8),
// dv (width, 8). In Mode::kExact e = w[h] g (1 - tanh^2).
void gradients(Mode mode, bool minus_one, const float* q, int64_t ldq, const float* K,
               const float* g, int64_t ldg, const float* w, int64_t n, int64_t width, float* dq,
               float* dk, float* dv);

// out[h][s] = rows[s][h] for s < width, else zero; out (H, kLanes)
void transpose_block(const float* rows, int64_t ld, int64_t width, int64_t H, float* out);
// out[s][h] = in[h][s] * scale[h], both (kLanes, kLanes)
void scaled_transpose(const float* in, const float* scale, float* out);
// The largest magnitude, or NaN if there is one.
float largest(const float* x, int64_t n);
// exp(2x) and exp(2x) - 1 for |x| < 43; n is a multiple of eight.
void exp2x(const float* x, int64_t n, float* out);
void expm1_2x(const float* x, int64_t n, float* out);
// out[j] = sum of the lanes of in[j], j < n
void lane_sums(const float* in, int64_t n, float* out);

}  // namespace loops
}  // namespace seq2seq_fast
