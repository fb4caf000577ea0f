// Random numbers of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
// 3"), of which the factors of dropout are made, and what perturbs logits: any stretch of them on
// its own, vector by vector.
#pragma once
#include "vec.h"

namespace seq2seq_fast {
namespace {

constexpr int kLanesOfPhilox = 64;

// Words of 32 bits, each in the low half of a lane: a product of two needs no shuffle then.
typedef uint64_t Wide __attribute__((vector_size(4 * S2S_LANES)));

// The high halves count for nothing.
S2S_INLINE Wide times(Wide a, uint32_t b) {
#if defined(S2S_INTRINSICS) && S2S_LANES == 16
  return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(S2S_INTRINSICS)
  return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (Wide)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#elif defined(__aarch64__)
  return (Wide)vmull_n_u32(vmovn_u64((uint64x2_t)a), b);
#else
  return (a & 0xFFFFFFFF) * uint64_t{b};
#endif
}
S2S_INLINE uint64_t times(uint32_t a, uint32_t b) { return uint64_t{a} * b; }

// One of ten rounds, on the four words of a counter, or of as many as a Wide has. (Of a Wide the
// high halves are left to be anything.)
template <typename T>
S2S_INLINE void philox_round(T& w, T& x, T& y, T& z, uint32_t k0, uint32_t k1) {
  const auto a = times(w, 0xD2511F53u), b = times(y, 0xCD9E8D57u);
  w = static_cast<T>(b >> 32) ^ x ^ k0;
  x = static_cast<T>(b);
  y = static_cast<T>(a >> 32) ^ z ^ k1;
  z = static_cast<T>(a);
}

// Calls f with the keys of each round.
template <typename F>
S2S_INLINE void over_rounds(uint64_t key, F f) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) f(k0, k1);
}

// Four numbers for each of the counters first, first + 1, ..., which have two words more.
S2S_INLINE void philox(uint64_t key, uint64_t first, uint32_t third, uint32_t fourth,
                       uint32_t (&out)[4][kLanesOfPhilox]) {
  constexpr int kHalf = kVec / 2;
  Wide lanes{};
  for (int i = 0; i < kHalf; ++i) lanes[i] = i;
  for (int i = 0; i < kLanesOfPhilox; i += kVec) {
    Wide x[2][4];
    for (int half = 0; half < 2; ++half) {
      const Wide counters = lanes + (first + i + half * kHalf);
      x[half][0] = counters;
      x[half][1] = counters >> 32;
      x[half][2] = Wide{} + third;
      x[half][3] = Wide{} + fourth;
    }
    over_rounds(key, [&](uint32_t k0, uint32_t k1) S2S_LAMBDA {
      for (auto& of : x) philox_round(of[0], of[1], of[2], of[3], k0, k1);
    });
    for (int j = 0; j < 4; ++j) {
      const auto low = [&]<int... I>(std::integer_sequence<int, I...>) S2S_LAMBDA {
        return __builtin_shufflevector((VecInt)x[0][j], (VecInt)x[1][j], (2 * I)...);
      }(std::make_integer_sequence<int, kVec>());
      std::memcpy(out[j] + i, &low, sizeof low);
    }
  }
}

void dropout(uint64_t key, int64_t block, int64_t n, uint64_t threshold, float kept, float* out) {
  uint32_t x[4][kLanesOfPhilox];
  float y[4 * kLanesOfPhilox];
  for (int64_t i = 0; i < n; i += kRandomBlock, ++block) {
    philox(key, static_cast<uint64_t>(block) * kLanesOfPhilox, 0, 0, x);
    for (int j = 0; j < 4; ++j)
      for (int lane = 0; lane < kLanesOfPhilox; ++lane)
        y[j * kLanesOfPhilox + lane] = x[j][lane] >= threshold ? kept : 0.f;
    std::memcpy(out + i, y, sizeof(float) * (n - i < kRandomBlock ? n - i : kRandomBlock));
  }
}

// The j-th number of one counter.
S2S_INLINE uint32_t philox_of_one(uint64_t key, uint64_t counter, uint32_t third, uint32_t fourth,
                                  int64_t j) {
  uint32_t x[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), third,
                   fourth};
  over_rounds(key, [&](uint32_t k0, uint32_t k1)
                       S2S_LAMBDA { philox_round(x[0], x[1], x[2], x[3], k0, k1); });
  return x[j];
}

S2S_INLINE float uniform(uint32_t number) {
  return static_cast<float>(number) * 0x1p-32f + 0x1p-33f;
}

// scale x - log(-log u) of u uniform between 0 and 1, by v = 1 - u, whose small numbers have all
// their bits: log u = log w + ((1 - w) - v) / w with w = 1 - v rounded.
S2S_INLINE Vec perturbed(const Vec& x, const Vec& v, float scale) {
  const Vec below = at_most(1 - 0x1p-24f, v), w = 1.f - below;
  const Vec e = -(log_positive(w) + ((1.f - w) - below) / w);
  return x * scale - log_positive(e);
}

// Nearly all of many numbers are far below the largest, and need not be known. A stretch of them
// has one counter's j-th number for each lane.
float perturb(const Draw& draw, int64_t block, const float* x, int64_t n, float least, float* out) {
  constexpr int64_t kStretch = kLanesOfPhilox;
  float tops[kVec], v[kRandomBlock];
  const int64_t stretches = (n + kStretch - 1) / kStretch;
  float most = -INFINITY;
  for (int64_t j = 0; j < stretches; ++j) {
    tops[j] = top(x + j * kStretch, n - j * kStretch < kStretch ? n - j * kStretch : kStretch);
    most = tops[j] > most ? tops[j] : most;
  }
  if (most == -INFINITY || draw.scale * most + kMostPerturbed < least) {
    for (int64_t i = 0; i < n; ++i) out[i] = -INFINITY;
    return -INFINITY;
  }
  uint32_t numbers[4][kLanesOfPhilox];
  philox(draw.seed, static_cast<uint64_t>(block) * kLanesOfPhilox, draw.row, draw.step, numbers);
  for (int64_t j = 0; j < stretches; ++j) {
    uint32_t smallest = numbers[j][0];
    for (const uint32_t number : numbers[j]) smallest = number < smallest ? number : smallest;
    v[j] = uniform(smallest);
  }
  for (int64_t j = stretches; j < kVec; ++j) tops[j] = 0, v[j] = 0.5f;
  const Vec bounds = perturbed(load(tops), load(v), draw.scale);
  most = -INFINITY;
  for (int64_t j = 0; j < stretches; ++j) {
    const int64_t first = j * kStretch, count = n - first < kStretch ? n - first : kStretch;
    const float* const from = x + first;
    float* const to = out + first;
    // Roundings are no larger, but where numbers are not finite.
    if (bounds[j] + (1e-4f + 1e-6f * std::abs(bounds[j])) < least) {
      for (int64_t i = 0; i < count; ++i) to[i] = -INFINITY;
      continue;
    }
    for (int lane = 0; lane < kLanesOfPhilox; ++lane) v[lane] = uniform(numbers[j][lane]);
    for (int64_t i = 0; i < count; i += kVec)
      store_some(to + i, perturbed(load_some(from + i, count - i), load(v + i), draw.scale),
                 count - i);
    const float largest = top(to, count);
    most = largest > most ? largest : most;
  }
  return most;
}

void perturb_some(const Draw& draw, const int32_t* tokens, const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kVec) {
    float v[kVec];
    for (int64_t lane = 0; lane < kVec; ++lane) {
      const int64_t token = tokens[i + lane < n ? i + lane : i], at = token % kRandomBlock;
      const int64_t counter = token / kRandomBlock * kLanesOfPhilox + at % kLanesOfPhilox;
      v[lane] = uniform(philox_of_one(draw.seed, static_cast<uint64_t>(counter), draw.row,
                                      draw.step, at / kLanesOfPhilox));
    }
    store_some(out + i, perturbed(load_some(x + i, n - i), load(v), draw.scale), n - i);
  }
}

}  // namespace
}  // namespace seq2seq_fast
