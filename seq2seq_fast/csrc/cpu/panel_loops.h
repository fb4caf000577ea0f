// The inner loop of products with packed weights. See loops.h.
#pragma once
#include "vec.h"

namespace seq2seq_fast {
namespace {

// Whether weights are asked for before they are read. A row of AVX2 reads them in one stream, which
// the processor follows by itself, and faster.
template <int M>
constexpr bool kAsks = !(S2S_LANES == 8 && M == 1);
// Steps of k that weights are asked for ahead of their use, from the second level of the cache. The
// next panel comes from further away, and is asked for a whole panel ahead.
template <int M>
constexpr int64_t kAhead = M > 2 ? 12 : 48;
template <typename A>
constexpr int64_t kLine = 64 / sizeof(A);

// Blocks of whose columns M rows' sums stay in registers: all of them, a vector of each at a time,
// or with few registers whole blocks, which is what lies in a line of the cache. As many as it
// takes for eight sums, since each waits for its own last addition.
template <int M>
constexpr int kAtOnce = S2S_LANES == 16 || (S2S_LANES == 8 && M == 1) ? kBlocks
                        : S2S_LANES == 8 && M == 2                    ? 2
                                                                      : 1;

// A panel by M rows. Meanwhile a line for each k is asked for from `ahead` on.
template <typename A, int M, bool kFull>
S2S_INLINE void panel_tile(const A* a, int64_t lda, int64_t K, const A* panel, const A* init,
                           int64_t ld_init, int64_t block_init, A* out, int64_t ldo,
                           int64_t block_out, const int64_t* used, const A* ahead) {
  typedef A V __attribute__((vector_size(4 * S2S_LANES), aligned(sizeof(A)), may_alias));
  constexpr int64_t kLanes = 4 * S2S_LANES / sizeof(A);
  constexpr int kBlocksAtOnce = kAtOnce<M>;
  constexpr int kOfBlock = S2S_LANES == 16 ? 1 : 64 / sizeof(V);
  constexpr int kVectors = kBlocksAtOnce * kOfBlock;
  for (int64_t first = 0; first < kBlocks; first += kBlocksAtOnce)
    for (int64_t part = 0; part < kBlock; part += kOfBlock * kLanes) {
      const auto block = [&](int j) { return first + j / kOfBlock; };
      const auto lane = [&](int j) { return part + j % kOfBlock * kLanes; };
      const auto bytes = [&](int j) -> size_t {
        const int64_t there = used[block(j)] - lane(j);
        return kFull || there >= kLanes ? sizeof(V) : there > 0 ? sizeof(A) * there : 0;
      };
      V acc[M][kVectors] = {};
      const A* w = panel + first * kBlock + part;
      for (int64_t k = 0; k < K; ++k, w += kPanel) {
        if constexpr (kAsks<M>) {
          for (int j = 0; j < kBlocksAtOnce; ++j)
            __builtin_prefetch(w + kAhead<M> * kPanel + j * kBlock);
          if (first == 0) __builtin_prefetch(ahead + k * kLine<A>, 0, 2);
        }
        V row[kVectors];
        for (int j = 0; j < kVectors; ++j)
          row[j] = *reinterpret_cast<const V*>(w + j / kOfBlock * kBlock + j % kOfBlock * kLanes);
        for (int i = 0; i < M; ++i)
          for (int j = 0; j < kVectors; ++j) acc[i][j] += a[i * lda + k] * row[j];
      }
      // Last: it may be much larger than each of the terms, and would round them all.
      if (init != nullptr)
        for (int i = 0; i < M; ++i)
          for (int j = 0; j < kVectors; ++j) {
            V first = {};
            std::memcpy(&first, init + i * ld_init + block(j) * block_init + lane(j), bytes(j));
            acc[i][j] += first;
          }
      for (int i = 0; i < M; ++i)
        for (int j = 0; j < kVectors; ++j)
          std::memcpy(out + i * ldo + block(j) * block_out + lane(j), &acc[i][j], bytes(j));
    }
}

template <typename A, bool kFull>
S2S_INLINE void panel_rows(const A* a, int64_t lda, int64_t m, int64_t K, const A* panel,
                           const A* init, int64_t ld_init, int64_t block_init, A* out, int64_t ldo,
                           int64_t block_out, const int64_t* used) {
  const A *ahead = panel + K * kPanel, *end = ahead + K * kPanel;
  const auto rows = [&]<int M>() S2S_LAMBDA {
    panel_tile<A, M, kFull>(a, lda, K, panel, init, ld_init, block_init, out, ldo, block_out, used,
                            ahead);
    a += M * lda, out += M * ldo, m -= M;
    if (init != nullptr) init += M * ld_init;
    if (ahead < end) ahead += K * kLine<A>;
  };
  if constexpr (kRowsByBlock == 6) {
    while (m >= 6 && m != 8) rows.template operator()<6>();
    while (m >= 4) rows.template operator()<4>();
  }
  while (m >= 2) rows.template operator()<2>();
  if (m > 0) rows.template operator()<1>();
}

template <typename A>
S2S_INLINE void panel_any(const A* a, int64_t lda, int64_t m, int64_t K, const A* panel,
                          const A* init, int64_t ld_init, int64_t block_init, A* out, int64_t ldo,
                          int64_t block_out, const int64_t* used) {
  bool full = true;
  for (int j = 0; j < kBlocks; ++j) full &= used[j] == kBlock;
  if (full)
    panel_rows<A, true>(a, lda, m, K, panel, init, ld_init, block_init, out, ldo, block_out, used);
  else
    panel_rows<A, false>(a, lda, m, K, panel, init, ld_init, block_init, out, ldo, block_out, used);
}

void panel(const float* a, int64_t lda, int64_t m, int64_t K, const float* weights,
           const float* init, int64_t ld_init, int64_t block_init, float* out, int64_t ldo,
           int64_t block_out, const int64_t* used) {
  panel_any<float>(a, lda, m, K, weights, init, ld_init, block_init, out, ldo, block_out, used);
}
void panel_double(const double* a, int64_t lda, int64_t m, int64_t K, const double* weights,
                  const double* init, int64_t ld_init, int64_t block_init, double* out, int64_t ldo,
                  int64_t block_out, const int64_t* used) {
  panel_any<double>(a, lda, m, K, weights, init, ld_init, block_init, out, ldo, block_out, used);
}

}  // namespace
}  // namespace seq2seq_fast
