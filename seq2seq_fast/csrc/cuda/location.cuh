// Location-sensitive attention inside the decoder's recurrence: what its scores see of where was
// attended before, scores = v tanh(query + keys + projection f), f = conv * state; see location.h
// of the CPU.
//
// Forward a step's keys are placed: a block filters the state around some places, threads along
// them, and adds what the projection makes of the features to their keys, threads along features of
// attention. The kernel of one query then reads these in place of keys. Backward, within the
// recurrence, are the gradients of query and state alone; those of keys, v and projection are sums
// over steps, which a block makes for its places once all of the steps are known.
#pragma once
#include "filters.cuh"
#include "one_query_backward.cuh"

namespace seq2seq_fast {

// Puts the features (N, kPlacesOfBlock) of the places from s0 on behind the state around them, into
// `memory`. state_at(c, s) is asked for each place once; what lies beyond the ends is zero.
template <typename F>
__device__ __forceinline__ const float* filter_places(const Filters& f, int s0, float* memory,
                                                      F state_at) {
  const int width = f.width();
  for (int i = threadIdx.x; i < f.C * width; i += kPlaceThreads) {
    const int c = i / width, s = s0 + i % width - f.K / 2;
    memory[i] = s >= 0 && s < f.S ? state_at(c, s) : 0.f;
  }
  __syncthreads();
  float* const features = memory + round_up(f.C * width, 4);
  for (int i = threadIdx.x; i < f.N * kPlacesOfBlock; i += kPlaceThreads) {
    const float* w = f.conv + i / kPlacesOfBlock * f.C * f.K;
    float sum = 0.f;
    for (int c = 0; c < f.C; ++c) {
      const float* x = memory + c * width + i % kPlacesOfBlock;
#pragma unroll 4
      for (int j = 0; j < f.K; ++j) sum += *w++ * x[j];
    }
    features[i] = sum;
  }
  __syncthreads();
  return features;
}

// Adds projection f to x of the block's places, for feature h of attention. `at_once` of the
// projection's numbers are on their way, where there are registers for them.
template <int at_once>
__device__ __forceinline__ void add_places(const Filters& f, const float* features, int h,
                                           float (&x)[kPlacesOfBlock]) {
#pragma unroll at_once
  for (int n = 0; n < f.N; ++n) {
    const float w = f.projection[n * f.A + h];
    const float4* of = reinterpret_cast<const float4*>(features + n * kPlacesOfBlock);
#pragma unroll
    for (int i = 0; i < kPlacesOfBlock / 4; ++i) {
      const float4 four = of[i];
      x[4 * i] += four.x * w, x[4 * i + 1] += four.y * w;
      x[4 * i + 2] += four.z * w, x[4 * i + 3] += four.w * w;
    }
  }
}

static __global__ void __launch_bounds__(kPlaceThreads) place_keys(PlaceKeysArguments a) {
  const Filters& f = a.filters;
  const int b = blockIdx.x / f.blocks(), s0 = blockIdx.x % f.blocks() * kPlacesOfBlock;
  const int source = b / a.rows_of_source;
  if (a.live != nullptr && b % a.rows_of_source >= a.live[source]) return;
  const int64_t from = a.parent == nullptr ? b : a.parent[b];
  const bool follows = a.weights != nullptr && (a.step == nullptr || *a.step > 0);
  const float* features = filter_places(f, s0, shared_memory(), [&](int c, int s) {
    float x = a.before[(from * f.C + c) * f.S + s];
    if (follows) {
      const float w = a.weights[from * f.S + s];
      x = f.accumulates >> c & 1 ? x + w : w;
    }
    if (a.state != nullptr && s >= s0 && s < s0 + kPlacesOfBlock)
      a.state[(int64_t{b} * f.C + c) * f.S + s] = x;
    return x;
  });
  if (a.placed == nullptr) return;
  const int count = min(kPlacesOfBlock, f.S - s0);
  for (int h = threadIdx.x; h < f.A; h += kPlaceThreads) {
    float x[kPlacesOfBlock];
#pragma unroll
    for (int i = 0; i < kPlacesOfBlock; ++i)
      x[i] = a.keys(source, s0 + min(i, count - 1), h);  // behind the last one that one again
    add_places<8>(f, features, h, x);
    float* to = a.placed + (int64_t{b} * f.S + s0) * f.A + h;
#pragma unroll
    for (int i = 0; i < kPlacesOfBlock; ++i)
      if (i < count) to[int64_t{i} * f.A] = x[i];
  }
}

// Gradients of the weights, from those of the context and of `later` (B, C, S), the state behind
// the step, null where none of it comes to the weights. A row has a block for each range of the
// source.
struct WeightsBackwardArguments {
  OneQueryBackwardArguments attention;
  const float* later;
  int C;
};

static __global__ void __launch_bounds__(kQueryBackwardThreads, 1)
    weights_backward(WeightsBackwardArguments a) {
  const OneQueryBackwardArguments& of = a.attention;
  const int b = blockIdx.x / of.ranges;
  const auto later = [&](int s) {
    float sum = 0.f;
    for (int c = 0; a.later != nullptr && c < a.C; ++c)
      sum += a.later[(int64_t{b} * a.C + c) * of.S + s];
    return sum;
  };
  retreat_values<kQueryBackwardWarps>(of, b, b, blockIdx.x % of.ranges, shared_memory(), later,
                                      [&](int s, float dw) { of.of_weights(b, s) = dw; });
}

// From the gradients of the weights to those of the scores, of the query, a part from each block of
// places, and of the features.
struct PlaceSlopesArguments {
  Filters filters;
  OneQueryBackwardArguments attention;
  const float* state;             // (B, C, S)
  float *query_parts, *features;  // (B, blocks, A), (B, N, S)
  __host__ __device__ int64_t floats() const {
    return filters.floats() + kPlacesOfBlock * (1 + kPlaceThreads) +
           int64_t{filters.N} * kPlacesOfBlock;
  }
};

// g[i] v (1 - tanh^2(x[i])), and on to `of_v` g[i] tanh(x[i]). What a mask hides has none, not even
// of keys that are no numbers.
__device__ __forceinline__ void slopes(float (&x)[kPlacesOfBlock], const float* g, float v,
                                       float& of_v) {
#pragma unroll
  for (int i = 0; i < kPlacesOfBlock; ++i) {
    const float y = tanhf(x[i]);
    of_v += g[i] == 0.f ? 0.f : g[i] * y;
    x[i] = g[i] == 0.f ? 0.f : g[i] * v * ((1.f - y) * (1.f + y));
  }
}

static __global__ void __launch_bounds__(kPlaceThreads) place_slopes(PlaceSlopesArguments a) {
  const Filters& f = a.filters;
  const OneQueryBackwardArguments& of = a.attention;
  const int b = blockIdx.x / f.blocks(), s0 = blockIdx.x % f.blocks() * kPlacesOfBlock;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int count = min(kPlacesOfBlock, f.S - s0);
  float* const memory = shared_memory();
  float* const tile = memory + f.floats();                 // (kPlacesOfBlock, kPlaceThreads)
  float* const g = tile + kPlacesOfBlock * kPlaceThreads;  // (kPlacesOfBlock,)
  float* const sums = g + kPlacesOfBlock;                  // (N, kPlacesOfBlock)
  float dot[] = {weighted_sum<kPlaceWarps>(of, b, [&](int s) { return of.of_weights(b, s); })};
  of_block<kPlaceWarps>(dot, tile, [](int, float x, float y) { return x + y; });
  if (thread < kPlacesOfBlock) {
    const int s = s0 + thread;
    g[thread] = thread < count ? of.weights(b, s) * (of.of_weights(b, s) - dot[0]) : 0.f;
    if (thread < count) of.to_scores(b, s) = g[thread];
  }
  for (int i = thread; i < f.N * kPlacesOfBlock; i += kPlaceThreads) sums[i] = 0.f;
  const float* features = filter_places(
      f, s0, memory, [&](int c, int s) { return a.state[(int64_t{b} * f.C + c) * f.S + s]; });
  for (int h0 = 0; h0 < f.A; h0 += kPlaceThreads) {
    const int h = h0 + thread;
    float x[kPlacesOfBlock] = {};
    if (h < f.A) {
      const float q = of.query(b, h);
#pragma unroll
      for (int i = 0; i < kPlacesOfBlock; ++i) x[i] = q + of.keys(b, s0 + min(i, count - 1), h);
      add_places<8>(f, features, h, x);
      float none = 0.f, sum = 0.f;
      slopes(x, g, of.v(0, 0, h), none);
#pragma unroll
      for (int i = 0; i < kPlacesOfBlock; ++i) sum += x[i];
      a.query_parts[int64_t{blockIdx.x} * f.A + h] = sum;
    }
#pragma unroll
    for (int i = 0; i < kPlacesOfBlock; ++i) tile[i * kPlaceThreads + thread] = x[i];
    __syncthreads();
    // A warp's four places meet each filter's projection, lanes along features of attention.
    float d[kPlacesOfWarp][kPlaceWarps];
#pragma unroll
    for (int i = 0; i < kPlacesOfWarp; ++i)
#pragma unroll
      for (int k = 0; k < kPlaceWarps; ++k)
        d[i][k] = tile[(warp * kPlacesOfWarp + i) * kPlaceThreads + k * kWarp + lane];
    for (int n = 0; n < f.N; ++n) {
      float four[kPlacesOfWarp] = {};
#pragma unroll
      for (int k = 0; k < kPlaceWarps; ++k) {
        const int at = h0 + k * kWarp + lane;
        const float w = at < f.A ? f.projection[n * f.A + at] : 0.f;
#pragma unroll
        for (int i = 0; i < kPlacesOfWarp; ++i) four[i] += w * d[i][k];
      }
      const float sum = warp_sum_of_four(four);
      if (lane % 8 == 0) sums[n * kPlacesOfBlock + warp * kPlacesOfWarp + lane / 8] += sum;
    }
    __syncthreads();
  }
  for (int i = thread; i < f.N * kPlacesOfBlock; i += kPlaceThreads) {
    const int n = i / kPlacesOfBlock, s = i % kPlacesOfBlock;
    if (s < count) a.features[(int64_t{b} * f.N + n) * f.S + s0 + s] = sums[i];
  }
}

// From the features' gradients to those of the state before the step, in place of what was of the
// one behind it, and on to those of conv. And the query's, which is the sum of its parts.
struct PlaceBackArguments {
  Filters filters;
  const float *features, *state, *query_parts;  // (B, N, S), (B, C, S), (B, blocks, A)
  float *of_state, *of_conv, *of_query;         // (B, C, S), (B, N, C, K), (B, A)
  int B;
  __host__ __device__ int state_blocks() const {
    return filters.C * static_cast<int>(ceil_div(filters.S, kWarp));
  }
  __host__ __device__ int64_t blocks() const {
    return int64_t{B} * (state_blocks() + filters.N + 1);
  }
};

static __global__ void __launch_bounds__(kPlaceThreads) place_back(PlaceBackArguments a) {
  const Filters& f = a.filters;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int64_t of_each = a.state_blocks() + f.N + 1;
  const int b = static_cast<int>(blockIdx.x / of_each), before = f.K / 2;
  int role = static_cast<int>(blockIdx.x % of_each);
  const float* const d = a.features + int64_t{b} * f.N * f.S;
  if (role < a.state_blocks()) {  // warps share out the filters, lanes are places
    const int places = a.state_blocks() / f.C, c = role / places;
    const int s = role % places * kWarp + lane;
    float sum = 0.f;
    for (int n = warp; n < f.N; n += kPlaceWarps) {
      const float *w = f.conv + (int64_t{n} * f.C + c) * f.K, *row = d + int64_t{n} * f.S;
#pragma unroll 4
      for (int j = 0; j < f.K; ++j) {
        const int at = s - j + before;
        if (at >= 0 && at < f.S) sum += w[j] * row[at];
      }
    }
    float* const scratch = shared_memory();
    scratch[thread] = sum;
    __syncthreads();
    if (warp > 0 || s >= f.S) return;
    for (int w = 1; w < kPlaceWarps; ++w) sum += scratch[w * kWarp + lane];
    float& to = a.of_state[(int64_t{b} * f.C + c) * f.S + s];
    to = (f.accumulates >> c & 1 ? to : 0.f) + sum;
    return;
  }
  role -= a.state_blocks();
  if (role < f.N) {
    const float* const row = d + int64_t{role} * f.S;
    float* const to = a.of_conv + (int64_t{b} * f.N + role) * f.C * f.K;
    float* const scratch = shared_memory();
    for (int i0 = 0; i0 < f.C * f.K; i0 += kWarp) {  // groups of threads share out the places
      const int n = min(kWarp, f.C * f.K - i0), groups = kPlaceThreads / n;
      const int group = thread / n, i = i0 + thread % n;
      const int c = i / f.K, shift = i % f.K - before;
      const float* x = a.state + (int64_t{b} * f.C + c) * f.S + shift;
      const int end = group < groups ? min(f.S, f.S - shift) : 0;
      float sum = 0.f;
#pragma unroll 4
      for (int s = max(0, -shift) + group; s < end; s += groups) sum += row[s] * x[s];
      scratch[thread] = sum;
      __syncthreads();
      for (int g = 1; g < groups && thread < n; ++g) sum += scratch[g * n + thread];
      if (thread < n) to[i] += sum;
      __syncthreads();
    }
    return;
  }
  for (int h = thread; h < f.A; h += kPlaceThreads) {
    float sum = 0.f;
    for (int i = 0; i < f.blocks(); ++i)
      sum += a.query_parts[(int64_t{b} * f.blocks() + i) * f.A + h];
    a.of_query[int64_t{b} * f.A + h] = sum;
  }
}

// Sums over all steps: gradients of keys, and parts of those of v and projection, one from each
// block of places.
struct PlaceSumsArguments {
  Filters filters;
  const float *states, *queries, *scores;  // (T, B, C, S), (T, B, A), gradients (T, B, S)
  View keys, v;
  float *of_keys, *of_v, *of_projection;  // (B, S, A), (B blocks, A), (B blocks, N, A)
  int T, B;
  __host__ __device__ int tiles() const {
    return static_cast<int>(ceil_div(filters.A, kPlaceThreads));
  }
  __host__ __device__ int64_t floats() const {
    return filters.floats() + kPlacesOfBlock + int64_t{filters.N} * kPlaceThreads;
  }
};

static __global__ void __launch_bounds__(kPlaceThreads, 4) place_sums(PlaceSumsArguments a) {
  const Filters& f = a.filters;
  const int thread = threadIdx.x;
  const int64_t block = blockIdx.x / a.tiles();
  const int h = static_cast<int>(blockIdx.x % a.tiles()) * kPlaceThreads + thread;
  const int b = static_cast<int>(block / f.blocks()), s0 = block % f.blocks() * kPlacesOfBlock;
  const int count = min(kPlacesOfBlock, f.S - s0), at = min(h, f.A - 1);
  float* const memory = shared_memory();
  float* const g = memory + f.floats();                      // (kPlacesOfBlock,)
  float* const of_projection = g + kPlacesOfBlock + thread;  // (N,), kPlaceThreads apart
  for (int n = 0; n < f.N; ++n) of_projection[n * kPlaceThreads] = 0.f;
  float keys[kPlacesOfBlock], of_keys[kPlacesOfBlock] = {}, of_v = 0.f;
#pragma unroll
  for (int i = 0; i < kPlacesOfBlock; ++i) keys[i] = a.keys(b, s0 + min(i, count - 1), at);
  const float v = a.v(0, 0, at);
  for (int t = 0; t < a.T; ++t) {
    const int64_t row = int64_t{t} * a.B + b;
    __syncthreads();  // what the step before has read may now be overwritten
    float mine = 0.f;
    if (thread < count) mine = a.scores[row * f.S + s0 + thread];
    if (thread < kPlacesOfBlock) g[thread] = mine;
    if (!__syncthreads_or(mine != 0.f)) continue;  // hidden by a mask
    const float* features = filter_places(
        f, s0, memory, [&](int c, int s) { return a.states[(row * f.C + c) * f.S + s]; });
    float x[kPlacesOfBlock];
    const float q = a.queries[row * f.A + at];
#pragma unroll
    for (int i = 0; i < kPlacesOfBlock; ++i) x[i] = q + keys[i];
    add_places<2>(f, features, at, x);
    slopes(x, g, v, of_v);
#pragma unroll
    for (int i = 0; i < kPlacesOfBlock; ++i) of_keys[i] += x[i];
    for (int n = 0; n < f.N; ++n) {
      const float4* of = reinterpret_cast<const float4*>(features + n * kPlacesOfBlock);
      float sum = of_projection[n * kPlaceThreads];
#pragma unroll
      for (int i = 0; i < kPlacesOfBlock / 4; ++i) {
        const float4 four = of[i];
        sum += four.x * x[4 * i] + four.y * x[4 * i + 1];
        sum += four.z * x[4 * i + 2] + four.w * x[4 * i + 3];
      }
      of_projection[n * kPlaceThreads] = sum;
    }
  }
  if (h >= f.A) return;
  float* const to = a.of_keys + (int64_t{b} * f.S + s0) * f.A + h;
#pragma unroll
  for (int i = 0; i < kPlacesOfBlock; ++i)
    if (i < count) to[int64_t{i} * f.A] = of_keys[i];
  a.of_v[block * f.A + h] = of_v;
  for (int n = 0; n < f.N; ++n)
    a.of_projection[(block * f.N + n) * f.A + h] = of_projection[n * kPlaceThreads];
}

// out (n,) = the sum of `count` rows. A block has kWarp columns, of which its warps share out the
// rows; what they come to is added in order.
constexpr int kSumWarps = 16, kSumThreads = kWarp * kSumWarps;

static __global__ void __launch_bounds__(kSumThreads)
    sum_parts(const float* parts, int64_t count, int64_t n, float* out) {
  const int thread = threadIdx.x, warp = thread / kWarp;
  const int64_t i = int64_t{blockIdx.x} * kWarp + thread % kWarp;
  const int64_t end = i < n ? count : 0;
  float sum = 0.f;
#pragma unroll 8
  for (int64_t p = warp; p < end; p += kSumWarps) sum += parts[p * n + i];
  float* const scratch = shared_memory();
  scratch[thread] = sum;
  __syncthreads();
  if (warp > 0 || i >= n) return;
  for (int w = 1; w < kSumWarps; ++w) sum += scratch[w * kWarp + thread];
  out[i] = sum;
}

}  // namespace seq2seq_fast
