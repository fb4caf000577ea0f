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

// Whether numbers of two digits lie in 16 bits, see QuantisedRows.
#if defined(S2S_VNNI) || defined(S2S_DOT)
constexpr bool kPairs = false;
#else
constexpr bool kPairs = true;
#endif

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

// Some of K, from the first on: rows of numbers, and of bytes of a panel's columns.
struct Part {
  int64_t K;
  const int8_t* digits;
  const int32_t* offsets;
  int64_t ld, ld_offsets;  // from one row to the next
  const uint8_t* w;
  const char* ahead;
};

// sums = products of M rows, of numbers of C digits, and N vectors of columns, of weights W.
template <typename W, int C, int M, int N>
S2S_INLINE void digit_products(Part x, int64_t width, VecInt (&sums)[M][N]) {
  VecInt acc[M][C][N];
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j)
        acc[i][c][j] = W::offset(x.offsets[i * x.ld_offsets + c]) + VecInt{};
  for (int64_t k = 0; k < x.K; k += 4, x.w += W::bytes(width), x.ahead += kLineBytes) {
    if constexpr (M > 1) __builtin_prefetch(x.ahead, 0, 2);
    VecInt b[N];
    W::load(x.w, b);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j)
          add_four(acc[i][c][j], b[j], x.digits + (i * C + c) * (x.ld / C) + k);
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j)
      sums[i][j] = C == 2 ? (acc[i][0][j] << 7) + acc[i][C - 1][j] : acc[i][0][j];
}

typedef uint16_t VecPairs __attribute__((vector_size(4 * S2S_LANES)));

// Of each lane's four bytes the even ones, or the odd ones, in 16 bits each.
S2S_INLINE VecInt half_of_four(const uint8_t* w, bool odd) {
  const VecInt b = four_bytes(w);
  return odd ? (VecInt)((VecPairs)b >> 8) : b & 0x00ff00ff;
}

// The same of numbers that lie in 16 bits.
template <int M, int N>
S2S_INLINE void pair_products(Part x, int64_t width, VecInt (&sums)[M][N]) {
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sums[i][j] = x.offsets[i * x.ld_offsets] + VecInt{};
  for (int64_t k = 0; k < x.K; k += 4, x.w += EightBits::bytes(width), x.ahead += kLineBytes) {
    if constexpr (M > 1) __builtin_prefetch(x.ahead, 0, 2);
    const int8_t* numbers = x.digits + 2 * k;
    if constexpr (M == 1) {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j)
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd)
          add_two(sums[0][j], half_of_four(x.w + 4 * j * kVec, odd), numbers + 4 * odd);
      continue;
    }
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      VecInt b[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) b[j] = half_of_four(x.w + 4 * j * kVec, odd);
#pragma GCC unroll 6
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) add_two(sums[i][j], b[j], numbers + i * x.ld + 4 * odd);
    }
  }
}

constexpr int64_t kManyRows = 16;  // that pay for taking columns apart first

// A part's N vectors of columns, the even rows of each four and then the odd ones.
template <int N>
S2S_INLINE void take_apart(Part x, int64_t width, int16_t* out) {
  for (int64_t k = 0; k < x.K; k += 4, x.w += EightBits::bytes(width), x.ahead += kLineBytes) {
    __builtin_prefetch(x.ahead, 0, 2);
    for (const bool odd : {false, true})
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j, out += 2 * kVec)
        *reinterpret_cast<Pairs*>(out) = half_of_four(x.w + 4 * j * kVec, odd);
  }
}

// Products of M rows of a part, from `row` on, and columns that were taken apart.
template <int M, int N>
S2S_INLINE void apart_products(const Part& x, int64_t row, const int16_t* w, VecInt (&sums)[M][N]) {
  const int8_t* numbers = x.digits + row * x.ld;
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) sums[i][j] = x.offsets[(row + i) * x.ld_offsets] + VecInt{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < x.K; k += 2, w += 2 * N * kVec, numbers += 4) {
    VecInt b[N];
    for (int j = 0; j < N; ++j) b[j] = *reinterpret_cast<const Pairs*>(w + 2 * j * kVec);
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) add_two(sums[i][j], b[j], numbers + i * x.ld);
  }
}

// out = init + sums with their scales, of M rows from `row` on.
template <typename W, int M, int N>
S2S_INLINE void scale_sums(const QuantisedRows& x, int64_t row, const VecInt (&sums)[M][N],
                           const float* scale, const Sums& to) {
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const int64_t at = W::at(j);
      const Vec sum = __builtin_convertvector(sums[i][j], Vec);
      const Vec init = load(to.init + i * to.ld_init + at);
      store(to.out + i * to.ld + at, init + x.scales[row + i] * load(scale + at) * sum);
    }
}

// Calls f(part of K, sums that its own are added to) for every part, of rows from `row` on.
template <typename W, int C, typename F>
S2S_INLINE void over_parts(const QuantisedRows& x, int64_t row, const uint8_t* w, int64_t width,
                           const char* ahead, Sums to, F f) {
  const int64_t parts = C == 2 ? x.parts() : 1;
  Part part = {x.K,  x.digits + row * C * x.ld, x.offsets + row * C * parts, C * x.ld, C * parts, w,
               ahead};
  for (int64_t left = x.K, p = 0; p < parts; ++p) {
    if (C == 2) part.K = std::min(kTwoDigitsPart, left);
    f(part, to);
    if constexpr (C == 2) {
      left -= kTwoDigitsPart;
      to.init = to.out, to.ld_init = to.ld;
      part.digits += kPairs ? 2 * kTwoDigitsPart : kTwoDigitsPart;
      part.offsets += C;
      part.w += kTwoDigitsPart / 4 * W::bytes(width), part.ahead += kTwoDigitsPart / 4 * kLineBytes;
    }
  }
}

// All rows by N vectors of a panel's columns, kMost rows at a time, of numbers of C digits and
// weights W.
template <typename W, int C, int kMost, int N>
S2S_INLINE void quantised_rows(const QuantisedRows& x, int64_t first, int64_t rows,
                               const uint8_t* w, int64_t width, const float* scale,
                               const Sums& to) {
  int64_t row = 0;
  Ahead ahead(w, x.K / 4, W::bytes(width));
  over_rows<kMost>(rows, [&]<int M>() S2S_LAMBDA {
    const auto products = [&](const Part& part, const Sums& sums_to) S2S_LAMBDA {
      VecInt sums[M][N];
      if constexpr (C == 2 && kPairs)
        pair_products<M, N>(part, width, sums);
      else
        digit_products<W, C, M, N>(part, width, sums);
      scale_sums<W, M, N>(x, first + row, sums, scale, sums_to);
    };
    over_parts<W, C>(x, first + row, w, width, ahead.next(), to.from(row, 0), products);
    row += M;
  });
}

// The same of many rows, with numbers in 16 bits: columns are taken apart once for all of them.
template <int N>
S2S_INLINE void pairs_of_many_rows(const QuantisedRows& x, int64_t first, int64_t rows,
                                   const uint8_t* w, int64_t width, const float* scale,
                                   const Sums& to) {
  alignas(64) int16_t apart[kTwoDigitsPart * N * kVec];
  Ahead ahead(w, x.K / 4, EightBits::bytes(width));
  const auto products = [&](const Part& part, const Sums& sums_to) S2S_LAMBDA {
    take_apart<N>(part, width, apart);
    int64_t row = 0;
    over_rows<kRowsByBlock>(rows, [&]<int M>() S2S_LAMBDA {
      VecInt sums[M][N];
      apart_products<M, N>(part, row, apart, sums);
      scale_sums<EightBits, M, N>(x, first + row, sums, scale, sums_to.from(row, 0));
      row += M;
    });
  };
  over_parts<EightBits, 2>(x, first, w, width, ahead.next(), to, products);
}

// One row reads a panel from its begin to its end where there are registers for that.
template <int C>
S2S_INLINE void quantised_panel_of(const QuantisedRows& x, int64_t first, int64_t rows,
                                   const uint8_t* w, int64_t width, const float* scale,
                                   const Sums& to) {
  constexpr bool kWhole = C == 2 && kPairs;
  constexpr int kMost = kWhole ? (kRegisters == 32 ? 5 : 3) : (kRegisters == 32 ? 6 : 4) / C;
  over_columns<C == 1 || kWhole>(rows, width, [&]<int N>(int64_t at) S2S_LAMBDA {
    if constexpr (kWhole && kVec == 8 && N == 2) {
      if (rows >= kManyRows)
        return pairs_of_many_rows<N>(x, first, rows, w + 4 * at, width, scale + at, to.from(0, at));
    }
    quantised_rows<EightBits, C, kMost, N>(x, first, rows, w + 4 * at, width, scale + at,
                                           to.from(0, at));
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
  if constexpr (kVec == 8) {
    if (rows == 1)
      return quantised_rows<SixBits, 1, 1, 2 * kBlocks>(x, first, rows, w, kPanel, scale, to);
  }
  for (int64_t at = 0; at < kBlock; at += kVec)
    quantised_rows<SixBits, 1, kMost, kBlocks>(x, first, rows, w + 4 * at, kPanel, scale + at,
                                               to.from(0, at));
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
constexpr Bytes kBytes = {quantised_panel, panel_of_six,     kPairs,      kDigit,
                          kSeek,           panel_of_sixteen, kSixteenBits};

}  // namespace
}  // namespace seq2seq_fast
