// A panel of int8 weights, or of six bits, in the instructions that multiply bytes. See loops.h.
//
// Sums of products of bytes are exact in 32 bits: every instruction set makes the same ones, for
// any number of rows together.
#pragma once
#include "panel_tiles.h"
#include "quantised_weights.h"
#include "sixteen_bits.h"

namespace seq2seq_fast {
namespace {

// acc += sum_i w[i] x[i] in each lane, over the four bytes of w and four digits.
S2S_INLINE void add_four(VecInt& acc, const VecInt& w, const int8_t* digits) {
  int32_t x;
  std::memcpy(&x, digits, sizeof x);
#if defined(S2S_VNNI) && S2S_LANES == 16
  acc = (VecInt)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(S2S_VNNI)
  acc = (VecInt)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, _mm256_set1_epi32(x));
#elif defined(S2S_INTRINSICS) && S2S_LANES == 16
  // Two products, of 255 * 64 at most, fit into 16 bits.
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)w, _mm512_set1_epi32(x));
  acc += (VecInt)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(S2S_INTRINSICS)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(x));
  acc += (VecInt)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(S2S_DOT)
  acc = (VecInt)vdotq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)vdupq_n_s32(x));
#else
  for (int i = 0; i < 4; ++i) acc += (w >> 8 * i & 255) * digits[i];
#endif
}

// M rows, of numbers of C digits, by N vectors of a panel's columns, of weights W.
template <typename W, int C, int M, int N>
S2S_INLINE void quantised_tile(const QuantisedRows& x, int64_t row, const uint8_t* w, int64_t width,
                               const float* scale, const char* ahead, const Sums& to) {
  const int8_t* digits = x.digits + row * C * x.ld;
  VecInt acc[M][C][N];
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[i][c][j] = W::offset(x.offsets[C * (row + i) + c]) + VecInt{};
  for (int64_t k = 0; k < x.K; k += 4, w += W::bytes(width), ahead += kLineBytes) {
    if constexpr (M > 1) __builtin_prefetch(ahead, 0, 2);
    VecInt b[N];
    W::load(w, b);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) add_four(acc[i][c][j], b[j], digits + (i * C + c) * x.ld + k);
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      Vec sum = __builtin_convertvector(acc[i][0][j], Vec);
      if constexpr (C == 2) sum = 128.f * sum + __builtin_convertvector(acc[i][1][j], Vec);
      const int64_t at = j * W::kApart;
      const Vec init = load(to.init + i * to.ld_init + at);
      store(to.out + i * to.ld + at, init + x.scales[row + i] * load(scale + at) * sum);
    }
}

// All rows by N vectors of a panel's columns, kMost rows at a time.
template <typename W, int C, int kMost, int N>
S2S_INLINE void quantised_rows(const QuantisedRows& x, int64_t first, int64_t rows,
                               const uint8_t* w, int64_t width, int64_t column, const float* scale,
                               const Sums& to) {
  int64_t row = 0;
  Ahead ahead(w, x.K / 4, W::bytes(width));
  over_rows<kMost>(rows, [&]<int M>() S2S_LAMBDA {
    quantised_tile<W, C, M, N>(x, first + row, w + 4 * column, width, scale + column, ahead.next(),
                               to.from(row, column));
    row += M;
  });
}

template <int C>
S2S_INLINE void quantised_panel_of(const QuantisedRows& x, int64_t first, int64_t rows,
                                   const uint8_t* w, int64_t width, const float* scale,
                                   const Sums& to) {
  constexpr int kMost = (kRegisters == 32 ? 6 : 4) / C;
  over_columns<false>(rows, width, [&]<int N>(int64_t at) S2S_LAMBDA {
    quantised_rows<EightBits, C, kMost, N>(x, first, rows, w, width, at, scale, to);
  });
}

void quantised_panel(const QuantisedRows& x, int64_t first, int64_t rows, const uint8_t* w,
                     int64_t width, const float* scale, const Sums& to) {
  x.count == 2 ? quantised_panel_of<2>(x, first, rows, w, width, scale, to)
               : quantised_panel_of<1>(x, first, rows, w, width, scale, to);
}

void panel_of_six(const QuantisedRows& x, int64_t first, int64_t rows, const uint8_t* w,
                  const float* scale, const Sums& to) {
  constexpr int kMost = kRegisters == 32 ? 4 : 2;
  for (int64_t at = 0; at < kBlock; at += kVec)
    quantised_rows<SixBits, 1, kMost, kBlocks>(x, first, rows, w, kPanel, at, scale, to);
}

// Instructions that add two products in 16 bits take digits of 7 bits.
#if defined(S2S_VNNI) || defined(S2S_DOT)
constexpr float kDigit = 127;
#else
constexpr float kDigit = 64;
#endif
#if defined(S2S_INTRINSICS) || defined(S2S_DOT) || defined(S2S_SANITIZE)
constexpr bool kSeek = true;  // there is no other under the sanitizers
#else
constexpr bool kSeek = false;
#endif
// Of sixteen lanes two instructions multiply and add no more than one does floats; NEON's multiply
// as few.
#if (defined(S2S_INTRINSICS) && (defined(S2S_VNNI) || S2S_LANES == 8)) || defined(S2S_SANITIZE)
constexpr bool kSixteenBits = true;
#else
constexpr bool kSixteenBits = false;
#endif
constexpr Bytes kBytes = {quantised_panel, panel_of_six,     kDigit,
                          kSeek,           panel_of_sixteen, kSixteenBits};

}  // namespace
}  // namespace seq2seq_fast
