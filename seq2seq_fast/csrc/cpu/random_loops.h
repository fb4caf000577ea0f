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

// -log(-log u) of u uniform between 0 and 1, by v = 1 - u, whose small numbers have all their bits:
// log u = log w + ((1 - w) - v) / w with w = 1 - v rounded.
void perturb(const Draw& draw, int64_t block, const float* x, int64_t n, float* out) {
  uint32_t numbers[4][kLanesOfPhilox];
  philox(draw.seed, static_cast<uint64_t>(block) * kLanesOfPhilox, draw.row, draw.step, numbers);
  float v[kRandomBlock];
  for (int j = 0; j < 4; ++j)
    for (int lane = 0; lane < kLanesOfPhilox; ++lane)
      v[j * kLanesOfPhilox + lane] = static_cast<float>(numbers[j][lane]) * 0x1p-32f + 0x1p-33f;
  for (int64_t i = 0; i < n; i += kVec) {
    const Vec below = at_most(1 - 0x1p-24f, load(v + i)), w = 1.f - below;
    const Vec e = -(log_positive(w) + ((1.f - w) - below) / w);
    store_some(out + i, load_some(x + i, n - i) * draw.scale - log_positive(e), n - i);
  }
}

}  // namespace
}  // namespace seq2seq_fast
