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
  return int64_t{S} + D + warps + 2 * warps * kWarp;
}

// Adds g (1 - tanh^2) of two features to sum.
template <Path path>
__device__ __forceinline__ void add_slopes(float2& sum, float g, float2 q, float2 k) {
  if constexpr (path == Path::kSmall) {  // q = (exp(2q) - 1) / 2, k = exp(2k) - 1
    const float z0 = q.x * k.x + (0.5f * k.x + q.x), u0 = z0 + 1.f;
    const float z1 = q.y * k.y + (0.5f * k.y + q.y), u1 = z1 + 1.f;
    const float r = reciprocal(u0 * u1), y0 = z0 * (u1 * r), y1 = z1 * (u0 * r);
    sum.x += g - g * y0 * y0, sum.y += g - g * y1 * y1;
  } else {
    const float x0 = q.x * k.x, d0 = 0.5f * x0 + 0.5f;
    const float x1 = q.y * k.y, d1 = 0.5f * x1 + 0.5f;
    const float r = reciprocal(d0 * d1), r0 = d1 * r, r1 = d0 * r;
    sum.x += g * r0 * x0 * r0, sum.y += g * r1 * x1 * r1;
  }
}

// What a block of `warps` shares, in `memory`.
template <int warps>
struct RowBackward {
  float* const scratch;  // (2, threads)
  float* const dc;       // (D,)
  float* const sums;     // (warps,)
  float* const grads;    // (S,), of weights, then of scores
  __device__ __forceinline__ RowBackward(float* memory, int D)
      : scratch(memory), dc(memory + 2 * warps * kWarp), sums(dc + D), grads(sums + warps) {}
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

// sum_s w dw of a row, of which gradient(s) are dw; each is asked for once, by the thread that
// keeps it.
template <int warps, typename F>
__device__ __forceinline__ float weighted_sum(const OneQueryBackwardArguments& a, int row,
                                              float* sums, F gradient) {
  const int thread = threadIdx.x;
  float dot = 0.f;
  for (int s = thread; s < a.S; s += kWarp * warps) dot += a.weights(row, s) * gradient(s);
  dot = warp_sum(dot);
  if (thread % kWarp == 0) sums[thread / kWarp] = dot;
  __syncthreads();
  dot = 0.f;
  for (int w = 0; w < warps; ++w) dot += sums[w];
  return dot;
}

// The query's gradient in a slice of the features, given those of scores and whether all are
// finite.
template <int warps>
__device__ __forceinline__ void retreat_slopes(const OneQueryBackwardArguments& a, int b, int row,
                                               int slice, float* scratch, const float* grads,
                                               bool all_finite) {
  constexpr int threads = kWarp * warps;
  const int thread = threadIdx.x, lane = thread % kWarp;
  float max_q = 0.f, max_k = 0.f, max_v = 0.f;
  for (int h = lane; h < a.A; h += kWarp) {
    max_q = larger(max_q, a.query(row, h)), max_v = larger(max_v, a.v(0, 0, h));
  }
  for (int i = lane; i * kRowsOfBlock < a.S; i += kWarp) max_k = larger(max_k, a.powers.max(b, i));
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    max_q = larger(max_q, __shfl_xor_sync(kAll, max_q, lanes));
    max_k = larger(max_k, __shfl_xor_sync(kAll, max_k, lanes));
    max_v = larger(max_v, __shfl_xor_sync(kAll, max_v, lanes));
  }
  const bool finite = all_finite && magnitude(max_v) < 0x7f800000u;
  const Path path = finite ? choose_path(max_q, max_k, 0.f) : Path::kExact;

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
    const auto add_keys = [&]<Path form>(float2 q) {
#pragma unroll 4
      for (int s = group; s < a.S; s += groups) {
        float2 k = *reinterpret_cast<const float2*>(a.powers.row(b, s) + h);
        if (form == Path::kPairs && a.powers.minus_one(b, s)) k.x += 1.f, k.y += 1.f;
        add_slopes<form>(sum, grads[s], q, k);
      }
      sum.x *= v.x, sum.y *= v.y;
    };
    if (group >= groups) {
    } else if (path == Path::kSmall) {
      add_keys.template operator()<Path::kSmall>(
          make_float2(0.5f * expm1f(2.f * raw.x), 0.5f * expm1f(2.f * raw.y)));
    } else if (path == Path::kPairs) {
      add_keys.template operator()<Path::kPairs>(make_float2(expf(2.f * raw.x), expf(2.f * raw.y)));
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
  const float dot = weighted_sum<warps>(
      a, row, of_row.sums, [&](int s) { return all ? grads[s] : grads[s] = a.of_weights(b, s); });
  bool finite = true;
  for (int s = threadIdx.x; s < a.S; s += kWarp * warps) {
    const float ds = a.weights(row, s) * (grads[s] - dot);
    grads[s] = ds;
    if (part == 0) a.to_scores(row, s) = ds;
    finite = finite && magnitude(ds) < 0x7f800000u;
  }
  const bool all_finite = !__syncthreads_or(!finite);
  retreat_slopes<warps>(a, b, row, part, of_row.scratch, grads, all_finite);
}

}  // namespace seq2seq_fast
