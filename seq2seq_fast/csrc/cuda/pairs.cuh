// Two terms of a score, v1 tanh(q1 + k1) + v2 tanh(q2 + k2), with one reciprocal.
//
// With x = exp(2q) exp(2k), z = (x - 1) / 2 and u = 1 + z, tanh(q + k) = z / u, and two features
// share one reciprocal:
//
//   v1 z1 / u1 + v2 z2 / u2 = (g + z2 h) / (u1 + z2 u1),   g = v1 z1 = v1 u1 - v1,  h = g + v2 u1
//
// Eight instructions for two elements: z2, u1, g, h, numerator, denominator, reciprocal, sum. What
// is rounded is of the size of tanh, where sum v - 2 sum v / (1 + x), one instruction shorter,
// rounds at the size of v; 16 special functions a clock allow 32 elements a clock, 128
// instructions at four each as many, so that the shorter form would not be faster either.
#pragma once
#include "powers.cuh"

namespace seq2seq_fast {

// Adds the two to sum, and returns the denominator.
template <Path path>
__device__ __forceinline__ float add_pair(float& sum, float q1, float q2, float k1, float k2,
                                          float v1, float v2) {
  float u, g, z2;
  if constexpr (path == Path::kSmall) {  // q = (exp(2q) - 1) / 2 and k = exp(2k) - 1
    const float z1 = q1 * k1 + (0.5f * k1 + q1);
    z2 = q2 * k2 + (0.5f * k2 + q2);
    u = z1 + 1.f;
    g = v1 * z1;
  } else {
    u = q1 * k1 + 0.5f;
    z2 = q2 * k2 - 0.5f;
    g = v1 * u - v1;
  }
  const float h = v2 * u + g, denominator = z2 * u + u;
  sum += (z2 * h + g) * reciprocal(denominator);
  return denominator;
}

}  // namespace seq2seq_fast
