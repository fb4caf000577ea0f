// Random numbers of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
// 3"), of which the factors of dropout are made, and what perturbs logits: any stretch of them on
// its own, vector by vector.
#pragma once
#include "vec.h"

namespace seq2seq_fast {
namespace {

constexpr int kLanesOfPhilox = 64;  // with 16 the loops are unrolled, and no longer vectors

// Four numbers for each of the counters first, first + 1, ..., which have two words more.
S2S_INLINE void philox(uint64_t key, uint64_t first, uint32_t third, uint32_t fourth,
                       uint32_t (&out)[4][kLanesOfPhilox]) {
  for (int i = 0; i < kLanesOfPhilox; ++i) {
    out[0][i] = static_cast<uint32_t>(first + i);
    out[1][i] = static_cast<uint32_t>((first + i) >> 32);
    out[2][i] = third;
    out[3][i] = fourth;
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
    for (int i = 0; i < kLanesOfPhilox; ++i) {
      const uint64_t a = uint64_t{0xD2511F53u} * out[0][i], b = uint64_t{0xCD9E8D57u} * out[2][i];
      const uint32_t x = out[1][i], y = out[3][i];
      out[0][i] = static_cast<uint32_t>(b >> 32) ^ x ^ k0;
      out[1][i] = static_cast<uint32_t>(b);
      out[2][i] = static_cast<uint32_t>(a >> 32) ^ y ^ k1;
      out[3][i] = static_cast<uint32_t>(a);
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
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = uint64_t{0xD2511F53u} * x[0], b = uint64_t{0xCD9E8D57u} * x[2];
    x[0] = static_cast<uint32_t>(b >> 32) ^ x[1] ^ k0;
    x[1] = static_cast<uint32_t>(b);
    x[2] = static_cast<uint32_t>(a >> 32) ^ x[3] ^ k1;
    x[3] = static_cast<uint32_t>(a);
  }
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
