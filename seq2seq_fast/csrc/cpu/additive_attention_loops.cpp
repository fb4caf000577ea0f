// The inner loops of softmax and context. See additive_attention_loops.h.
#include "additive_attention_loops.h"

#include <cmath>

#include "vec.h"

namespace seq2seq_fast::loops {
namespace {

// M x (N vectors) of the result in registers while the rows stream past.
template <int M, int N>
S2S_INLINE void weighted_tile(const float* w, int64_t wi, int64_t wj, const float* rows, int64_t ld,
                              int64_t n, float* out, int64_t ldo) {
  Vec acc[M][N] = {};
  for (int64_t j = 0; j < n; ++j) {
    Vec row[N];
    for (int c = 0; c < N; ++c) row[c] = load(rows + j * ld + c * kVec);
    for (int i = 0; i < M; ++i)
      for (int c = 0; c < N; ++c) acc[i][c] += w[i * wi + j * wj] * row[c];
  }
  for (int i = 0; i < M; ++i)
    for (int c = 0; c < N; ++c) store(out + i * ldo + c * kVec, acc[i][c]);
}

template <int M, int N>
S2S_INLINE void weighted_strip(const float* w, int64_t wi, int64_t wj, const float* rows,
                               int64_t ld, int64_t n, int64_t D, float* out, int64_t ldo) {
  int64_t d = 0;
  for (; d + N * kVec <= D; d += N * kVec)
    weighted_tile<M, N>(w, wi, wj, rows + d, ld, n, out + d, ldo);
  for (; d + kVec <= D; d += kVec) weighted_tile<M, 1>(w, wi, wj, rows + d, ld, n, out + d, ldo);
  for (; d < D; ++d)
    for (int i = 0; i < M; ++i) {
      float sum = 0.f;
      for (int64_t j = 0; j < n; ++j) sum += w[i * wi + j * wj] * rows[j * ld + d];
      out[i * ldo + d] = sum;
    }
}

template <int M, int N>
S2S_INLINE void product_tile(const float* a, int64_t lda, const float* rows, int64_t ld, int64_t D,
                             float* out, int64_t ldo) {
  Vec acc[M][N] = {};
  int64_t d = 0;
  for (; d + kVec <= D; d += kVec) {
    Vec row[N];
    for (int j = 0; j < N; ++j) row[j] = load(rows + j * ld + d);
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) acc[i][j] += load(a + i * lda + d) * row[j];
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      float rest = 0.f;
      for (int64_t r = d; r < D; ++r) rest += a[i * lda + r] * rows[j * ld + r];
      out[i * ldo + j] = sum(acc[i][j]) + rest;
    }
}

template <int M>
S2S_INLINE void product_strip(const float* a, int64_t lda, const float* rows, int64_t ld, int64_t n,
                              int64_t D, float* out, int64_t ldo) {
  constexpr int N = M == 1 ? 4 : 2;
  int64_t j = 0;
  for (; j + N <= n; j += N) product_tile<M, N>(a, lda, rows + j * ld, ld, D, out + j, ldo);
  for (; j < n; ++j) product_tile<M, 1>(a, lda, rows + j * ld, ld, D, out + j, ldo);
}

}  // namespace

S2S_CLONES void weighted_rows(const float* w, int64_t wi, int64_t wj, const float* rows, int64_t ld,
                              int64_t m, int64_t n, int64_t D, float* out, int64_t ldo) {
  for (; m >= 4; m -= 4, w += 4 * wi, out += 4 * ldo)
    weighted_strip<4, 2>(w, wi, wj, rows, ld, n, D, out, ldo);
  for (; m > 0; --m, w += wi, out += ldo) weighted_strip<1, 8>(w, wi, wj, rows, ld, n, D, out, ldo);
}

S2S_CLONES void products(const float* a, int64_t lda, const float* rows, int64_t ld, int64_t m,
                         int64_t n, int64_t D, float* out, int64_t ldo) {
  for (; m >= 4; m -= 4, a += 4 * lda, out += 4 * ldo)
    product_strip<4>(a, lda, rows, ld, n, D, out, ldo);
  for (; m > 0; --m, a += lda, out += ldo) product_strip<1>(a, lda, rows, ld, n, D, out, ldo);
}

S2S_CLONES void softmax(float* x, int64_t S, float scale, const float* bias, const bool* mask,
                        int64_t stride) {
  bool any = mask == nullptr;
  float top = -INFINITY;
  for (int64_t s = 0; s < S; ++s) {
    x[s] = scale * x[s] + (bias ? bias[s] : 0.f);
    const bool attended = mask == nullptr || mask[s * stride];
    any |= attended;
    x[s] = attended ? x[s] : -INFINITY;
    top = x[s] > top ? x[s] : top;
  }
  if (!any) {
    std::memset(x, 0, sizeof(float) * S);
    return;
  }
  Vec sums = {};
  int64_t s = 0;
  for (; s + kVec <= S; s += kVec) {
    const Vec e = exp_negative(load(x + s) - top);
    store(x + s, e);
    sums += e;
  }
  if (s < S) {
    Vec rest = -INFINITY - Vec{};
    std::memcpy(&rest, x + s, sizeof(float) * (S - s));
    const Vec e = exp_negative(rest - top);
    for (int64_t i = s; i < S; ++i) sums[i - s] += e[i - s];
    std::memcpy(x + s, &e, sizeof(float) * (S - s));
  }
  const float total = sum(sums);
  for (int64_t i = 0; i < S; ++i) x[i] = mask == nullptr || mask[i * stride] ? x[i] / total : 0.f;
}

S2S_CLONES void scale_and_flush(float* x, int64_t n, float scale) {
  float top = 0.f;
  for (int64_t i = 0; i < n; ++i) {
    x[i] *= scale;
    const float magnitude = x[i] < 0.f ? -x[i] : x[i];
    top = magnitude > top ? magnitude : top;
  }
  const float least = top * 1e-20f < 1e-30f ? top * 1e-20f : 1e-30f;
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] < least && x[i] > -least ? 0.f : x[i];
}

S2S_CLONES void softmax_backward(float* dw, const float* w, int64_t S) {
  Vec dots = {}, sums = {};
  int64_t s = 0;
  for (; s + kVec <= S; s += kVec) {
    dots += load(dw + s) * load(w + s);
    sums += load(w + s);
  }
  float dot = sum(dots), total = sum(sums);
  for (; s < S; ++s) dot += dw[s] * w[s], total += w[s];
  // Weights that were rounded to 16 bits do not add up to one; the gradients must to zero.
  const float mean = total > 0.f ? dot / total : dot;
  for (s = 0; s < S; ++s) dw[s] = w[s] * (dw[s] - mean);
}

}  // namespace seq2seq_fast::loops
