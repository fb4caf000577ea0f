// The inner loops of products with packed weights, and of choosing among logits. See loops.h.
#pragma once
#include "vec.h"

#ifdef S2S_INTRINSICS
#include <immintrin.h>
#endif

namespace seq2seq_fast {
namespace {

typedef uint16_t VecHalf __attribute__((vector_size(2 * S2S_LANES), aligned(2), may_alias));
typedef int8_t VecByte __attribute__((vector_size(S2S_LANES), aligned(1), may_alias));

S2S_INLINE Vec load_weights(const float* p) { return load(p); }
S2S_INLINE Vec load_weights(const uint16_t* p) {  // bfloat16, the upper half of a float
  const VecInt bits = __builtin_convertvector(*reinterpret_cast<const VecHalf*>(p), VecInt) << 16;
  Vec x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
S2S_INLINE Vec load_weights(const int8_t* p) {
  // Widening bytes is one instruction that GCC 12 does not find by itself.
#if defined(S2S_INTRINSICS) && S2S_LANES == 16
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const auto x = reinterpret_cast<VecInt>(_mm512_maskz_cvtepi8_epi32(0xffff, bytes));
  return __builtin_convertvector(x, Vec);
#elif defined(S2S_INTRINSICS)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return __builtin_convertvector(reinterpret_cast<VecInt>(_mm256_cvtepi8_epi32(bytes)), Vec);
#else
  return __builtin_convertvector(*reinterpret_cast<const VecByte*>(p), Vec);
#endif
}

constexpr int64_t kLineBytes = 64;

// M rows by N vectors of a panel's columns. Every result is one sum in the order of k, so that it
// does not depend on M: a row is multiplied alike whatever stands beside it. Where several rows
// share what is read, a line for each k is asked for from `ahead` on, into the second level.
template <typename W, int M, int N>
S2S_INLINE void packed_tile(const Operand* operands, int count, int64_t row, const W* w,
                            int64_t width, const float* scale, const char* ahead, float* out,
                            int64_t ldo) {
  Vec acc[M][N] = {};
  for (int s = 0; s < count; ++s) {
    const int64_t ld = operands[s].ld, K = operands[s].K;
    const float* x = operands[s].x + row * ld;
    for (int64_t k = 0; k < K; ++k, w += width, ahead += kLineBytes) {
      if constexpr (M > 1) __builtin_prefetch(ahead, 0, 2);
      Vec b[N];
      for (int j = 0; j < N; ++j) b[j] = load_weights(w + j * kVec);
      for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) acc[i][j] += x[i * ld + k] * b[j];
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      float* to = out + i * ldo + j * kVec;
      store(to, load(to) + (scale ? load(scale + j * kVec) * acc[i][j] : acc[i][j]));
    }
}

template <typename W, int N>
S2S_INLINE void packed_rows(const Operand* operands, int count, int64_t rows, const W* w,
                            int64_t width, const float* scale, float* out, int64_t ldo) {
  constexpr int kMost = 6;
  int64_t row = 0, K = 0;
  for (int s = 0; s < count; ++s) K += operands[s].K;
  // The next panel, of which every tile of rows asks for as many lines as there are k.
  const char* ahead = reinterpret_cast<const char*>(w + K * width);
  const char* end = ahead + K * width * sizeof(W);
  const auto tile = [&]<int M>() S2S_LAMBDA {
    packed_tile<W, M, N>(operands, count, row, w, width, scale, ahead, out + row * ldo, ldo);
    row += M;
    if (ahead + K * kLineBytes < end) ahead += K * kLineBytes;
  };
  while (rows - row >= kMost) tile.template operator()<kMost>();
  switch (rows - row) {
    case 5:
      return tile.template operator()<5>();
    case 4:
      return tile.template operator()<4>();
    case 3:
      return tile.template operator()<3>();
    case 2:
      return tile.template operator()<2>();
    case 1:
      return tile.template operator()<1>();
  }
}

template <typename W>
S2S_INLINE void packed_panel_of(const Operand* operands, int count, int64_t rows, const W* w,
                                int64_t width, const float* scale, float* out, int64_t ldo) {
  constexpr int kPerUnit = kBlock / kVec;  // vectors
  const auto columns = [&]<int N>(int64_t at) S2S_LAMBDA {
    packed_rows<W, N>(operands, count, rows, w + at, width, scale ? scale + at : nullptr, out + at,
                      ldo);
  };
  if (kPerUnit == 1 && width == 4 * kBlock) return columns.template operator()<4>(0);
  if (kPerUnit == 1 && width == 3 * kBlock) return columns.template operator()<3>(0);
  if (rows == 1) {  // what is read must be read at once
    int64_t at = 0;
    for (; at + 4 * kVec <= width; at += 4 * kVec) columns.template operator()<4>(at);
    for (; at < width; at += kBlock) columns.template operator()<kPerUnit>(at);
    return;
  }
  for (int64_t at = 0; at < width; at += kBlock) columns.template operator()<kPerUnit>(at);
}

template <typename W>
S2S_INLINE void unpack_of(const W* w, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kVec) store(out + i, load_weights(w + i));
}

void unpack(Weights type, const void* w, int64_t n, float* out) {
  if (type == Weights::kBFloat16)
    unpack_of(static_cast<const uint16_t*>(w), n, out);
  else
    unpack_of(static_cast<const int8_t*>(w), n, out);
}

void packed_panel(Weights type, const Operand* operands, int count, int64_t rows, const void* w,
                  int64_t width, const float* scale, float* out, int64_t ldo) {
  if (type == Weights::kFloat)
    packed_panel_of(operands, count, rows, static_cast<const float*>(w), width, scale, out, ldo);
  else if (type == Weights::kBFloat16)
    packed_panel_of(operands, count, rows, static_cast<const uint16_t*>(w), width, scale, out, ldo);
  else
    packed_panel_of(operands, count, rows, static_cast<const int8_t*>(w), width, scale, out, ldo);
}

// The largest of x, or the first NaN, its place (the first of equals), and sum exp(x - largest).
Peak peak(const float* x, int64_t n) {
  VecInt lane, at = {};
  for (int i = 0; i < kVec; ++i) lane[i] = i;
  Vec tops = -INFINITY - Vec{};
  int64_t i = 0;
  for (; i + kVec <= n; i += kVec) {
    const Vec y = load(x + i);
    at = y > tops ? lane + static_cast<int32_t>(i) : at;
    tops = y > tops ? y : tops;
  }
  Peak p = {-INFINITY, 0.f, 0};
  for (int l = 0; l < kVec; ++l)
    if (tops[l] > p.top || (tops[l] == p.top && at[l] < p.index)) p.top = tops[l], p.index = at[l];
  for (; i < n; ++i)
    if (x[i] > p.top) p.top = x[i], p.index = static_cast<int32_t>(i);
  const float shift = p.top > -INFINITY ? p.top : 0.f;
  Vec sums = {};
  for (i = 0; i < n; i += kVec) {
    if (i + kVec <= n) {
      sums += exp_negative(load(x + i) - shift);
    } else {
      Vec rest = -INFINITY - Vec{};
      std::memcpy(&rest, x + i, sizeof(float) * (n - i));
      sums += exp_negative(rest - shift);
    }
  }
  p.sum = sum(sums);
  if (p.sum == p.sum) return p;
  for (i = 0; i < n; ++i)
    if (x[i] != x[i]) return {x[i], p.sum, static_cast<int32_t>(i)};
  return p;  // +inf - +inf
}

// Places of x above the threshold, ascending; `out` holds n.
int64_t above(const float* x, int64_t n, float threshold, int32_t* out) {
  int64_t found = 0, i = 0;
  for (; i + kVec <= n; i += kVec) {
    const VecInt over = load(x + i) > threshold;
    uint64_t words[sizeof(VecInt) / 8], any = 0;
    std::memcpy(words, &over, sizeof over);
    for (const uint64_t word : words) any |= word;
    if (any == 0) continue;
    for (int64_t j = i; j < i + kVec; ++j)
      if (x[j] > threshold) out[found++] = static_cast<int32_t>(j);
  }
  for (; i < n; ++i)
    if (x[i] > threshold) out[found++] = static_cast<int32_t>(i);
  return found;
}

}  // namespace
}  // namespace seq2seq_fast
