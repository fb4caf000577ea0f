// Gradients of additive scores: with x = exp(2q) exp(2k), r = 2 / (1 + x) and g = d loss / d score,
//
//   e = g (1 - tanh^2) = g r (x r),   dq[t,h] = v_h sum_s e,   dk[s,h] = v_h sum_t e
//   g tanh = g - g r,                 dv[h] = sum_{b,t,s} g tanh
//
// Two features share one reciprocal: 1 / d1 = d2 (1 / (d1 d2)). Nine instructions an element.
//
// Grid: one block for each (64 features of b, range of keys, range of queries). A lane owns two
// features, a warp eight queries of a tile, whose dq is in registers; keys and dk are in shared
// memory. In each step the warps work on different keys, one further in the next, so that every
// dk[s,h] is added up by one warp at a time, always in the same order. What a block does not see
// to the end it writes as a part; join_parts adds parts up, in order as well.
#pragma once
#include "powers.cuh"

namespace seq2seq_fast {

constexpr int kQueriesOfWarp = 8, kMostKeys = 64, kFeaturesOfBlock = 64;
// With eight, two blocks a multiprocessor would leave too few registers on sm_100 and sm_120.
constexpr int kMostBackwardWarps = 7;
// Of a key in shared memory: grad of 56 queries, its sum over each warp's eight, and 5 floats that
// spread keys over the banks.
constexpr int kGradSums = kQueriesOfWarp * kMostBackwardWarps;
constexpr int kGradStride = kGradSums + kMostBackwardWarps + 5;

struct BackwardArguments {
  Powers query, keys;
  const float* v;            // (Hp + 1,)
  View raw_query, raw_keys;  // for the exact path
  View grad;                 // (B, T, S)
  // (parts, B, T, H), (parts, B, S, H), (B ranges_t ranges_s, H). Of one part it is the gradient
  // itself, in `type`, else float32 and without the factor v. Null where it is not wanted.
  void *to_query, *to_keys;
  float* to_v;
  Type type;
  int B, T, S, H;
  int blocks_h, ranges_s, ranges_t, keys_of_range, tiles_of_range;
};

// Floats of shared memory: keys and dk side by side, and grad, in whose place dv of all warps
// comes.
__host__ __device__ constexpr int backward_shared_floats(int keys, int warps) {
  const int of_grad = keys * kGradStride, of_dv = warps * kFeaturesOfBlock;
  return keys * 2 * kFeaturesOfBlock + (of_grad > of_dv ? of_grad : of_dv);
}

// Gradients of eight queries and one key in a lane's two features.
template <Path path>
__device__ __forceinline__ void add_gradients(const float (&q)[kQueriesOfWarp][2], float2 k,
                                              const float* grad, float grad_sum,
                                              float (&dq)[kQueriesOfWarp][2], float2& dk,
                                              float2& dv) {
  float sum0 = 0.f, sum1 = 0.f;  // of g tanh, or in Path::kPairs of -g tanh
  if constexpr (path == Path::kPairs) sum0 = sum1 = -grad_sum;
#pragma unroll
  for (int i = 0; i < kQueriesOfWarp; ++i) {
    const float g = grad[i];
    if constexpr (path == Path::kSmall) {
      // q = (exp(2q) - 1) / 2, k = exp(2k) - 1, z = (x - 1) / 2. The gradients of a softmax sum to
      // zero, and what is left of them is what differs from 1 in 1 - tanh^2.
      const float z0 = q[i][0] * k.x + (0.5f * k.x + q[i][0]), u0 = z0 + 1.f;
      const float z1 = q[i][1] * k.y + (0.5f * k.y + q[i][1]), u1 = z1 + 1.f;
      const float r = reciprocal(u0 * u1);
      const float y0 = z0 * (u1 * r), y1 = z1 * (u0 * r);
      const float gy0 = g * y0, gy1 = g * y1, e0 = g - gy0 * y0, e1 = g - gy1 * y1;
      sum0 += gy0, sum1 += gy1;
      dq[i][0] += e0, dq[i][1] += e1;
      dk.x += e0, dk.y += e1;
    } else {
      const float x0 = q[i][0] * k.x, d0 = 0.5f * x0 + 0.5f;
      const float x1 = q[i][1] * k.y, d1 = 0.5f * x1 + 0.5f;
      const float r = reciprocal(d0 * d1), r0 = d1 * r, r1 = d0 * r;
      const float gr0 = g * r0, gr1 = g * r1, grx0 = gr0 * x0, grx1 = gr1 * x1;
      sum0 += gr0, sum1 += gr1;
      dq[i][0] += grx0 * r0, dq[i][1] += grx1 * r1;
      dk.x += grx0 * r0, dk.y += grx1 * r1;
    }
  }
  if constexpr (path == Path::kPairs) sum0 = -sum0, sum1 = -sum1;
  dv.x += sum0, dv.y += sum1;
}

// gridDim (B blocks_h, ranges_s, ranges_t), blockDim (32, warps)
static __global__ void __launch_bounds__(kWarp* kMostBackwardWarps, 2)
    additive_scores_backward(BackwardArguments a) {
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const int b = blockIdx.x / a.blocks_h, range_s = blockIdx.y, range_t = blockIdx.z;
  const int h0 = blockIdx.x % a.blocks_h * kFeaturesOfBlock, h = h0 + 2 * lane;
  const int s0 = range_s * a.keys_of_range, n_s = min(a.keys_of_range, a.S - s0);
  const int tile = kQueriesOfWarp * warps, first_t = range_t * a.tiles_of_range * tile;
  const int last_t = min(a.T, first_t + a.tiles_of_range * tile);
  const int Hp = a.query.Hp;

  float4* const keys = reinterpret_cast<float4*>(shared_memory());  // (n_s, 32): k, k, dk, dk
  float* const grads = reinterpret_cast<float*>(keys + a.keys_of_range * kWarp);

  // Every gradient has a factor v that is left to the end, unless v is infinite or NaN.
  const auto v_last = [&] { return a.v[Hp] < INFINITY; };
  // Of queries [t, t + n) with the range of keys
  const auto path_of = [&](int t, int n) {
    return choose_path(a.query.largest(b, t, n), a.keys.largest(b, s0, n_s), 0.f);
  };
  // Keys stay powers minus one where all the queries they meet allow it.
  const auto small = [&] { return path_of(first_t, last_t - first_t) == Path::kSmall; };
  const bool even_out = !small();
  for (int s = warp; s < n_s; s += warps) {
    float2 k = make_float2(0.f, 0.f);
    if (h < Hp) k = *reinterpret_cast<const float2*>(a.keys.row(b, s0 + s) + h);
    if (even_out && a.keys.minus_one(b, s0 + s)) k.x += 1.f, k.y += 1.f;
    keys[s * kWarp + lane] = make_float4(k.x, k.y, 0.f, 0.f);
  }

  float2 dv = make_float2(0.f, 0.f);
#pragma unroll 1
  for (int t0 = first_t; t0 < last_t; t0 += tile) {
    // grad, eight keys by four queries at a time, and its sums over the queries of a warp
    bool finite = true;
    for (int s = 8 * warp + lane % 8; s < n_s; s += 8 * warps)
      for (int t = lane / 8; t < tile; t += 4) {
        const float g = t0 + t < last_t ? a.grad(b, t0 + t, s0 + s) : 0.f;
        finite = finite && magnitude(g) < 0x7f800000u;
        grads[s * kGradStride + t] = g;
      }
    const bool all_finite = !__syncthreads_or(!finite);
    for (int s = warp; s < n_s; s += warps) {
      if (lane >= warps) continue;
      float sum = 0.f, *row = grads + s * kGradStride;
      for (int t = 0; t < kQueriesOfWarp; ++t) sum += row[lane * kQueriesOfWarp + t];
      row[kGradSums + lane] = sum;
    }
    Path path = path_of(t0, min(tile, last_t - t0));
    if (!all_finite || !v_last())
      path = Path::kExact;
    else if (path == Path::kSmall && !small())
      path = Path::kPairs;

    const int my_t = t0 + warp * kQueriesOfWarp;
    float q[kQueriesOfWarp][2], dq[kQueriesOfWarp][2] = {};
#pragma unroll
    for (int i = 0; i < kQueriesOfWarp; ++i) {
      const int t = min(my_t + i, a.T - 1);
      float2 x = make_float2(0.f, 0.f);
      if (path != Path::kExact && h < Hp) {
        x = *reinterpret_cast<const float2*>(a.query.row(b, t) + h);
        if (path == Path::kPairs) {
          const float one = a.query.minus_one(b, t) ? 1.f : 0.f;
          x = make_float2(2.f * x.x + one, 2.f * x.y + one);
        }
      }
      q[i][0] = x.x, q[i][1] = x.y;
    }

    const int chunk = (n_s + warps - 1) / warps;
    const auto add_chunk = [&]<Path form>(int first, int last) {
      float4 *key = keys + first * kWarp + lane, *const end = keys + last * kWarp + lane;
      const float* row = grads + first * kGradStride + warp * kQueriesOfWarp;
      const int to_sum = kGradSums - (kQueriesOfWarp - 1) * warp;
#pragma unroll 1
      for (; key < end; key += kWarp, row += kGradStride) {
        float2 k = make_float2(key->x, key->y), dk = make_float2(key->z, key->w);
        float g[kQueriesOfWarp];
#pragma unroll
        for (int i = 0; i < kQueriesOfWarp; i += 4) {
          const float4 four = *reinterpret_cast<const float4*>(row + i);
          g[i] = four.x, g[i + 1] = four.y, g[i + 2] = four.z, g[i + 3] = four.w;
        }
        add_gradients<form>(q, k, g, row[to_sum], dq, dk, dv);
        key->z = dk.x, key->w = dk.y;
      }
    };
    const auto raw = [&](const View& x, int n) {
      return make_float2(h < a.H ? x(b, n, h) : 0.f, h + 1 < a.H ? x(b, n, h + 1) : 0.f);
    };
    const auto add_exact = [&](int first, int last) {
      const float2 v =
          v_last() ? make_float2(1.f, 1.f) : make_float2(a.v[min(h, Hp)], a.v[min(h + 1, Hp)]);
#pragma unroll 1
      for (int i = 0; i < kQueriesOfWarp && my_t + i < last_t; ++i) {
        const float2 x = raw(a.raw_query, my_t + i);
        float2 sum = make_float2(0.f, 0.f);
#pragma unroll 1
        for (int s = first; s < last; ++s) {
          const float2 k = raw(a.raw_keys, s0 + s);
          const float g = grads[s * kGradStride + warp * kQueriesOfWarp + i];
          const float y0 = tanhf(x.x + k.x), e0 = v.x * g * ((1.f - y0) * (1.f + y0));
          const float y1 = tanhf(x.y + k.y), e1 = v.y * g * ((1.f - y1) * (1.f + y1));
          float4& key = keys[s * kWarp + lane];
          key.z += e0, key.w += e1;
          sum.x += e0, sum.y += e1;
          dv.x += g * y0, dv.y += g * y1;
        }
#pragma unroll
        for (int j = 0; j < kQueriesOfWarp; ++j)
          if (j == i) dq[j][0] += sum.x, dq[j][1] += sum.y;
      }
    };
#pragma unroll 1
    for (int step = 0; step < warps; ++step) {
      __syncthreads();
      const int first = (step + warp) % warps * chunk, last = min(n_s, first + chunk);
      if (path == Path::kPairs)
        add_chunk.template operator()<Path::kPairs>(first, last);
      else if (path == Path::kSmall)
        add_chunk.template operator()<Path::kSmall>(first, last);
      else
        add_exact(first, last);
    }
    __syncthreads();  // before the next tile's grad takes the place of this one's

    if (a.to_query == nullptr) continue;
#pragma unroll
    for (int i = 0; i < kQueriesOfWarp; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (my_t + i >= last_t || h + j >= a.H) continue;
        const int64_t at = (static_cast<int64_t>(b) * a.T + my_t + i) * a.H + h + j;
        const int64_t part = static_cast<int64_t>(range_s) * a.B * a.T * a.H;
        if (a.ranges_s == 1)
          store(a.to_query, a.type, at, (v_last() ? a.v[h + j] : 1.f) * dq[i][j]);
        else
          static_cast<float*>(a.to_query)[part + at] = dq[i][j];
      }
  }

  if (a.to_keys != nullptr)
    for (int s = warp; s < n_s; s += warps) {
      const float4 key = keys[s * kWarp + lane];
      const int64_t at = (static_cast<int64_t>(b) * a.S + s0 + s) * a.H + h;
      const int64_t part = static_cast<int64_t>(range_t) * a.B * a.S * a.H;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float dk = j == 0 ? key.z : key.w;
        if (h + j >= a.H) continue;
        if (a.ranges_t == 1)
          store(a.to_keys, a.type, at + j, (v_last() ? a.v[h + j] : 1.f) * dk);
        else
          static_cast<float*>(a.to_keys)[part + at + j] = dk;
      }
    }
  if (a.to_v == nullptr) return;
  reinterpret_cast<float2*>(grads)[warp * kWarp + lane] = dv;
  __syncthreads();
  const int thread = warp * kWarp + lane;
  for (int i = thread; i < kFeaturesOfBlock; i += warps * kWarp) {
    float sum = 0.f;
    for (int n = 0; n < warps; ++n) sum += grads[n * kFeaturesOfBlock + i];
    if (h0 + i < a.H)
      a.to_v[((static_cast<int64_t>(b) * a.ranges_t + range_t) * a.ranges_s + range_s) * a.H + h0 +
             i] = sum;
  }
}

struct JoinArguments {
  const float* parts;  // (count, n)
  const float* v;      // (Hp + 1,) where column i of n belongs to feature i % H, or null
  void* sum;           // (n,) of `type`
  Type type;
  int64_t n;
  int count, H, Hp;
};

// Grid: one block per 32 columns; warps take every eighth part, and their sums are added in order.
constexpr int kJoinWarps = 8;
static __global__ void __launch_bounds__(kWarp* kJoinWarps, 1) join_parts(JoinArguments a) {
  float* const sums = shared_memory();  // (warps, 32)
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  float sum = 0.f;
  if (i < a.n)
    for (int part = warp; part < a.count; part += kJoinWarps) sum += a.parts[part * a.n + i];
  sums[warp * kWarp + lane] = sum;
  __syncthreads();
  if (warp != 0 || i >= a.n) return;
  for (int n = 1; n < kJoinWarps; ++n) sum += sums[n * kWarp + lane];
  // As in the blocks themselves: a factor v that is not finite is in the sum already.
  if (a.v != nullptr && a.v[a.Hp] < INFINITY) sum *= a.v[i % a.H];
  store(a.sum, a.type, i, sum);
}

}  // namespace seq2seq_fast
