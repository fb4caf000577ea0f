// Attention of one query backward: with dcontext and dweights given,
//
//   dw[s] = sum_d values[s,d] dcontext[d] + dweights[s],  ds = w (dw - sum_s w dw),
//   dq[h] = v[h] sum_s ds[s] (1 - tanh^2(q[h] + k[s,h]))
//
// where two features share a reciprocal as in additive_scores_backward.cuh.
//
// A block has a batch row. A warp takes four values at a time, lanes along D, in fours where they
// can be read so; then groups of threads share out the keys, each thread with two features, and
// their parts are added in order. Where rows would leave most of a GPU idle, blocks share one in
// two stages: first the values, in ranges of the source, then the slopes, in slices of the
// features.
#pragma once
#include <algorithm>

#include "powers.cuh"

namespace seq2seq_fast {

constexpr int kQueryBackwardWarps = 16, kQueryBackwardThreads = kWarp * kQueryBackwardWarps;
constexpr int kValuesOfWarp = 4;
// Of a row, what its path is chosen by: the largest |query| and |v|, and of the keys' maxima the
// largest and the smallest.
constexpr int kExtents = 4;
// Of a score: times exp(21), what exp(2q) left out can add, and any number of keys it stays finite.
constexpr float kMostGradient = 1e22f;

// Rows are of one step, or of all, (T B, width); those of `carried` are of one step.
struct OneQueryBackwardArguments {
  FloatRows grad_context, carried;            // (B, D), whose sum it is; carried may be absent
  FloatRows grad_weights, weights;            // (B, S)
  FloatRows query;                            // (B, A)
  View keys, values, v;                       // (B, S, A), (B, S, D), (1, 1, A), float32
  Powers powers;                              // of keys
  FloatRows to_context, to_scores, to_query;  // (B, D), (B, S), (B, A)
  FloatRows of_weights;                       // (B, S) of one step, between the stages; or absent
  int S, A, D;
  bool values_by_four;  // whether their rows can be read in aligned fours
  int ranges, keys_of_range, slices, pairs_of_slice;
};

// Whether blocks of so many idle multiprocessors to a row should share rows, `least` being the
// elements of keys and values from which a second stage is worth what it costs.
inline bool share_rows(OneQueryBackwardArguments& a, int64_t rows, int multiprocessors,
                       int64_t least) {
  constexpr int64_t kLeastOfRange = 8192;  // elements, 32 KiB
  constexpr int kPairs = kWarp;            // whose keys lie in 256 bytes
  const int64_t idle = std::max<int64_t>(1, multiprocessors / std::max<int64_t>(1, rows));
  const int pairs = static_cast<int>(round_up(a.A, kFeatures)) / 2;
  const auto share = [&](int64_t n, int64_t most, int unit) {
    const int64_t parts = std::max<int64_t>(1, std::min({idle, most, ceil_div(n, unit)}));
    return static_cast<int>(round_up(ceil_div(n, parts), unit));
  };
  a.keys_of_range = share(a.S, int64_t{a.S} * a.D / kLeastOfRange, kValuesOfWarp);
  a.ranges = static_cast<int>(ceil_div(a.S, a.keys_of_range));
  a.pairs_of_slice = share(pairs, idle, kPairs);
  a.slices = static_cast<int>(ceil_div(pairs, a.pairs_of_slice));
  return idle > 1 && int64_t{a.S} * (a.A + a.D) >= least;
}

__host__ __device__ inline int64_t one_query_backward_shared_floats(int S, int D, int warps) {
  return int64_t{S} + D + 2 * warps * kWarp;
}

// Adds g (1 - tanh^2) of two features to sum; with Path::kPairs, without a factor exp(2q).
template <Path path>
__device__ __forceinline__ void add_slopes(float2& sum, float g, float2 q, float2 k) {
  if constexpr (path == Path::kSmall) {  // q = (exp(2q) - 1) / 2, k = exp(2k) - 1
    const float z0 = q.x * k.x + (0.5f * k.x + q.x), u0 = z0 + 1.f;
    const float z1 = q.y * k.y + (0.5f * k.y + q.y), u1 = z1 + 1.f;
    const float r = reciprocal(u0 * u1), y0 = z0 * (u1 * r), y1 = z1 * (u0 * r);
    sum.x += g - g * y0 * y0, sum.y += g - g * y1 * y1;
  } else {
    const float d0 = q.x * k.x + 0.5f, d1 = q.y * k.y + 0.5f;  // q = exp(2q) / 2, k = exp(2k)
    const float r = reciprocal(d0 * d1), r0 = d1 * r, r1 = d0 * r;
    sum.x += g * r0 * k.x * r0, sum.y += g * r1 * k.y * r1;  // in an order that stays in range
  }
}

// What a block of `warps` shares, in `memory`.
template <int warps>
struct RowBackward {
  float* const scratch;  // (2, threads)
  float* const dc;       // (D,)
  float* const grads;    // (S,), of weights, then of scores
  __device__ __forceinline__ RowBackward(float* memory, int D)
      : scratch(memory), dc(memory + 2 * warps * kWarp), grads(dc + D) {}
};

// The gradients of weights in a range of the source, which put(s, gradient) takes, of row b of a
// step, which is the row-th of all. `later(s)` is what else comes to a weight.
template <int warps, typename F, typename P>
__device__ __forceinline__ void retreat_values(const OneQueryBackwardArguments& a, int b, int row,
                                               int range, float* dc, F later, P put) {
  constexpr int threads = kWarp * warps;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int first = range * a.keys_of_range, end = min(a.S, first + a.keys_of_range);
  for (int d = thread; d < a.D; d += threads) {
    dc[d] = a.grad_context(row, d) + a.carried.get(b, d);
    if (range == 0) a.to_context(row, d) = dc[d];
  }
  __syncthreads();
  // Values of a warp's four behind the last one are that one again.
  for (int s0 = first + warp * kValuesOfWarp; s0 < end; s0 += warps * kValuesOfWarp) {
    const float* value[kValuesOfWarp];
#pragma unroll
    for (int j = 0; j < kValuesOfWarp; ++j)
      value[j] = static_cast<const float*>(a.values.data) + b * a.values.stride[0] +
                 min(s0 + j, a.S - 1) * a.values.stride[1];
    float products[kValuesOfWarp] = {};
    if (a.values_by_four) {
#pragma unroll 2
      for (int d = 4 * lane; d < a.D; d += 4 * kWarp) {
        const float4 c = *reinterpret_cast<const float4*>(dc + d);
#pragma unroll
        for (int j = 0; j < kValuesOfWarp; ++j) {
          const float4 x = *reinterpret_cast<const float4*>(value[j] + d);
          products[j] += (x.x * c.x + x.y * c.y) + (x.z * c.z + x.w * c.w);
        }
      }
    } else {
#pragma unroll 2
      for (int d = lane; d < a.D; d += kWarp)
#pragma unroll
        for (int j = 0; j < kValuesOfWarp; ++j)
          products[j] += value[j][d * a.values.stride[2]] * dc[d];
    }
    const float product = warp_sum_of_four(products);
    const int s = s0 + lane / 8;
    if (lane % 8 == 0 && s < end) put(s, product + a.grad_weights(row, s) + later(s));
  }
  __syncthreads();
}

// What join(i, x, y) makes of x[i] of all threads of a block. scratch (n, warps)
template <int warps, int n, typename F>
__device__ __forceinline__ void of_block(float (&x)[n], float* scratch, F join) {
  static_assert(kWarp % warps == 0);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto of_lanes = [&](int lanes) {
    for (; lanes > 0; lanes /= 2)
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] = join(i, x[i], __shfl_xor_sync(kAll, x[i], lanes));
  };
  of_lanes(kWarp / 2);
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (lane == 0) scratch[i * warps + warp] = x[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = scratch[i * warps + lane % warps];
  of_lanes(warps / 2);
}

// A thread's part of sum_s w dw of a row, of which gradient(s) are dw.
template <int warps, typename F>
__device__ __forceinline__ float weighted_sum(const OneQueryBackwardArguments& a, int row,
                                              F gradient) {
  float dot = 0.f;
  for (int s = threadIdx.x; s < a.S; s += kWarp * warps) dot += a.weights(row, s) * gradient(s);
  return dot;
}

// A thread's part of a row's extents.
template <int warps>
__device__ __forceinline__ void add_extents(const OneQueryBackwardArguments& a, int b, int row,
                                            float* extents) {
  for (int h = threadIdx.x; h < a.A; h += kWarp * warps) {
    extents[0] = larger(extents[0], a.query(row, h));
    extents[1] = larger(extents[1], a.v(0, 0, h));
  }
  for (int i = threadIdx.x; i * kRowsOfBlock < a.S; i += kWarp * warps) {
    const float k = a.powers.max(b, i);
    extents[2] = larger(extents[2], k), extents[3] = fminf(extents[3], k);
  }
}

// The query's gradient in a slice of the features, given those of scores, whether none is too large
// for what exp(2q) is left out of, and the row's extents.
template <int warps>
__device__ __forceinline__ void retreat_slopes(const OneQueryBackwardArguments& a, int b, int row,
                                               int slice, float* scratch, const float* grads,
                                               bool all_moderate, const float* extents) {
  constexpr int threads = kWarp * warps;
  const int thread = threadIdx.x;
  const float max_q = extents[0], max_v = extents[1], max_k = extents[2], min_k = extents[3];
  const bool moderate = all_moderate && magnitude(max_v) < 0x7f800000u;
  const Path path = moderate ? choose_path(max_q, max_k, 0.f) : Path::kExact;
  // Some keys are powers, some are powers minus one: each is asked then.
  const float one = max_k < kSmallMagnitude ? 1.f : 0.f;
  const bool mixed = one == 0.f && min_k < kSmallMagnitude;

  const int first = slice * a.pairs_of_slice;
  const int end = min(a.powers.Hp / 2, first + a.pairs_of_slice);
  for (int p0 = first; p0 < end; p0 += threads) {
    const int n = min(threads, end - p0), groups = threads / n;
    const int group = thread / n, h = 2 * (p0 + thread % n);
    const auto pair_of = [&](const auto& x) {
      return make_float2(h < a.A ? x(h) : 0.f, h + 1 < a.A ? x(h + 1) : 0.f);
    };
    const float2 raw = pair_of([&](int i) { return a.query(row, i); });
    const float2 v = pair_of([&](int i) { return a.v(0, 0, i); });
    float2 sum = make_float2(0.f, 0.f);
    const auto add_keys = [&]<Path form, bool asked = false>(float2 q) {
      constexpr int kAtOnce = 4;
      const float* from = a.powers.row(b, group) + h;
      const int64_t step = int64_t{groups} * a.powers.Hp;
      const auto add = [&](int s, bool all) {  // or what is left of the last ones
        float2 k[kAtOnce];
        float g[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const bool there = all || s + j * groups < a.S;
          k[j] = *reinterpret_cast<const float2*>(from + (there ? j * step : 0));
          g[j] = there ? grads[s + j * groups] : 0.f;
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          float plus = one;
          if (asked) plus = a.powers.minus_one(b, min(s + j * groups, a.S - 1)) ? 1.f : 0.f;
          if (form == Path::kPairs) k[j].x += plus, k[j].y += plus;
          add_slopes<form>(sum, g[j], q, k[j]);
        }
        from += kAtOnce * step;
      };
      int s = group;
#pragma unroll 1
      for (; s + (kAtOnce - 1) * groups < a.S; s += kAtOnce * groups) add(s, true);
      if (s < a.S) add(s, false);
      sum.x *= v.x, sum.y *= v.y;
    };
    if (group >= groups) {
    } else if (path == Path::kSmall) {
      add_keys.template operator()<Path::kSmall>(
          make_float2(0.5f * expm1f(2.f * raw.x), 0.5f * expm1f(2.f * raw.y)));
    } else if (path == Path::kPairs) {
      const float x0 = expf(2.f * raw.x), x1 = expf(2.f * raw.y);
      const float2 half = make_float2(0.5f * x0, 0.5f * x1);
      if (mixed)
        add_keys.template operator()<Path::kPairs, true>(half);
      else
        add_keys.template operator()<Path::kPairs>(half);
      sum.x *= x0, sum.y *= x1;
    } else {
      for (int s = group; s < a.S; s += groups) {
        const float2 k = pair_of([&](int i) { return a.keys(b, s, i); });
        const float y0 = tanhf(raw.x + k.x), y1 = tanhf(raw.y + k.y);
        sum.x += grads[s] * v.x * ((1.f - y0) * (1.f + y0));
        sum.y += grads[s] * v.y * ((1.f - y1) * (1.f + y1));
      }
    }
    scratch[2 * thread] = sum.x, scratch[2 * thread + 1] = sum.y;
    __syncthreads();
    for (int i = thread; i < 2 * n; i += threads) {
      float dq = 0.f;
      for (int g = 0; g < groups; ++g) dq += scratch[2 * n * g + i];
      if (2 * p0 + i < a.A) a.to_query(row, 2 * p0 + i) = dq;
    }
    __syncthreads();
  }
}

// All of a row, or a range of its values, or a slice of its slopes.
enum class Stage : int { kAll, kValues, kSlopes };

// The work of a block of `warps`: the part-th of row b of a step, which is the row-th of all.
template <int warps>
__device__ __forceinline__ void retreat_one_query(const OneQueryBackwardArguments& a, Stage stage,
                                                  int b, int row, int part, float* memory) {
  const RowBackward<warps> of_row(memory, a.D);
  float* const grads = of_row.grads;
  const bool all = stage == Stage::kAll;
  float x[1 + kExtents] = {0.f, 0.f, 0.f, 0.f, INFINITY};             // sum_s w dw, and extents
  if (stage != Stage::kValues) add_extents<warps>(a, b, row, x + 1);  // on their way meanwhile
  if (stage != Stage::kSlopes)
    retreat_values<warps>(
        a, b, row, part, of_row.dc, [](int) { return 0.f; },
        [&](int s, float gradient) {
          if (all)
            grads[s] = gradient;
          else
            a.of_weights(b, s) = gradient;
        });
  if (stage == Stage::kValues) return;
  x[0] = weighted_sum<warps>(a, row, [&](int s) {
    if (!all) grads[s] = a.of_weights(b, s);
    return grads[s];
  });
  of_block<warps>(x, of_row.scratch, [](int i, float u, float v) {
    return i == 0 ? u + v : i == kExtents ? fminf(u, v) : larger(u, v);
  });
  bool moderate = true;
  for (int s = threadIdx.x; s < a.S; s += kWarp * warps) {
    const float ds = a.weights(row, s) * (grads[s] - x[0]);
    grads[s] = ds;
    if (part == 0) a.to_scores(row, s) = ds;
    moderate = moderate && magnitude(ds) < __float_as_uint(kMostGradient);
  }
  const bool all_moderate = !__syncthreads_or(!moderate);
  retreat_slopes<warps>(a, b, row, part, of_row.scratch, grads, all_moderate, x + 1);
}

}  // namespace seq2seq_fast
