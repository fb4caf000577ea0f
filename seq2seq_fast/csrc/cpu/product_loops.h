// The inner loops of a product of two matrices. See product.cpp.
#pragma once
#include <algorithm>

#include "loops.h"
#include "vec.h"

namespace seq2seq_fast {
namespace {

// Vectors of which, beside kStrip rows, the sums stay in registers.
constexpr int kSumVectors = kRegisters / 8;

// out (M, N vectors, of which n columns are there) = init + a b. Where kStrips, a is strips
// (K, kStrip), else rows (M, K), lda apart.
template <bool kStrips, int M, int N>
S2S_INLINE void product_tile(const float* a, int64_t lda, int64_t K, const float* b, int64_t n,
                             const float* init, int64_t ld_init, float* out, int64_t ldo) {
  Vec acc[M][N] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < K; ++k, b += kPanel) {
    Vec row[N];
    for (int j = 0; j < N; ++j) row[j] = load(b + j * kVec);
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j)
        acc[i][j] +=
            (kStrips ? a[i / kStrip * lda + k * kStrip + i % kStrip] : a[i * lda + k]) * row[j];
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

template <bool kStrips, int N>
S2S_INLINE void product_rows(const float* a, int64_t lda, int64_t m, int64_t K, const float* b,
                             int64_t n, const float* init, int64_t ld_init, float* out,
                             int64_t ldo) {
  const auto rows = [&]<int M>() S2S_LAMBDA {
    product_tile<kStrips, M, N>(a, lda, K, b, n, init, ld_init, out, ldo);
    if (init != nullptr) init += M * ld_init;
    a += !kStrips ? M * lda : M < kStrip ? M : M / kStrip * lda;
    out += M * ldo, m -= M;
  };
  if constexpr (2 * N <= kSumVectors)
    while (m >= 2 * kStrip) rows.template operator()<2 * kStrip>();
  while (m >= kStrip) rows.template operator()<kStrip>();
  if (m >= 4) rows.template operator()<4>();
  if (m >= 2) rows.template operator()<2>();
  if (m > 0) rows.template operator()<1>();
}

void product_panel(const float* a, int64_t lda, bool strips, int64_t m, int64_t K, const float* b,
                   int64_t n, const float* init, int64_t ld_init, float* out, int64_t ldo) {
  for (int64_t j = 0; j < n; j += kSumVectors * kVec) {
    const int64_t vectors = (std::min(n - j, kSumVectors * kVec) + kVec - 1) / kVec;
    const auto go = [&]<int N>() S2S_LAMBDA {
      if (strips)
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

// Several rows at a time, so that whole lines are written, and for each strip eight numbers, of
// which the next row's overwrite two.
void pack_strips(const float* rows, int64_t ld, int64_t n, int64_t m, float* strips,
                 int64_t ld_strip) {
  typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
  constexpr int64_t kTogether = 8;
  const int64_t eights = m < 8 ? 0 : (m - 8) / kStrip + 1;  // strips behind which two can be read
  for (int64_t first = 0; first < n; first += kTogether) {
    const int64_t end = std::min(n, first + kTogether);
    for (int64_t s = 0; s < eights; ++s)
      for (int64_t k = first; k < end; ++k)
        *reinterpret_cast<Eight*>(strips + s * ld_strip + k * kStrip) =
            *reinterpret_cast<const Eight*>(rows + k * ld + s * kStrip);
    for (int64_t i = eights * kStrip; i < m; ++i)
      for (int64_t k = first; k < end; ++k)
        strips[i / kStrip * ld_strip + k * kStrip + i % kStrip] = rows[k * ld + i];
  }
}

// kVec / 2 numbers of each row of a strip are three vectors.
void sum_strips(const float* strips, int64_t ld_strip, int64_t n, int64_t m, bool add, float* out) {
  constexpr int64_t kVectors = 3, kTurn = kVectors * kVec;
  static_assert(kTurn % kStrip == 0);
  for (; m > 0; strips += ld_strip, out += kStrip, m -= kStrip) {
    Vec acc[kVectors] = {};
    int64_t at = 0;
    for (; at + kTurn <= n * kStrip; at += kTurn)
      for (int j = 0; j < kVectors; ++j) acc[j] += load(strips + at + j * kVec);
    float lanes[kTurn];
    for (int j = 0; j < kVectors; ++j) store(lanes + j * kVec, acc[j]);
    for (int64_t i = 0; i < std::min(m, kStrip); ++i) {
      float sum = 0.f;
      for (int64_t j = i; j < kTurn; j += kStrip) sum += lanes[j];
      for (int64_t j = at + i; j < n * kStrip; j += kStrip) sum += strips[j];
      out[i] = add ? out[i] + sum : sum;
    }
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
