// The inner loops of products with packed weights, and of choosing among logits. See loops.h.
#pragma once
#include "panel_tiles.h"

namespace seq2seq_fast {
namespace {

typedef uint16_t VecHalf __attribute__((vector_size(2 * S2S_LANES), aligned(2), may_alias));

S2S_INLINE Vec load_weights(const float* p) { return load(p); }
S2S_INLINE Vec load_weights(const uint16_t* p) {  // bfloat16, the upper half of a float
  // By name, since GCC converts halves of a vector and puts them together.
#if defined(S2S_INTRINSICS) && S2S_LANES == 16
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const VecInt bits = (VecInt)_mm512_cvtepu16_epi32(halves) << 16;
#elif defined(S2S_INTRINSICS)
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const VecInt bits = (VecInt)_mm256_cvtepu16_epi32(halves) << 16;
#else
  const VecInt bits = __builtin_convertvector(*reinterpret_cast<const VecHalf*>(p), VecInt) << 16;
#endif
  Vec x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// M rows by N vectors of a panel's columns. Every result is one sum in the order of k, so that it
// does not depend on M: a row is multiplied alike whatever stands beside it. Where several rows
// share what is read, a line for each k is asked for from `ahead` on, into the second level; two
// of AVX2 read faster unasked.
template <typename W, int M, int N>
S2S_INLINE void packed_tile(const Operand* operands, int64_t row, const W* w, int64_t width,
                            const char* ahead, const Sums& to) {
  Vec acc[M][N] = {};
  for (int s = 0; s < kOperands; ++s) {
    const int64_t ld = operands[s].ld, K = operands[s].K;
    const float* x = operands[s].x + row * ld;
#pragma GCC unroll 4
    for (int64_t k = 0; k < K; ++k, w += width, ahead += kLineBytes) {
      if constexpr (M > (kVec == 8 ? 2 : 1)) __builtin_prefetch(ahead, 0, 2);
      Vec b[N];
      for (int j = 0; j < N; ++j) b[j] = load_weights(w + j * kVec);
      for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) acc[i][j] += x[i * ld + k] * b[j];
    }
  }
  // Sums that the compiler has to find by their number would all lie in memory.
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const Vec init = load(to.init + i * to.ld_init + j * kVec);
      store(to.out + i * to.ld + j * kVec, init + acc[i][j]);
    }
}

template <typename W>
S2S_INLINE void packed_panel_of(const Operand* operands, int64_t first, int64_t rows, const W* w,
                                int64_t width, const Sums& to) {
  int64_t K = 0;
  for (int s = 0; s < kOperands; ++s) K += operands[s].K;
  // In AVX2 a sum waits for its last addition unless there are eight.
  constexpr bool wide = kVec == 8;
  over_columns<wide>(rows, width, [&]<int N>(int64_t at) S2S_LAMBDA {
    int64_t row = 0;
    Ahead ahead(w, K, width * sizeof(W), to.soon);
    constexpr int kMost = N > 4 ? 1 : wide && N == 4 ? 2 : kRowsByBlock;
    over_rows<kMost>(rows, [&]<int M>() S2S_LAMBDA {
      packed_tile<W, M, N>(operands, first + row, w + at, width, ahead.next(), to.from(row, at));
      row += M;
    });
  });
}

void unpack(const uint16_t* w, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kVec) store(out + i, load_weights(w + i));
}

void packed_panel(const Operand* operands, int64_t first, int64_t rows, const float* w,
                  int64_t width, const Sums& to) {
  packed_panel_of(operands, first, rows, w, width, to);
}
void packed_panel_half(const Operand* operands, int64_t first, int64_t rows, const uint16_t* w,
                       int64_t width, const Sums& to) {
  packed_panel_of(operands, first, rows, w, width, to);
}

S2S_INLINE float one_weight(float w) { return w; }
S2S_INLINE float one_weight(uint16_t w) {
  const uint32_t bits = uint32_t{w} << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// acc + x w, rounded once where the compiler makes vectors' multiplications and additions one. By
// name, since it parts them where it finds several steps of such a sum to multiply at once.
S2S_INLINE float add_product(float acc, float x, float w) {
#if defined(S2S_INTRINSICS) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(x, w, acc);
#else
  return acc + x * w;
#endif
}

#if S2S_LANES == 16

S2S_INLINE Four four_weights(const float* w) { return *reinterpret_cast<const Four*>(w); }
S2S_INLINE Four four_weights(const uint16_t* w) {
  __m128i bits;
  std::memcpy(&bits, w, 8);
  return (Four)_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16);
}

// Of kVec N rows, N of 1 or 2: a lane has a row, and lanes' sums wait each for its last addition.
template <int N, typename W>
S2S_INLINE void dots_together(const Operand* operands, int64_t row, const W* w, int64_t ld,
                              const int32_t* places, int64_t n, const float* bias, float* out) {
  constexpr int kRowsOfW = N * static_cast<int>(kVec);
  const auto place = [&](int64_t i) { return places[i < n ? i : n - 1]; };
  const W* from[kRowsOfW];
  for (int i = 0; i < kRowsOfW; ++i) from[i] = w + place(i) * ld;
  int64_t ahead[kRowsOfW];  // the next ones' weights are on their way meanwhile
  for (int i = 0; i < kRowsOfW; ++i) ahead[i] = w + place(kRowsOfW + i) * ld - from[i];
  Vec acc[N] = {};
  for (int s = 0; s < kOperands; ++s) {
    const int64_t K = operands[s].K;
    const float* x = operands[s].x + row * operands[s].ld;
    for (int64_t k = 0; k < K; k += 4) {
      if (n > kRowsOfW && k % (kLineBytes / static_cast<int64_t>(sizeof(W))) == 0)
        for (int i = 0; i < kRowsOfW; ++i) __builtin_prefetch(from[i] + ahead[i] + k);
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) {
        const auto add = [&](int64_t at, const Vec& column) S2S_LAMBDA {
          acc[j] = (Vec)_mm512_fmadd_ps(_mm512_set1_ps(x[at]), (__m512)column, (__m512)acc[j]);
        };
        if (K - k >= 4) {
          Vec columns[4];
          four_columns([&](int i) S2S_LAMBDA { return four_weights(from[j * kVec + i] + k); },
                       columns);
#pragma GCC unroll 4
          for (int c = 0; c < 4; ++c) add(k + c, columns[c]);
        } else {
          for (int64_t at = k; at < K; ++at) {
            Vec column;
            for (int i = 0; i < kVec; ++i) column[i] = one_weight(from[j * kVec + i][at]);
            add(at, column);
          }
        }
      }
    }
    for (int i = 0; i < kRowsOfW; ++i) from[i] += K;
  }
  for (int64_t i = 0; i < std::min<int64_t>(n, kRowsOfW); ++i)
    out[i] = bias[places[i]] + acc[i / kVec][i % kVec];
}

template <typename W>
S2S_INLINE void dots_of(const Operand* operands, int64_t row, const W* w, int64_t ld,
                        const int32_t* places, int64_t n, const float* bias, float* out) {
  int64_t i = 0;
  for (; n - i > kVec; i += 2 * kVec)
    dots_together<2>(operands, row, w, ld, places + i, n - i, bias, out + i);
  if (i < n) dots_together<1>(operands, row, w, ld, places + i, n - i, bias, out + i);
}

#else

// kTogether sums at a time, as each waits for its own last addition.
template <typename W>
S2S_INLINE void dots_of(const Operand* operands, int64_t row, const W* w, int64_t ld,
                        const int32_t* places, int64_t n, const float* bias, float* out) {
  constexpr int kTogether = 8;
  for (int64_t first = 0; first < n; first += kTogether) {
    const W* from[kTogether];
    float acc[kTogether] = {};
    const auto place = [&](int i) { return places[first + i < n ? first + i : n - 1]; };
    for (int i = 0; i < kTogether; ++i) from[i] = w + place(i) * ld;
    for (int s = 0; s < kOperands; ++s) {
      const int64_t K = operands[s].K;
      const float* x = operands[s].x + row * operands[s].ld;
      for (int64_t k = 0; k < K; ++k)
        for (int i = 0; i < kTogether; ++i)
          acc[i] = add_product(acc[i], x[k], one_weight(from[i][k]));
      for (int i = 0; i < kTogether; ++i) from[i] += K;
    }
    for (int i = 0; i < kTogether && first + i < n; ++i) out[first + i] = bias[place(i)] + acc[i];
  }
}

#endif

void dots(const Operand* operands, int64_t row, const float* w, int64_t ld, const int32_t* places,
          int64_t n, const float* bias, float* out) {
  dots_of(operands, row, w, ld, places, n, bias, out);
}
void dots_half(const Operand* operands, int64_t row, const uint16_t* w, int64_t ld,
               const int32_t* places, int64_t n, const float* bias, float* out) {
  dots_of(operands, row, w, ld, places, n, bias, out);
}

// One row of w after the other, a vector of its numbers at a time.
template <typename W>
S2S_INLINE float excess_of(const Operand* operands, int64_t row, const W* w, int64_t ld,
                           const int32_t* places, int64_t n, const float* bias, const float* near,
                           float top) {
  constexpr int kTogether = 4;  // so that a sum need not wait for its last addition
  Vec total = {};
  for (int64_t first = 0; first < n; first += kVec) {
    const int64_t lanes = std::min(kVec, n - first);
    Vec exact = {}, rounded = {};
    for (int64_t i = 0; i < lanes; ++i) {
      const int64_t place = places[first + i], next = places[std::min(first + i + 1, n - 1)];
      const W* from = w + place * ld;
      for (int64_t k = 0; k < ld; k += kLineBytes / static_cast<int64_t>(sizeof(W)))
        __builtin_prefetch(w + next * ld + k);
      Vec acc[kTogether] = {};
      float rest = 0;
      for (int s = 0; s < kOperands; ++s) {
        const int64_t K = operands[s].K;
        const float* x = operands[s].x + row * operands[s].ld;
        int64_t k = 0;
        for (; k + kTogether * kVec <= K; k += kTogether * kVec)
#pragma GCC unroll 4
          for (int j = 0; j < kTogether; ++j)
            acc[j] += load(x + k + j * kVec) * load_weights(from + k + j * kVec);
        for (; k + kVec <= K; k += kVec) acc[0] += load(x + k) * load_weights(from + k);
        for (; k < K; ++k) rest += x[k] * one_weight(from[k]);
        from += K;
      }
      exact[i] = bias[place] + (sum((acc[0] + acc[1]) + (acc[2] + acc[3])) + rest);
      rounded[i] = near[place];
    }
    // Lanes behind the last token have no difference.
    const Vec shifted = at_least(-87.f, at_most(87.f, rounded - top));
    total +=
        exp_moderate(shifted) * expm1_moderate(at_least(-87.f, at_most(87.f, exact - rounded)));
  }
  return sum(total);
}
float excess(const Operand* operands, int64_t row, const float* w, int64_t ld,
             const int32_t* places, int64_t n, const float* bias, const float* near, float top) {
  return excess_of(operands, row, w, ld, places, n, bias, near, top);
}
float excess_half(const Operand* operands, int64_t row, const uint16_t* w, int64_t ld,
                  const int32_t* places, int64_t n, const float* bias, const float* near,
                  float top) {
  return excess_of(operands, row, w, ld, places, n, bias, near, top);
}

// Whether any lane is set, of the result of a comparison.
S2S_INLINE bool any_of(const VecInt& lanes) {
#if defined(S2S_INTRINSICS) && S2S_LANES == 16
  return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0;
#elif defined(S2S_INTRINSICS)
  return !_mm256_testz_si256((__m256i)lanes, (__m256i)lanes);
#else
  uint64_t words[sizeof(VecInt) / 8], any = 0;
  std::memcpy(words, &lanes, sizeof lanes);
  for (const uint64_t word : words) any |= word;
  return any != 0;
#endif
}

float top(const float* x, int64_t n) {
  constexpr int kTogether = 4;  // so that one comparison need not wait for the other
  Vec tops[kTogether];
  for (Vec& top : tops) top = -INFINITY - Vec{};
  int64_t i = 0;
  const auto meet = [&](int j, Vec y) S2S_LAMBDA { tops[j] = y > tops[j] ? y : tops[j]; };
  for (; i + kTogether * kVec <= n; i += kTogether * kVec)
#pragma GCC unroll 4
    for (int j = 0; j < kTogether; ++j) meet(j, load(x + i + j * kVec));
  for (; i < n; i += kVec) meet(0, load_some(x + i, n - i, -INFINITY));
#pragma GCC unroll 4
  for (int j = 1; j < kTogether; ++j) tops[0] = tops[j] > tops[0] ? tops[j] : tops[0];
  return largest_lane(tops[0]);
}

// The largest of x, or the first NaN, its place (the first of equals), and sum exp(x - largest).
Peak peak(const float* x, int64_t n) {
  Peak p = {top(x, n), 0.f, 0};
  const float shift = p.top > -INFINITY ? p.top : 0.f;
  Vec sums = {};
  for (int64_t i = 0; i < n; i += kVec) {
    const Vec below =
        load_some(x + i, n - i, -INFINITY) - shift;  // less than exp(-87) is nothing beside exp(0)
    sums += exp_moderate(at_least(-87.f, below));
  }
  p.sum = sum(sums);
  int64_t at = 0;
  while (at + kVec <= n && !any_of(load(x + at) == p.top)) at += kVec;
  while (at < n && x[at] != p.top) ++at;
  p.index = static_cast<int32_t>(at);
  if (p.sum == p.sum) return p;
  for (int64_t i = 0; i < n; ++i)
    if (x[i] != x[i]) return {x[i], p.sum, static_cast<int32_t>(i)};
  return p;  // +inf - +inf
}

// The lanes of a comparison that are set, as bits.
S2S_INLINE uint32_t lanes_of(const VecInt& lanes) {
#if defined(S2S_INTRINSICS) && S2S_LANES == 16
  return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes);
#elif defined(S2S_INTRINSICS)
  return _mm256_movemask_ps((__m256)lanes);
#else
  uint32_t bits = 0;
  if (any_of(lanes))
    for (int i = 0; i < kVec; ++i) bits |= static_cast<uint32_t>(lanes[i] & 1) << i;
  return bits;
#endif
}

// Places of x above the threshold, ascending; `out` holds n.
int64_t above(const float* x, int64_t n, float threshold, int32_t* out) {
  int64_t found = 0, i = 0;
  for (; i + kVec <= n; i += kVec)
    for (uint32_t bits = lanes_of(load(x + i) > threshold); bits != 0; bits &= bits - 1)
      out[found++] = static_cast<int32_t>(i) + __builtin_ctz(bits);
  for (; i < n; ++i)
    if (x[i] > threshold) out[found++] = static_cast<int32_t>(i);
  return found;
}

}  // namespace
}  // namespace seq2seq_fast
