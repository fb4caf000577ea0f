// Random numbers of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
// 3"), of which the factors of dropout are made, and what perturbs logits: any stretch of them on
// its own, vector by vector.
#pragma once
#include "vec.h"

namespace seq2seq_fast {
namespace {

constexpr int kLanesOfPhilox = 64;  // with 16 the loops are unrolled, and no longer vectors

// One of ten rounds, on the four words of a counter.
S2S_INLINE void philox_round(uint32_t& w, uint32_t& x, uint32_t& y, uint32_t& z, uint32_t k0,
                             uint32_t k1) {
  const uint64_t a = uint64_t{0xD2511F53u} * w, b = uint64_t{0xCD9E8D57u} * y;
  w = static_cast<uint32_t>(b >> 32) ^ x ^ k0;
  x = static_cast<uint32_t>(b);
  y = static_cast<uint32_t>(a >> 32) ^ z ^ k1;
  z = static_cast<uint32_t>(a);
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
  for (int i = 0; i < kLanesOfPhilox; ++i) {
    out[0][i] = static_cast<uint32_t>(first + i);
    out[1][i] = static_cast<uint32_t>((first + i) >> 32);
    out[2][i] = third;
    out[3][i] = fourth;
  }
  over_rounds(key, [&](uint32_t k0, uint32_t k1) S2S_LAMBDA {
    for (int i = 0; i < kLanesOfPhilox; ++i)
      philox_round(out[0][i], out[1][i], out[2][i], out[3][i], k0, k1);
  });
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

void perturb(const Draw& draw, int64_t block, const float* x, int64_t n, float* out) {
  uint32_t numbers[4][kLanesOfPhilox];
  philox(draw.seed, static_cast<uint64_t>(block) * kLanesOfPhilox, draw.row, draw.step, numbers);
  float v[kRandomBlock];
  for (int j = 0; j < 4; ++j)
    for (int lane = 0; lane < kLanesOfPhilox; ++lane)
      v[j * kLanesOfPhilox + lane] = uniform(numbers[j][lane]);
  for (int64_t i = 0; i < n; i += kVec)
    store_some(out + i, perturbed(load_some(x + i, n - i), load(v + i), draw.scale), n - i);
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
