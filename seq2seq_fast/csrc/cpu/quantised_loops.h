// The inner loops of quantising rows. See loops.h.
#pragma once
#include "scores_loops.h"

namespace seq2seq_fast {
namespace {

typedef int8_t VecByte __attribute__((vector_size(S2S_LANES), aligned(1), may_alias));

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

}  // namespace
}  // namespace seq2seq_fast
