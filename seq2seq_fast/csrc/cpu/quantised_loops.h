// The inner loops of products with int8 weights. See loops.h.
//
// Sums of products of bytes are exact in 32 bits: every instruction set makes the same ones, for
// any number of rows together.
#pragma once
#include "packed_loops.h"
#include "scores_loops.h"

namespace seq2seq_fast {
namespace {

typedef int8_t VecByte __attribute__((vector_size(S2S_LANES), aligned(1), may_alias));

// acc += sum_i w[i] x[i] in each lane, over the four unsigned bytes of w and four digits.
S2S_INLINE void add_four(VecInt& acc, const VecInt& w, const int8_t* digits) {
  int32_t x;
  std::memcpy(&x, digits, sizeof x);
#if defined(S2S_VNNI)
  acc = (VecInt)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(S2S_INTRINSICS) && S2S_LANES == 16
  // Two products, of 255 * 64 at most, fit into 16 bits.
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)w, _mm512_set1_epi32(x));
  acc += (VecInt)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(S2S_INTRINSICS)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(x));
  acc += (VecInt)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  for (int i = 0; i < 4; ++i) acc += (w >> 8 * i & 255) * digits[i];
#endif
}

S2S_INLINE int32_t sum(const VecInt& x) {
  int32_t total = 0;
  for (int i = 0; i < kVec; ++i) total += x[i];
  return total;
}

// Rounds one row to whole numbers, and those to digits. A row that is not finite becomes zeros with
// NaN for a scale.
void quantise(const Operand* operands, int64_t row, const QuantisedRows& to) {
  constexpr float kMost = 8191.f, kRound = 12582912.f;  // adding 1.5 * 2^23 rounds
  float top = 1e-30f;  // above zero, and of a reciprocal that is finite
  for (int s = 0; s < kOperands; ++s) {
    const float most = largest(operands[s].x + row * operands[s].ld, operands[s].K);
    top = top < most || most != most ? most : top;
  }
  int8_t *high = to.digits + row * 2 * to.ld, *low = high + to.ld;
  VecInt sums[2] = {};
  if (top < INFINITY) {
    const float inverse = kMost / top;
    for (int s = 0; s < kOperands; ++s) {
      const int64_t K = operands[s].K;
      const float* x = operands[s].x + row * operands[s].ld;
      for (int64_t k = 0; k < K; k += kVec) {
        const Vec scaled = load_some(x + k, K - k) * inverse;
        const VecInt whole = __builtin_convertvector((scaled + kRound) - kRound, VecInt);
        const VecInt digit = (whole + 64) >> 7, rest = whole - (digit << 7);
        *reinterpret_cast<VecByte*>(high + k) = __builtin_convertvector(digit, VecByte);
        *reinterpret_cast<VecByte*>(low + k) = __builtin_convertvector(rest, VecByte);
        sums[0] += digit, sums[1] += rest;
      }
      high += K, low += K;
    }
    std::memset(high, 0, 4), std::memset(low, 0, 4);
  } else {
    std::memset(high, 0, 2 * to.ld);
    top = NAN;
  }
  to.scales[row] = top / kMost;
  for (int i = 0; i < 2; ++i) to.offsets[2 * row + i] = -128 * sum(sums[i]);
}

// M rows by N vectors of a panel's columns.
template <int M, int N>
S2S_INLINE void quantised_tile(const QuantisedRows& x, int64_t row, const uint8_t* w, int64_t width,
                               const float* scale, const char* ahead, float* out, int64_t ldo) {
  const int8_t* digits = x.digits + row * 2 * x.ld;
  VecInt high[M][N], low[M][N];
#pragma GCC unroll 3
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      high[i][j] = x.offsets[2 * (row + i)] + VecInt{};
      low[i][j] = x.offsets[2 * (row + i) + 1] + VecInt{};
    }
  for (int64_t k = 0; k < x.K; k += 4, w += 4 * width, ahead += kLineBytes) {
    if constexpr (M > 1) __builtin_prefetch(ahead, 0, 2);
    VecInt b[N];
    for (int j = 0; j < N; ++j) std::memcpy(&b[j], w + 4 * j * kVec, sizeof b[j]);
    for (int i = 0; i < M; ++i) {
      const int8_t* four = digits + i * 2 * x.ld + k;
      for (int j = 0; j < N; ++j) add_four(high[i][j], b[j], four);
      for (int j = 0; j < N; ++j) add_four(low[i][j], b[j], four + x.ld);
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      float* to = out + i * ldo + j * kVec;
      const Vec sum = 128.f * __builtin_convertvector(high[i][j], Vec) +
                      __builtin_convertvector(low[i][j], Vec);
      store(to, load(to) + x.scales[row + i] * load(scale + j * kVec) * sum);
    }
}

void quantised_panel(const QuantisedRows& x, int64_t first, int64_t rows, const uint8_t* w,
                     int64_t width, const float* scale, float* out, int64_t ldo) {
  constexpr int kMost = kVec == 16 ? 3 : 2;
  over_columns(rows, width, [&]<int N>(int64_t at) S2S_LAMBDA {
    int64_t row = 0;
    Ahead ahead(w, x.K / 4, 4 * width);
    over_rows<kMost>(rows, [&]<int M>() S2S_LAMBDA {
      quantised_tile<M, N>(x, first + row, w + 4 * at, width, scale + at, ahead.next(),
                           out + row * ldo + at, ldo);
      row += M;
    });
  });
}

}  // namespace
}  // namespace seq2seq_fast
