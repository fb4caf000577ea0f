// The inner loops of softmax and context. See loops.h.
#pragma once
#include "vec.h"

namespace seq2seq_fast {
namespace {

// Queries by vectors that a register tile holds.
constexpr int kTileM = kRegisters / 4, kTileN = 2, kLongN = kRegisters / 2;

// Rows that are taken together: with a power of two for ld, more would not stay in cache.
constexpr int64_t kRowsTogether = 64;

// What the weights are multiplied by meanwhile: the smallest subnormal number becomes a normal one,
// and arithmetic on subnormal numbers is a hundred times slower.
constexpr float kLift = 16777216.f;

// M x (N vectors) of the result in registers while the rows stream past; onto `out` where `add`.
// w (M, kRowsTogether)
template <int M, int N>
S2S_INLINE void weighted_tile(const float* w, const float* rows, int64_t ld, int64_t n, bool add,
                              float* out, int64_t ldo) {
  Vec acc[M][N] = {};
  if (add)
    for (int i = 0; i < M; ++i)
      for (int c = 0; c < N; ++c) acc[i][c] = load(out + i * ldo + c * kVec);
  for (int64_t j = 0; j < n; ++j) {
    Vec row[N];
    for (int c = 0; c < N; ++c) row[c] = load(rows + j * ld + c * kVec);
    for (int i = 0; i < M; ++i)
      for (int c = 0; c < N; ++c) acc[i][c] += w[i * kRowsTogether + j] * row[c];
  }
  for (int i = 0; i < M; ++i)
    for (int c = 0; c < N; ++c) store(out + i * ldo + c * kVec, acc[i][c]);
}

template <int M, int N>
S2S_INLINE void weighted_strip(const float* w, const float* rows, int64_t ld, int64_t n, int64_t D,
                               bool add, float* out, int64_t ldo) {
  int64_t d = 0;
  for (; d + N * kVec <= D; d += N * kVec)
    weighted_tile<M, N>(w, rows + d, ld, n, add, out + d, ldo);
  for (; d + kVec <= D; d += kVec) weighted_tile<M, 1>(w, rows + d, ld, n, add, out + d, ldo);
  for (; d < D; ++d)
    for (int i = 0; i < M; ++i) {
      float sum = add ? out[i * ldo + d] : 0.f;
      for (int64_t j = 0; j < n; ++j) sum += w[i * kRowsTogether + j] * rows[j * ld + d];
      out[i * ldo + d] = sum;
    }
}

// Onto `out` where `add`: m weights each for n <= kRowsTogether rows.
S2S_INLINE void weighted_block(const float* w, const float* rows, int64_t ld, int64_t m, int64_t n,
                               int64_t D, bool add, float* out, int64_t ldo) {
  constexpr int M = kTileM, N = kTileN, kWidth = kTileN * kVec;
  int64_t d = 0, i = 0;
  if (m >= 2 * M) {
    // Many strips read the same columns: from a copy that lies in one place. The next columns
    // are asked for meanwhile: no processor foresees steps of whole rows.
    alignas(64) float copy[kRowsTogether * kWidth];
    for (; d + kWidth <= D; d += kWidth) {
      for (int64_t j = 0; j < n; ++j)
        for (int c = 0; c < N; ++c) {
          __builtin_prefetch(rows + j * ld + d + kWidth + c * kVec, 0, 2);
          store(copy + j * kWidth + c * kVec, load(rows + j * ld + d + c * kVec));
        }
      for (i = 0; i + M <= m; i += M)
        weighted_tile<M, N>(w + i * kRowsTogether, copy, kWidth, n, add, out + i * ldo + d, ldo);
    }
  }
  for (i = 0; i + M <= m; i += M)
    weighted_strip<M, N>(w + i * kRowsTogether, rows + d, ld, n, D - d, add, out + i * ldo + d,
                         ldo);
  const auto rest = [&]<int M, int N>() S2S_LAMBDA {
    for (; i + M <= m; i += M)
      weighted_strip<M, N>(w + i * kRowsTogether, rows, ld, n, D, add, out + i * ldo, ldo);
  };
  if constexpr (kTileM > 4) rest.template operator()<4, 4>();
  rest.template operator()<1, kLongN>();
}

void weighted_rows(const float* w, int64_t wi, int64_t wj, const float* rows, int64_t ld, int64_t m,
                   int64_t n, int64_t D, float* out, int64_t ldo) {
  alignas(64) float lifted[kTile * kRowsTogether];
  float lift = kLift;
  for (;;) {
    for (int64_t j0 = 0; j0 < n || j0 == 0; j0 += kRowsTogether) {
      const int64_t count = n - j0 < kRowsTogether ? n - j0 : kRowsTogether;
      const float* from = w + j0 * wj;
      if (wj == 1) {
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < count; ++j)
            lifted[i * kRowsTogether + j] = lift * from[i * wi + j];
      } else {
        for (int64_t j = 0; j < count; ++j)
          for (int64_t i = 0; i < m; ++i)
            lifted[i * kRowsTogether + j] = lift * from[i * wi + j * wj];
      }
      weighted_block(lifted, rows + j0 * ld, ld, m, count, D, j0 > 0, out, ldo);
    }
    if (lift == 1.f) return;
    Vec zeros = {};  // NaN where the result is not finite
    float zero = 0.f;
    for (int64_t i = 0; i < m; ++i) {
      float* row = out + i * ldo;
      int64_t d = 0;
      for (; d + kVec <= D; d += kVec) {
        const Vec x = load(row + d);
        zeros += x - x;
        store(row + d, x * (1.f / kLift));
      }
      for (; d < D; ++d) zero += row[d] - row[d], row[d] *= 1.f / kLift;
    }
    if (zero + sum(zeros) == 0.f) return;
    lift = 1.f;  // values near the largest number, or infinities and NaN
  }
}

// M by N results at a time, of which kVec each have their lanes added up together.
template <int M>
S2S_INLINE void product_strip(const float* a, int64_t lda, const float* rows, int64_t ld, int64_t n,
                              int64_t D, float* out, int64_t ldo) {
  constexpr int N = kVec / M > kRegisters / 8 ? kVec / M : kRegisters / 8;
  const int64_t whole = D / kVec * kVec;
  for (int64_t j0 = 0; j0 < n; j0 += N) {
    const int used = static_cast<int>(n - j0 < N ? n - j0 : N);
    const float* row[N];  // behind the last: that one again
    for (int j = 0; j < N; ++j) row[j] = rows + (j0 + (j < used ? j : used - 1)) * ld;
    Vec acc[M * N] = {};
    for (int64_t d = 0; d < whole; d += kVec) {
      Vec r[N];
      for (int j = 0; j < N; ++j) r[j] = load(row[j] + d);
      for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) acc[i * N + j] += load(a + i * lda + d) * r[j];
    }
    float total[M * N];
    for (int i = 0; i < M * N; i += kVec) store(total + i, sums(acc + i));
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < used; ++j) {
        float rest = 0.f;
        for (int64_t d = whole; d < D; ++d) rest += a[i * lda + d] * row[j][d];
        out[i * ldo + j0 + j] = total[i * N + j] + rest;
      }
  }
}

void products(const float* a, int64_t lda, const float* rows, int64_t ld, int64_t m, int64_t n,
              int64_t D, float* out, int64_t ldo) {
  for (; m >= 4; m -= 4, a += 4 * lda, out += 4 * ldo)
    product_strip<4>(a, lda, rows, ld, n, D, out, ldo);
  for (; m > 0; --m, a += lda, out += ldo) product_strip<1>(a, lda, rows, ld, n, D, out, ldo);
}

// Where mask forbids, x becomes -inf. Whether anything is attended to.
S2S_INLINE bool forbid(float* x, int64_t S, const bool* mask, int64_t stride) {
  bool any = false;
  for (int64_t s = 0; s < S; ++s) {
    const bool attended = mask[s * stride];
    any |= attended;
    x[s] = attended ? x[s] : -INFINITY;
  }
  return any;
}

// The lanes of x[s ...) that lie below S; those behind are -inf.
S2S_INLINE Vec load_front(const float* x, int64_t s, int64_t S) {
  if (s + kVec <= S) return load(x + s);
  Vec front = -INFINITY - Vec{};
  std::memcpy(&front, x + s, sizeof(float) * (S - s));
  return front;
}
S2S_INLINE void store_front(float* x, int64_t s, int64_t S, Vec value) {
  std::memcpy(x + s, &value, sizeof(float) * (S - s < kVec ? S - s : kVec));
}

void softmax(float* x, int64_t S, float scale, const float* bias, const bool* mask,
             int64_t stride) {
  if (bias) {
    for (int64_t s = 0; s < S; ++s) x[s] = scale * x[s] + bias[s];
  } else if (scale != 1.f) {
    for (int64_t s = 0; s < S; ++s) x[s] *= scale;
  }
  if (mask && !forbid(x, S, mask, stride)) {
    std::memset(x, 0, sizeof(float) * S);
    return;
  }
  Vec tops = -INFINITY - Vec{};
  for (int64_t s = 0; s < S; s += kVec) {
    const Vec y = load_front(x, s, S);
    tops = y > tops ? y : tops;
  }
  const float top = largest_lane(tops);
  Vec sums = {};
  for (int64_t s = 0; s < S; s += kVec) {
    const Vec e = exp_negative(load_front(x, s, S) - top);
    store_front(x, s, S, e);
    sums += e;
  }
  const float total = sum(sums);
  for (int64_t s = 0; s < S; ++s) x[s] /= total;
  // Zero also where the sum is NaN.
  if (mask && !(total < INFINITY))
    for (int64_t s = 0; s < S; ++s) x[s] = mask[s * stride] ? x[s] : 0.f;
}

void scale_and_flush(float* x, int64_t n, float scale) {
  float top = 0.f;
  for (int64_t i = 0; i < n; ++i) {
    x[i] *= scale;
    const float magnitude = x[i] < 0.f ? -x[i] : x[i];
    top = magnitude > top ? magnitude : top;
  }
  const float least = top * 1e-20f < 1e-30f ? top * 1e-20f : 1e-30f;
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] < least && x[i] > -least ? 0.f : x[i];
}

void softmax_backward(float* dw, const float* w, int64_t S) {
  Vec dots = {}, sums = {};
  int64_t s = 0;
  for (; s + kVec <= S; s += kVec) {
    dots += load(dw + s) * load(w + s);
    sums += load(w + s);
  }
  float dot = sum(dots), total = sum(sums);
  for (; s < S; ++s) dot += dw[s] * w[s], total += w[s];
  // Weights that were rounded to 16 bits do not add up to one; the gradients must to zero.
  const float mean = total > 0.f ? dot / total : dot;
  for (s = 0; s < S; ++s) dw[s] = w[s] * (dw[s] - mean);
}

}  // namespace
}  // namespace seq2seq_fast
