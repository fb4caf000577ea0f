// The inner loops of a product of two matrices. See product.cpp.
#pragma once
#include <algorithm>

#include "vec.h"

namespace seq2seq_fast {
namespace {

// Rows and vectors whose sums stay in registers.
constexpr int kSumVectors = kRegisters / 8, kSumRows = 6;

// out (M, N vectors, of which n columns are there) = init + a b. Where kAcross, a is (K, M), else
// (M, K), rows lda apart.
template <bool kAcross, int M, int N>
S2S_INLINE void product_tile(const float* a, int64_t lda, int64_t K, const float* b, int64_t n,
                             const float* init, int64_t ld_init, float* out, int64_t ldo) {
  Vec acc[M][N] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < K; ++k, b += kPanel) {
    Vec row[N];
    for (int j = 0; j < N; ++j) row[j] = load(b + j * kVec);
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) acc[i][j] += (kAcross ? a[k * lda + i] : a[i * lda + k]) * row[j];
  }
  // Only the last vector may not be there in full. Where the compiler does not know which sums a
  // turn is about, it keeps all of them in memory, and begins with a loop that clears it.
  const int64_t last = n - (N - 1) * kVec;
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const int64_t there = j + 1 < N ? kVec : last;
      if (init != nullptr) acc[i][j] += load_some(init + i * ld_init + j * kVec, there);
      store_some(out + i * ldo + j * kVec, acc[i][j], there);
    }
}

template <bool kAcross, int N>
S2S_INLINE void product_rows(const float* a, int64_t lda, int64_t m, int64_t K, const float* b,
                             int64_t n, const float* init, int64_t ld_init, float* out,
                             int64_t ldo) {
  const auto rows = [&]<int M>() S2S_LAMBDA {
    product_tile<kAcross, M, N>(a, lda, K, b, n, init, ld_init, out, ldo);
    if (init != nullptr) init += M * ld_init;
    a += kAcross ? M : M * lda, out += M * ldo, m -= M;
  };
  if constexpr (2 * N <= kSumVectors)
    while (m >= 2 * kSumRows) rows.template operator()<2 * kSumRows>();
  while (m >= kSumRows) rows.template operator()<kSumRows>();
  if (m >= 4) rows.template operator()<4>();
  if (m >= 2) rows.template operator()<2>();
  if (m > 0) rows.template operator()<1>();
}

void product_panel(const float* a, int64_t lda, bool across, int64_t m, int64_t K, const float* b,
                   int64_t n, const float* init, int64_t ld_init, float* out, int64_t ldo) {
  for (int64_t j = 0; j < n; j += kSumVectors * kVec) {
    const int64_t vectors = (std::min(n - j, kSumVectors * kVec) + kVec - 1) / kVec;
    const auto go = [&]<int N>() S2S_LAMBDA {
      if (across)
        product_rows<true, N>(a, lda, m, K, b + j, n - j, init ? init + j : init, ld_init, out + j,
                              ldo);
      else
        product_rows<false, N>(a, lda, m, K, b + j, n - j, init ? init + j : init, ld_init, out + j,
                               ldo);
    };
    if constexpr (kSumVectors == 4) {
      if (vectors == 4) go.template operator()<4>();
      if (vectors == 3) go.template operator()<3>();
    }
    if (vectors == 2) go.template operator()<2>();
    if (vectors == 1) go.template operator()<1>();
  }
}

// out (m,), = the sum of n rows, ld apart, or += it.
void sum_rows(const float* rows, int64_t ld, int64_t n, int64_t m, bool add, float* out) {
  constexpr int kTogether = 4;  // vectors
  int64_t i = 0;
  for (; i + kTogether * kVec <= m; i += kTogether * kVec) {
    Vec acc[kTogether] = {};
    for (int64_t k = 0; k < n; ++k)
      for (int j = 0; j < kTogether; ++j) acc[j] += load(rows + k * ld + i + j * kVec);
#pragma GCC unroll 4
    for (int j = 0; j < kTogether; ++j) {
      float* const to = out + i + j * kVec;
      store(to, add ? load(to) + acc[j] : acc[j]);
    }
  }
  for (; i < m; ++i) {
    float sum = 0.f;
    for (int64_t k = 0; k < n; ++k) sum += rows[k * ld + i];
    out[i] = add ? out[i] + sum : sum;
  }
}

// to (N, M), ld_to apart, = from (M, N) transposed.
void transpose(const float* from, int64_t ld, int64_t M, int64_t N, float* to, int64_t ld_to) {
  int64_t i = 0;
#if S2S_LANES == 16
  for (; i + 16 <= M; i += 16) {
    int64_t j = 0;
    for (; j + 4 <= N; j += 4) {
      Vec columns[4];
      four_columns(
          [&](int r) S2S_LAMBDA { return *reinterpret_cast<const Four*>(from + (i + r) * ld + j); },
          columns);
      for (int r = 0; r < 4; ++r) store(to + (j + r) * ld_to + i, columns[r]);
    }
    for (; j < N; ++j)
      for (int r = 0; r < 16; ++r) to[j * ld_to + i + r] = from[(i + r) * ld + j];
  }
#endif
  for (; i + 4 <= M; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= N; j += 4) {
      Four x[4], y[4];
      for (int r = 0; r < 4; ++r) x[r] = *reinterpret_cast<const Four*>(from + (i + r) * ld + j);
      for (int r = 0; r < 4; r += 2) {
        y[r] = __builtin_shufflevector(x[r], x[r + 1], 0, 4, 1, 5);
        y[r + 1] = __builtin_shufflevector(x[r], x[r + 1], 2, 6, 3, 7);
      }
      for (int r = 0; r < 2; ++r) {
        x[2 * r] = __builtin_shufflevector(y[r], y[r + 2], 0, 1, 4, 5);
        x[2 * r + 1] = __builtin_shufflevector(y[r], y[r + 2], 2, 3, 6, 7);
      }
      for (int r = 0; r < 4; ++r) *reinterpret_cast<Four*>(to + (j + r) * ld_to + i) = x[r];
    }
    for (; j < N; ++j)
      for (int r = 0; r < 4; ++r) to[j * ld_to + i + r] = from[(i + r) * ld + j];
  }
  for (; i < M; ++i)
    for (int64_t j = 0; j < N; ++j) to[j * ld_to + i] = from[i * ld + j];
}

}  // namespace
}  // namespace seq2seq_fast
