// Products of matrices.
#pragma once
#include "../common.h"

namespace seq2seq_fast {

// out (M, N) = a (M, K) b (K, N), or += it; all strided, out with rows in one piece. By the BLAS
// behind torch, or by loops of our own where they are faster.
void product(const Tensor& out, const Tensor& a, const Tensor& b, bool add = false);

}  // namespace seq2seq_fast
