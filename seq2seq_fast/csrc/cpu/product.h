// Products of matrices.
#pragma once
#include <vector>

#include "../common.h"

namespace seq2seq_fast {

// To read weights takes as long as to multiply so many rows by them.
constexpr int64_t kRowsOfReading = 8;

// out (m, used) = init + a (m, K) w^T, whose n rows, ld apart, are read as they lie; columns from n
// on have init alone, which may be out itself, or null. n <= used <= kBlock
void product_in_place(const float* a, int64_t lda, int64_t m, int64_t K, const float* w, int64_t ld,
                      int64_t n, const float* init, int64_t ld_init, float* out, int64_t ldo,
                      int64_t used);

// Rows of a matrix that count, in runs, one behind the other.
struct RowRun {
  int64_t first, count;
};
using RowRuns = std::vector<RowRun>;
// The first sizes[t] of each B rows; none where those are all.
RowRuns runs_of(const std::vector<int64_t>& sizes, int64_t B);

// out (M, N) = init + a (M, K) b (K, N), where init is out itself, or what each of its rows begins
// with (N,), or null; all strided, but rows of out and init are in one piece. By the BLAS behind
// torch, or by loops of our own where they are faster. Of M rows those of `rows`, if there are any,
// will be read: others may not be written.
void product(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor* init = nullptr,
             const RowRuns& rows = {});

}  // namespace seq2seq_fast
