// A panel of weights of kInt16. See loops.h.
//
// An instruction multiplies twice as many of them as of floats, and adds them too where there is
// VNNI: in AVX2 a product takes two thirds of the time. Sums of blocks of rows are exact, and are
// added up in floats.
#pragma once
#include "panel_tiles.h"

namespace seq2seq_fast {
namespace {

typedef int32_t Pairs __attribute__((vector_size(4 * S2S_LANES), aligned(2), may_alias));

// acc += w[0] x[0] + w[1] x[1] in each lane.
S2S_INLINE void add_two(VecInt& acc, const VecInt& w, const void* numbers) {
  int32_t x;
  std::memcpy(&x, numbers, sizeof x);
#if defined(S2S_VNNI) && S2S_LANES == 16
  acc = (VecInt)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(S2S_VNNI)
  acc = (VecInt)_mm256_dpwssd_avx_epi32((__m256i)acc, (__m256i)w, _mm256_set1_epi32(x));
#elif defined(S2S_INTRINSICS) && S2S_LANES == 16
  acc += (VecInt)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(x));
#elif defined(S2S_INTRINSICS)
  acc += (VecInt)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(x));
#else
  acc += (w << 16 >> 16) * (x << 16 >> 16) + (w >> 16) * (x >> 16);
#endif
}

// M rows by N vectors of a panel's columns. Sums of floats lie in memory: registers hold those of a
// block, and are too few for both.
template <int M, int N>
S2S_INLINE void sixteen_tile(const SixteenRows& x, int64_t row, const int16_t* w, int64_t width,
                             const float* scale, const char* ahead, const Sums& to) {
  // In bytes from two rows on, which is how an instruction finds six with one register more.
  const int64_t ld = x.ld * static_cast<int64_t>(sizeof(int16_t));
  constexpr int64_t kBlockBytes = kSixteenBlock * sizeof(int16_t);
  const char* first[2];
  for (int i = 0; i < 2; ++i)
    first[i] = reinterpret_cast<const char*>(x.numbers + (row + 3 * i) * x.ld);
  const float *scales = x.scales + row * x.blocks(), *shifts = x.shifts + row;
  alignas(64) float memory[M * N * kVec] = {};
  float* sums = memory;
#ifdef __GNUC__
  asm("" : "+r"(sums) : : "memory");  // or the compiler keeps them in registers, and the rest not
#endif
  for (int64_t block = 0; block < x.blocks(); ++block, ++scales) {
    const int64_t last = x.blocks() - 1;
    const int64_t count =
        block == last ? kCommon : std::min(kSixteenBlock, x.K - block * kSixteenBlock);
    const char* numbers[2] = {first[0] + block * kBlockBytes, first[1] + block * kBlockBytes};
    VecInt acc[M][N] = {};
#pragma GCC unroll 4
    for (int64_t k = 0; k < count; k += 2, w += 2 * width, ahead += kLineBytes) {
      if constexpr (M > 1) __builtin_prefetch(ahead, 0, 2);
      VecInt b[N];
      for (int j = 0; j < N; ++j) b[j] = *reinterpret_cast<const Pairs*>(w + 2 * j * kVec);
      for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) add_two(acc[i][j], b[j], numbers[i / 3] + i % 3 * ld);
      for (const char*& at : numbers) at += 4;
    }
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) {
        float* const sum = sums + (i * N + j) * kVec;
        store(sum, load(sum) + scales[i * x.blocks()] * __builtin_convertvector(acc[i][j], Vec));
      }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      const Vec init = load(to.init + i * to.ld_init + j * kVec);
      store(to.out + i * to.ld + j * kVec,
            init + (shifts[i] + load(scale + j * kVec) * load(sums + (i * N + j) * kVec)));
    }
}

void panel_of_sixteen(const SixteenRows& x, int64_t first, int64_t rows, const int16_t* w,
                      int64_t width, const float* scale, const Sums& to) {
  over_columns<false>(rows, width, [&]<int N>(int64_t at) S2S_LAMBDA {
    int64_t row = 0;
    Ahead ahead(w, (x.K + kCommon) / 2, 4 * width);
    over_rows<kRowsByBlock>(rows, [&]<int M>() S2S_LAMBDA {
      sixteen_tile<M, N>(x, first + row, w + 2 * at, width, scale + at, ahead.next(),
                         to.from(row, at));
      row += M;
    });
  });
}

}  // namespace
}  // namespace seq2seq_fast
