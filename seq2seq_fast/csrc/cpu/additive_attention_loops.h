// The inner loops of softmax and context; no torch there.
#pragma once
#include <cstdint>

namespace seq2seq_fast::loops {

// In place: x[s] = scale x[s] + bias[s], then softmax over the places that mask allows; masked
// places, and rows masked everywhere, become zero. bias and mask may be null; mask has a stride.
void softmax(float* x, int64_t S, float scale, const float* bias, const bool* mask, int64_t stride);

// out (m, D) = w (m, n) rows (n, D); w[i][j] is at w + i * wi + j * wj
void weighted_rows(const float* w, int64_t wi, int64_t wj, const float* rows, int64_t ld, int64_t m,
                   int64_t n, int64_t D, float* out, int64_t ldo);

// out[i][j] = sum_d a[i][d] rows[j][d], i < m, j < n
void products(const float* a, int64_t lda, const float* rows, int64_t ld, int64_t m, int64_t n,
              int64_t D, float* out, int64_t ldo);

// In place: the gradient of softmax's input from that of its output. dw, w (S,)
void softmax_backward(float* dw, const float* w, int64_t S);

// x *= scale, and zero in place of what is so small (below 1e-30 and 1e-20 of the largest) that its
// products would be subnormal numbers, on which arithmetic is many times slower.
void scale_and_flush(float* x, int64_t n, float scale);

}  // namespace seq2seq_fast::loops
