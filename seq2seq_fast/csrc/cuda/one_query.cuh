// Additive attention for few queries: scores, softmax and context in one launch.
//
// Grid: one block for each (b, t, part of the source). A warp takes four keys at a time, its lanes
// the features, four each. Then the block turns to the values, threads along D. Where the source is
// split, every block leaves its part unnormalised in global memory, and the last one to arrive
// joins the parts, in their own order.
//
// Keys come prepared (powers, see powers.cuh) or as they are. The latter are read once only, so
// that exponentials need not be kept: 2^(c k + c q) with c = 2 / ln 2, which costs little beside
// the bytes.
#pragma once
#include <type_traits>

#include "pairs.cuh"
#include "softmax.cuh"

namespace seq2seq_fast {

constexpr int kOneQueryWarps = 8, kOneQueryThreads = kWarp * kOneQueryWarps, kKeysOfWarp = 4;
// 2^(c k + c q) loses what c q was rounded by; with a larger query, tanh itself.
constexpr float kMostRawQuery = 8.f;
// Denominators and |v| with which a pair stays finite.
constexpr float kMostRawDenominator = 1e30f, kMostRawV = 1e3f;
constexpr float kToPowerOfTwo = 2.f * 1.44269504f;

struct OneQueryArguments {
  View query, keys, values, v;        // (B, T, H), (B, S, H), (B, S, D), (1, 1, H)
  bool keys_of_queries;               // each has its own, (B T, S, H), which are not prepared
  bool keys_by_four, values_by_four;  // rows may be read four elements at a time
  Powers powers;                      // of keys, or data null
  Softmax softmax;
  void *context, *weights;  // (B, T, D), (B, T, S) of `type`; without context, weights are scores
  Type type;
  float* also;  // (B T, D), ld_also apart: the context once more, or null
  int64_t ld_also;
  const int* live;  // (B,), so many queries are wanted, the first ones; or null
  // Of a split source: exp(x - top) (B, T, S); top, sum and context of each part (B, T, ranges,
  // 2 + D); how many blocks of (b, t) have arrived (B, T), zero before and after. Loops, whose T is
  // 1, use them in every step anew.
  float *exponentials, *parts;
  unsigned* arrived;
  int T, S, H, D, ranges, keys_of_range;
};

__device__ __forceinline__ void store_context(const OneQueryArguments& a, int64_t row, int d,
                                              float c) {
  store(a.context, a.type, row * a.D + d, c);
  if (a.also != nullptr) a.also[row * a.ld_also + d] = c;
}

__host__ __device__ inline int64_t one_query_shared_floats(int H, int keys) {
  return 3 * round_up(H, kFeatures) + round_up(keys, 4) + 4 * kOneQueryThreads;
}

// Four neighbours, aligned to all of them.
__device__ __forceinline__ float4 load_four(const float* from) {
  return *reinterpret_cast<const float4*>(from);
}
__device__ __forceinline__ float4 load_four(const BFloat16* from) {  // the upper half of a float32
  const uint2 x = *reinterpret_cast<const uint2*>(from);
  return make_float4(__uint_as_float(x.x << 16), __uint_as_float(x.x & 0xffff0000u),
                     __uint_as_float(x.y << 16), __uint_as_float(x.y & 0xffff0000u));
}
__device__ __forceinline__ float4 load_four(const Half* from) {
  struct alignas(8) Four {
    Half x[4];
  };
  const Four four = *reinterpret_cast<const Four*>(from);
  return make_float4(to_float(four.x[0]), to_float(four.x[1]), to_float(four.x[2]),
                     to_float(four.x[3]));
}

__device__ __forceinline__ float block_max(float x, float* scratch) {
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  for (int w = 0; w < kOneQueryWarps; ++w) x = fmaxf(x, scratch[w]);
  return x;
}
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = 0.f;
  for (int w = 0; w < kOneQueryWarps; ++w) x += scratch[w];
  return x;
}

enum class Form { kSmallPowers, kPowers, kRaw, kRaw16, kTanh };

// Of Form::kRaw and kRaw16, the largest denominator comes back in `most`. The latter, beside keys
// of 16 bits, rounds at the size of v and saves an instruction: what it adds is v1 tanh + v2 tanh
// less v1 + v2.
template <Form form>
__device__ __forceinline__ void add_four(float& sum, float& most, float4 q, float4 k, float one,
                                         float4 v) {
  if constexpr (form == Form::kTanh) {
    sum += v.x * tanhf(q.x + k.x) + v.y * tanhf(q.y + k.y);
    sum += v.z * tanhf(q.z + k.z) + v.w * tanhf(q.w + k.w);
  } else if constexpr (form == Form::kRaw || form == Form::kRaw16) {
    const auto add = [&](float q1, float q2, float k1, float k2, float v1, float v2) {
      const float x1 = exp2_approximate(k1 * kToPowerOfTwo + q1);
      const float x2 = exp2_approximate(k2 * kToPowerOfTwo + q2);
      if constexpr (form == Form::kRaw) {
        most = fmaxf(most, add_pair<Path::kPairs>(sum, 0.5f, 0.5f, x1, x2, v1, v2));
      } else {
        const float u1 = 0.5f * x1 + 0.5f, u2 = 0.5f * x2 + 0.5f, denominator = u1 * u2;
        sum -= (v1 * u2 + v2 * u1) * reciprocal(denominator);
        most = fmaxf(most, denominator);
      }
    };
    add(q.x, q.y, k.x, k.y, v.x, v.y);
    add(q.z, q.w, k.z, k.w, v.z, v.w);
  } else if constexpr (form == Form::kSmallPowers) {
    add_pair<Path::kSmall>(sum, q.x, q.y, k.x, k.y, v.x, v.y);
    add_pair<Path::kSmall>(sum, q.z, q.w, k.z, k.w, v.z, v.w);
  } else {
    add_pair<Path::kPairs>(sum, q.x, q.y, k.x + one, k.y + one, v.x, v.y);
    add_pair<Path::kPairs>(sum, q.z, q.w, k.z + one, k.w + one, v.z, v.w);
  }
}

// A block's work: part `range` of the source for query (b, t), with `memory` to share. The weights
// and the context are the row-th and the context_row-th.
template <typename T>
__device__ __forceinline__ void attend_one_query(const OneQueryArguments& a, int b, int t,
                                                 int64_t row, int64_t context_row, int range,
                                                 float* memory) {
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  if (a.live != nullptr && t >= a.live[b]) return;
  const int s0 = range * a.keys_of_range, n_s = min(a.keys_of_range, a.S - s0);
  const int Hp = static_cast<int>(round_up(a.H, kFeatures));
  const bool prepared = a.powers.data != nullptr;
  const int of_keys = a.keys_of_queries ? b * a.T + t : b;

  float* const qs = memory;  // (2, Hp): exp(2q) / 2 and (exp(2q) - 1) / 2, or c q and q
  float* const vs = qs + 2 * Hp;
  float* const x = vs + Hp;  // (n_s,)
  float* const scratch = x + round_up(a.keys_of_range, 4);

  float max_q = 0.f, max_v = 0.f;
  for (int h = thread; h < Hp; h += kOneQueryThreads) {
    const float q = h < a.H ? a.query(b, t, h) : 0.f, v = h < a.H ? a.v(0, 0, h) : 0.f;
    max_q = larger(max_q, q), max_v = larger(max_v, v);
    qs[h] = prepared ? 0.5f * expf(2.f * q) : kToPowerOfTwo * q;
    qs[Hp + h] = prepared ? 0.5f * expm1f(2.f * q) : q;
    vs[h] = v;
  }
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    max_q = larger(max_q, __shfl_xor_sync(kAll, max_q, lanes));
    max_v = larger(max_v, __shfl_xor_sync(kAll, max_v, lanes));
  }
  if (lane == 0) scratch[2 * warp] = max_q, scratch[2 * warp + 1] = max_v;
  __syncthreads();
  for (int w = 0; w < kOneQueryWarps; ++w) {
    max_q = larger(max_q, scratch[2 * w]);
    max_v = larger(max_v, scratch[2 * w + 1]);
  }

  float sum_of_v = 0.f;  // of a lane's features
  for (int h = 4 * lane; h < Hp; h += 4 * kWarp) {
    const float4 v4 = load_four(vs + h);
    sum_of_v += (v4.x + v4.y) + (v4.z + v4.w);
  }

  // Scores. Keys of a warp's four behind the last one are that one again.
#pragma unroll 1
  for (int s = warp * kKeysOfWarp; s < n_s; s += kOneQueryWarps * kKeysOfWarp) {
    float sums[kKeysOfWarp] = {};
    const auto add_keys = [&]<Form form>(float one) {
      constexpr bool powers = form == Form::kPowers || form == Form::kSmallPowers;
      using Key = std::conditional_t<powers, float, T>;
      const float* const q = qs + (form == Form::kSmallPowers || form == Form::kTanh ? Hp : 0);
      const Key* k[kKeysOfWarp];
#pragma unroll
      for (int j = 0; j < kKeysOfWarp; ++j) {
        const int64_t key = s0 + min(s + j, n_s - 1);
        if constexpr (powers) {
          k[j] = a.powers.row(b, key) + 4 * lane;
        } else {
          k[j] = static_cast<const T*>(a.keys.data) + of_keys * a.keys.stride[0] +
                 key * a.keys.stride[1] + 4 * lane;
        }
      }
      float most = 0.f;
#pragma unroll 2
      for (int h = 4 * lane; h < (powers ? Hp : a.H); h += 4 * kWarp) {
        const float4 q4 = load_four(q + h), v4 = load_four(vs + h);
#pragma unroll
        for (int j = 0; j < kKeysOfWarp; ++j) {
          add_four<form>(sums[j], most, q4, load_four(k[j]), one, v4);
          k[j] += 4 * kWarp;
        }
      }
      return most;
    };
    const auto add_one_by_one = [&] {
#pragma unroll
      for (int j = 0; j < kKeysOfWarp; ++j)
        for (int h = lane; h < a.H; h += kWarp)
          sums[j] += vs[h] * tanhf(a.query(b, t, h) + a.keys(of_keys, s0 + min(s + j, n_s - 1), h));
    };
    const float max_k = prepared ? a.powers.max(b, (s0 + s) / kRowsOfBlock) : 0.f;
    const Path path = prepared ? choose_path(max_q, max_k, max_v) : Path::kExact;
    if (path == Path::kSmall) {
      add_keys.template operator()<Form::kSmallPowers>(0.f);
    } else if (path == Path::kPairs) {
      add_keys.template operator()<Form::kPowers>(max_k < kSmallMagnitude ? 1.f : 0.f);
    } else if (prepared || !a.keys_by_four) {
      add_one_by_one();
    } else if (max_q >= kSmallMagnitude && max_q < kMostRawQuery && max_v < kMostRawV) {
      constexpr Form form = sizeof(T) == 2 ? Form::kRaw16 : Form::kRaw;
      if constexpr (form == Form::kRaw16)
        for (float& sum : sums) sum = sum_of_v;
      const float most = add_keys.template operator()<form>(0.f);
      const float all = (sums[0] + sums[1]) + (sums[2] + sums[3]);  // NaN where a denominator is
      if (__any_sync(kAll, most > kMostRawDenominator || all != all)) {
        for (float& sum : sums) sum = 0.f;
        add_one_by_one();
      }
    } else {
      add_keys.template operator()<Form::kTanh>(0.f);
    }
    const float sum = warp_sum_of_four(sums);
    const int key = s + lane / 8;
    if (lane % 8 != 0 || key >= n_s) continue;
    if (a.context == nullptr)
      store(a.weights, a.type, row * a.S + s0 + key, sum);
    else
      x[key] = sum;
  }
  if (a.context == nullptr) return;
  __syncthreads();

  float top = -INFINITY, total = 0.f;
  for (int s = thread; s < n_s; s += kOneQueryThreads)
    if (a.softmax.attended(b, t, s0 + s)) {
      x[s] = a.softmax(x[s], b, t, s0 + s);
      top = fmaxf(top, x[s]);
    }
  top = block_max(top, scratch);
  for (int s = thread; s < n_s; s += kOneQueryThreads) {
    x[s] = a.softmax.attended(b, t, s0 + s) ? expf(x[s] - top) : 0.f;
    total += x[s];
  }
  total = block_sum(total, scratch);
  const bool split = a.ranges > 1;
  const int64_t shared_row = int64_t{b} * a.T + t % a.T;  // of what blocks leave for the last one
  for (int s = thread; s < n_s; s += kOneQueryThreads) {
    if (split)
      a.exponentials[shared_row * a.S + s0 + s] = x[s];
    else
      store(a.weights, a.type, row * a.S + s0 + s,
            a.softmax.attended(b, t, s0 + s) ? x[s] / total : 0.f);
  }

  // Context, four of D a thread. Where that leaves threads free, groups of them share out the keys.
  float* const part = a.parts + (shared_row * a.ranges + range) * (2 + a.D);
  for (int d0 = 0; d0 < a.D; d0 += 4 * kOneQueryThreads) {
    const int quads = min(kOneQueryThreads, (a.D - d0 + 3) / 4), groups = kOneQueryThreads / quads;
    const int group = thread / quads, d = d0 + thread % quads * 4;
    const T* from = static_cast<const T*>(a.values.data) + b * a.values.stride[0];
    from += s0 * a.values.stride[1] + d * a.values.stride[2];
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    const int end = group < groups ? n_s : 0;
    if (a.values_by_four) {
#pragma unroll 4  // so many loads on their way
      for (int s = group; s < end; s += groups) {
        const float4 value = load_four(from + s * a.values.stride[1]);
        const float w = x[s];
        sum.x += w * value.x, sum.y += w * value.y, sum.z += w * value.z, sum.w += w * value.w;
      }
    } else {
#pragma unroll 1
      for (int s = group; s < end; s += groups) {
        const T* row = from + s * a.values.stride[1];
        const float w = x[s];
        const int64_t step = a.values.stride[2];
        sum.x += w * to_float(row[0]);
        if (d + 1 < a.D) sum.y += w * to_float(row[step]);
        if (d + 2 < a.D) sum.z += w * to_float(row[2 * step]);
        if (d + 3 < a.D) sum.w += w * to_float(row[3 * step]);
      }
    }
    __syncthreads();
    reinterpret_cast<float4*>(scratch)[thread] = sum;
    __syncthreads();
    for (int i = thread; i < 4 * quads && d0 + i < a.D; i += kOneQueryThreads) {
      float c = 0.f;
      for (int g = 0; g < groups; ++g) c += scratch[4 * quads * g + i];
      if (split)
        part[2 + d0 + i] = c;
      else
        store_context(a, context_row, d0 + i, total == 0.f ? 0.f : c / total);
    }
  }
  if (!split) return;

  if (thread == 0) part[0] = top, part[1] = total;
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    // The last one makes it zero again.
    const auto others = static_cast<unsigned>(a.ranges - 1);
    scratch[0] = atomicInc(a.arrived + shared_row, others) == others ? 1.f : 0.f;
  }
  __syncthreads();
  if (scratch[0] == 0.f) return;
  __threadfence();

  // The sum of a part is at least 1, unless none of its places is attended to.
  const float* const parts = a.parts + shared_row * a.ranges * (2 + a.D);
  const auto read = [&](int i, int64_t at) { return __ldcg(parts + i * (2 + a.D) + at); };
  top = -INFINITY, total = 0.f;
  for (int i = 0; i < a.ranges; ++i)
    if (read(i, 1) != 0.f) top = fmaxf(top, read(i, 0));
  for (int i = 0; i < a.ranges; ++i)
    if (read(i, 1) != 0.f) total += read(i, 1) * expf(read(i, 0) - top);
  for (int s = thread; s < a.S; s += kOneQueryThreads) {
    const int i = s / a.keys_of_range;
    const float w = __ldcg(a.exponentials + shared_row * a.S + s) * expf(read(i, 0) - top) / total;
    store(a.weights, a.type, row * a.S + s, a.softmax.attended(b, t, s) ? w : 0.f);
  }
  for (int d = thread; d < a.D; d += kOneQueryThreads) {
    float c = 0.f;
    for (int i = 0; i < a.ranges; ++i)
      if (read(i, 1) != 0.f) c += read(i, 2 + d) * expf(read(i, 0) - top);
    store_context(a, context_row, d, total == 0.f ? 0.f : c / total);
  }
}

template <typename T>
__global__ void __launch_bounds__(kOneQueryThreads, 2) one_query(OneQueryArguments a) {
  const int64_t row = blockIdx.x / a.ranges;
  attend_one_query<T>(a, row / a.T, row % a.T, row, row, blockIdx.x % a.ranges, shared_memory());
}

}  // namespace seq2seq_fast
