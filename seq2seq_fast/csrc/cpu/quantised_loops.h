// The inner loops of quantising rows. See loops.h.
#pragma once
#include "quantised_weights.h"
#include "scores_loops.h"

namespace seq2seq_fast {
namespace {

typedef int8_t VecByte __attribute__((vector_size(S2S_LANES), aligned(1), may_alias));
typedef int16_t VecShort __attribute__((vector_size(2 * S2S_LANES), aligned(2), may_alias));

// The second and the third of each four numbers change places. K is a multiple of 4.
S2S_INLINE void even_before_odd(int16_t* numbers, int64_t K) {
  for (int64_t k = 0; k < K; k += 4) {
    uint64_t four;
    std::memcpy(&four, numbers + k, sizeof four);
    four = (four & 0xffff00000000ffff) | (four & 0xffff0000) << 16 | (four >> 16 & 0xffff0000);
    std::memcpy(numbers + k, &four, sizeof four);
  }
}

// Rounds one row to whole numbers, and those to digits. A row that is not finite becomes zeros with
// NaN for a scale and for norms. kWhole: QuantisedRows::pairs.
template <int kCount, bool kWhole>
S2S_INLINE void quantise_to(const Operand* operands, int64_t row, const QuantisedRows& to) {
  constexpr float kRound = 12582912.f;  // adding 1.5 * 2^23 rounds
  float top = 1e-30f;                   // above zero, and of a reciprocal that is finite
  for (int s = 0; s < kOperands; ++s) {
    const float most = largest(operands[s].x + row * operands[s].ld, operands[s].K);
    top = top < most || most != most ? most : top;
  }
  int8_t* const digits = to.digits + row * kCount * to.ld;   // the high ones, then the low ones
  auto* const numbers = reinterpret_cast<int16_t*>(digits);  // in place of both
  Vec squares[2] = {};
  if (top < INFINITY) {
    const float inverse = to.most / top;
    int64_t at = 0;
    for (int s = 0; s < kOperands; ++s) {
      const int64_t K = operands[s].K;
      const float* x = operands[s].x + row * operands[s].ld;
      for (int64_t k = 0; k < K; k += kVec) {
        const Vec scaled = load_some(x + k, K - k) * inverse;
        const Vec rounded = (scaled + kRound) - kRound, taken = scaled - rounded;
        squares[0] += scaled * scaled, squares[1] += taken * taken;
        const VecInt whole = __builtin_convertvector(rounded, VecInt);
        if constexpr (kWhole) {
          *reinterpret_cast<VecShort*>(numbers + at + k) = __builtin_convertvector(whole, VecShort);
          continue;
        }
        VecInt digit[kCount] = {whole};
        if constexpr (kCount == 2) {
          digit[0] = (whole + 64) >> 7;
          digit[1] = whole - (digit[0] << 7);
        }
        for (int i = 0; i < kCount; ++i)
          *reinterpret_cast<VecByte*>(digits + i * to.ld + at + k) =
              __builtin_convertvector(digit[i], VecByte);
      }
      at += K;
    }
    if constexpr (kWhole) {
      std::memset(numbers + at, 0, 4 * sizeof *numbers);
      even_before_odd(numbers, to.K);
    } else {
      for (int i = 0; i < kCount; ++i) std::memset(digits + i * to.ld + at, 0, 4);
    }
  } else {
    std::memset(digits, 0, kCount * to.ld);
    top = NAN;
  }
  const float scale = to.scales[row] = top / to.most;
  int32_t* offsets = to.offsets + row * to.parts() * kCount;
  for (int64_t k = 0, parts = to.parts(), next; parts > 0; --parts, k = next, offsets += kCount) {
    next = parts > 1 ? k + kTwoDigitsPart : to.K;
    for (int i = 0; i < (kWhole ? 1 : kCount); ++i) {
      int32_t total = 0;
      for (int64_t j = k; j < next; ++j) total += kWhole ? numbers[j] : digits[i * to.ld + j];
      offsets[i] = -128 * total;
    }
  }
  for (int i = 0; i < 2; ++i) to.norms[2 * row + i] = scale * __builtin_sqrtf(sum(squares[i]));
}

void quantise(const Operand* operands, int64_t row, const QuantisedRows& to) {
  if (to.count == 1) return quantise_to<1, false>(operands, row, to);
  to.pairs ? quantise_to<2, true>(operands, row, to) : quantise_to<2, false>(operands, row, to);
}

// A block of a row's numbers, from the k-th on, that lie in several operands: zeros behind them.
S2S_INLINE void gather_block(const Operand* operands, int64_t row, int64_t k, float* out) {
  std::memset(out, 0, kSixteenBlock * sizeof(float));
  int64_t first = 0;  // of an operand's numbers
  for (int s = 0; s < kOperands; ++s) {
    const int64_t K = operands[s].K, from = std::max(k, first),
                  to = std::min(k + kSixteenBlock, first + K);
    if (from < to)
      std::memcpy(out + (from - k), operands[s].x + row * operands[s].ld + (from - first),
                  sizeof(float) * (to - from));
    first += K;
  }
}

// Rounds a block of numbers, and returns their scale: NaN where they are not finite. Adds to
// products the squares of the numbers, and what rounding has taken times them.
S2S_INLINE float round_block(const float* x, int16_t* numbers, double products[2]) {
  constexpr float kRound = 12582912.f;  // adding 1.5 * 2^23 rounds
  float top = largest(x, kSixteenBlock);
  if (!(top < INFINITY)) {
    std::memset(numbers, 0, kSixteenBlock * sizeof *numbers);
    return NAN;
  }
  // Above zero, and of a reciprocal that is finite: numbers far below it are nothing.
  top = top <= 1e-30f ? 1e-30f : top;
  Vec sums[2] = {};
  for (int64_t i = 0; i < kSixteenBlock; i += kVec) {
    const Vec y = load(x + i) / top;
    sums[0] += y * y;
  }
  const float length = __builtin_sqrtf(sum(sums[0]));
  const float unit = length * kSixteen <= kSixteenLength ? kSixteen : kSixteenLength / length;
  for (int64_t i = 0; i < kSixteenBlock; i += kVec) {
    const Vec scaled = load(x + i) / top * unit, rounded = (scaled + kRound) - kRound;
    sums[1] += (scaled - rounded) * scaled;
    *reinterpret_cast<VecShort*>(numbers + i) =
        __builtin_convertvector(__builtin_convertvector(rounded, VecInt), VecShort);
  }
  const double scale = double{top} / unit;
  products[0] += double{top} * top * sum(sums[0]), products[1] += scale * scale * sum(sums[1]);
  return static_cast<float>(scale);
}

// A row that is not finite has NaN for scales and norms. Probable tokens are those whose weights
// lie along x: what rounding takes is made orthogonal to it, by scales that are a little larger.
void quantise_sixteen(const Operand* operands, int64_t row, const SixteenRows& to) {
  alignas(64) float block[kSixteenBlock], common[kSixteenBlock] = {};
  constexpr int64_t kParts = kCommon / kVec;
  int16_t* const numbers = to.numbers + row * to.ld;
  float* const scales = to.scales + row * to.blocks();
  const int64_t K = to.ld - kSixteenBlock;
  double products[2] = {}, none[2];
  for (int64_t k = 0; k < K; k += kSixteenBlock) {
    gather_block(operands, row, k, block);
    scales[k / kSixteenBlock] = round_block(block, numbers + k, products);
  }
  const double found = products[0] - products[1];  // x times its whole numbers
  const float larger = found > 0 ? static_cast<float>(products[1] / found) : 0.f;
  double shift = 0, taken = 0;
  Vec sums[kParts] = {};
  for (int64_t k = 0; k < K; k += kSixteenBlock) {
    gather_block(operands, row, k, block);
    float& scale = scales[k / kSixteenBlock];
    scale += larger * scale;
    Vec of_mean = {}, squares = {};
    for (int64_t i = 0; i < kSixteenBlock; i += kVec) {
      const Vec x = load(block + i);
      of_mean += x * load(to.mean + k + i);
      const auto whole = *reinterpret_cast<const VecShort*>(numbers + k + i);
      const Vec rest =
          x - scale * __builtin_convertvector(__builtin_convertvector(whole, VecInt), Vec);
      squares += rest / scale * (rest / scale);
      store(block + i, rest);
    }
    shift += sum(of_mean), taken += double{scale} * scale * sum(squares);
    const float* directions = to.directions + k * kCommon;
    for (int64_t i = 0; i < kSixteenBlock; ++i, directions += kCommon)
      for (int p = 0; p < kParts; ++p) sums[p] += block[i] * load(directions + p * kVec);
  }
  for (int p = 0; p < kParts; ++p) store(common + p * kVec, sums[p]);
  scales[K / kSixteenBlock] = round_block(common, numbers + K, none);
  to.shifts[row] = static_cast<float>(shift);
  to.norms[2 * row] = static_cast<float>(__builtin_sqrt(products[0]));
  to.norms[2 * row + 1] = static_cast<float>(__builtin_sqrt(taken));
  if (!(found >= 0)) std::fill_n(to.norms + 2 * row, 2, NAN);
}

// Columns that are not finite become zeros with NaN for a scale and for norms.
void to_bytes(const float* x, int64_t n, int64_t width, uint8_t* out, float* scales, float* taken,
              float* norms) {
  constexpr float kRound = 12582912.f;  // adding 1.5 * 2^23 rounds
  for (int64_t j = 0; j < width; j += kVec) {
    Vec top = 1e-30f + Vec{}, squares[2] = {};
    for (int64_t i = 0; i < n; ++i) {
      const Vec size = magnitude(load(x + i * width + j));
      top = size <= top ? top : size;  // a NaN stays
    }
    const VecInt finite = top < INFINITY;
    const Vec inverse = finite ? 127.f / top : Vec{}, scale = finite ? top / 127.f : NAN + Vec{};
    for (int64_t i = 0; i < n; i += 4) {
      VecInt four = {};
      for (int64_t k = 0; k < 4; ++k) {
        Vec rounded = {};
        if (i + k < n) {
          const Vec y = load(x + (i + k) * width + j), scaled = finite ? y * inverse : Vec{};
          rounded = (scaled + kRound) - kRound;
          squares[0] += (scaled - rounded) * (scaled - rounded), squares[1] += rounded * rounded;
        }
        four |= (__builtin_convertvector(rounded, VecInt) + 128) << 8 * k;
      }
      std::memcpy(out + i * width + 4 * j, &four, sizeof four);
    }
    store(scales + j, scale), store(taken + j, squares[0]), store(norms + j, squares[1]);
  }
  for (int64_t j = 0; j < width; ++j) {
    taken[j] = scales[j] * __builtin_sqrtf(taken[j]);
    norms[j] = scales[j] * __builtin_sqrtf(norms[j]);
  }
}

void six_to_eight(const uint8_t* w, int64_t fours, uint8_t* out) {
  const uint8_t* behind = w + fours * SixBits::bytes(kPanel);  // which is unpacked next
  for (int64_t k = 0; k < fours;
       ++k, w += SixBits::bytes(kPanel), out += EightBits::bytes(kPanel)) {
    for (int64_t part = 0; part < 3; ++part, behind += kPanel) __builtin_prefetch(behind, 0, 2);
    for (int64_t at = 0; at < kBlock; at += kVec) {
      VecInt b[kBlocks];
      SixBits::load(w + 4 * at, b);
      for (int j = 0; j < kBlocks; ++j) {
        b[j] += four_times(128 - 32);
        std::memcpy(out + 4 * (at + j * kBlock), &b[j], sizeof b[j]);
      }
    }
  }
}

}  // namespace
}  // namespace seq2seq_fast
