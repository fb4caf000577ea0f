// The inner loop of products with packed weights. See loops.h.
#pragma once
#include "vec.h"

namespace seq2seq_fast {
namespace {

// Four blocks of a panel by M rows, one vector of each block at a time in registers.
template <typename A, int M>
S2S_INLINE void panel_tile(const A* a, int64_t lda, int64_t K, const A* panel, const A* init,
                           int64_t ld_init, A* out, int64_t ldo, int64_t ld_block,
                           const int64_t* used) {
  typedef A V __attribute__((vector_size(4 * S2S_LANES), aligned(sizeof(A)), may_alias));
  constexpr int64_t kLanes = 4 * S2S_LANES / sizeof(A);
  for (int64_t part = 0; part < kBlock; part += kLanes) {
    const auto count = [&](int j) { return used[j] - part < kLanes ? used[j] - part : kLanes; };
    const auto bytes = [&](int j) { return sizeof(A) * (count(j) < 0 ? 0 : count(j)); };
    V acc[M][kBlocks] = {};
    if (init != nullptr)
      for (int i = 0; i < M; ++i)
        for (int j = 0; j < kBlocks; ++j)
          std::memcpy(&acc[i][j], init + i * ld_init + j * ld_block + part, bytes(j));
    const A* w = panel + part;
    for (int64_t k = 0; k < K; ++k, w += kPanel) {
      for (int j = 0; j < kBlocks; ++j)  // no processor has the second level at hand unasked
        __builtin_prefetch(w + 12 * kPanel + j * kBlock);
      V row[kBlocks];
      for (int j = 0; j < kBlocks; ++j) row[j] = *reinterpret_cast<const V*>(w + j * kBlock);
      for (int i = 0; i < M; ++i)
        for (int j = 0; j < kBlocks; ++j) acc[i][j] += a[i * lda + k] * row[j];
    }
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < kBlocks; ++j)
        std::memcpy(out + i * ldo + j * ld_block + part, &acc[i][j], bytes(j));
  }
}

template <typename A>
S2S_INLINE void panel_rows(const A* a, int64_t lda, int64_t m, int64_t K, const A* panel,
                           const A* init, int64_t ld_init, A* out, int64_t ldo, int64_t ld_block,
                           const int64_t* used) {
  constexpr int kMost = S2S_LANES == 16 ? 6 : 2;  // what fits into the registers
  const auto rows = [&]<int M>() S2S_LAMBDA {
    panel_tile<A, M>(a, lda, K, panel, init, ld_init, out, ldo, ld_block, used);
    a += M * lda, out += M * ldo, m -= M;
    if (init != nullptr) init += M * ld_init;
  };
  if constexpr (kMost == 6) {
    while (m >= 6 && m != 8) rows.template operator()<6>();
    while (m >= 4) rows.template operator()<4>();
  }
  while (m >= 2) rows.template operator()<2>();
  if (m > 0) rows.template operator()<1>();
}

void panel(const float* a, int64_t lda, int64_t m, int64_t K, const float* weights,
           const float* init, int64_t ld_init, float* out, int64_t ldo, int64_t ld_block,
           const int64_t* used) {
  panel_rows<float>(a, lda, m, K, weights, init, ld_init, out, ldo, ld_block, used);
}
void panel_double(const double* a, int64_t lda, int64_t m, int64_t K, const double* weights,
                  const double* init, int64_t ld_init, double* out, int64_t ldo, int64_t ld_block,
                  const int64_t* used) {
  panel_rows<double>(a, lda, m, K, weights, init, ld_init, out, ldo, ld_block, used);
}

}  // namespace
}  // namespace seq2seq_fast
