// What location.cuh filters states with, how it divides places among blocks, and what a step's keys
// are made of.
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

struct PlaceKeysArguments {
  Filters filters;
  const float* before;   // (B, C, S)
  const float* weights;  // (B, S), of the step behind it; null: none
  float* state;          // (B, C, S), what comes of both; null: not wanted
  View keys;             // (B / rows_of_source, S, A)
  float* placed;         // (B, S, A), contiguous; null: not wanted
  // Of a search: the rows that rows go on from (B,), how many of each source go on, the first ones,
  // and the step, whose first has none behind it. Null elsewhere.
  const int *parent, *live, *step;
  int rows_of_source;
};

}  // namespace seq2seq_fast
