// Products of matrices.
#pragma once
#include "../common.h"

namespace seq2seq_fast {

// To read weights takes as long as to multiply so many rows by them.
constexpr int64_t kRowsOfReading = 8;

// out (M, N) = init + a (M, K) b (K, N), where init is out itself, or what each of its rows begins
// with (N,), or null; all strided, but rows of out and init are in one piece. By the BLAS behind
// torch, or by loops of our own where they are faster.
void product(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor* init = nullptr);

}  // namespace seq2seq_fast
