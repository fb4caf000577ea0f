// What location.cuh filters states with, and how it divides places among blocks.
#pragma once
#include "device.cuh"

namespace seq2seq_fast {

constexpr int kPlacesOfBlock = 16, kPlaceThreads = 128;
constexpr int kPlaceWarps = kPlaceThreads / kWarp, kPlacesOfWarp = kPlacesOfBlock / kPlaceWarps;
static_assert(kPlacesOfWarp == 4, "a warp sums up four places at once");

struct Filters {
  const float* conv;        // (N, C, K)
  const float* projection;  // (N, A)
  int N, C, K, A, S;
  unsigned accumulates;  // bit c: channel c is the sum of all weights, not the last ones
  __host__ __device__ int width() const { return kPlacesOfBlock + K - 1; }
  __host__ __device__ int blocks() const { return static_cast<int>(ceil_div(S, kPlacesOfBlock)); }
  // of the state and the features of a block's places
  __host__ __device__ int64_t floats() const {
    return round_up(C * width(), 4) + N * kPlacesOfBlock;
  }
};

}  // namespace seq2seq_fast
