// scores[b,t,s] = sum_h v[h] tanh(q[b,t,h] + k[b,s,h]), many queries. See pairs.cuh.
//
// Grid: one block for each (b, tile of queries, tile of keys). A warp holds LT TT queries by LS SS
// keys, TT x SS of them in the registers of each of its LT x LS = 32 threads; warps of a block
// divide the queries (wt) and the features (wh), and the latter add up their parts in shared memory
// at the end. Rows go to shared memory in slices of 8 features, two stages deep.
#pragma once
#include "pairs.cuh"

namespace seq2seq_fast {

constexpr int kSlice = 8, kSliceStride = 12;     // floats; 12 spreads eight rows over all banks
constexpr int kMostWarpsT = 2, kMostWarpsH = 8;  // powers of two

struct ScoresArguments {
  Powers query, keys;
  const float* v;            // (Hp + 1,)
  View raw_query, raw_keys;  // for the exact path
  void* scores;              // (B, T, S) of `type`
  Type type;
  int T, S, H;
  int tiles_t, tiles_s;
  __device__ __forceinline__ int64_t at(int b, int t, int s) const {
    return (static_cast<int64_t>(b) * T + t) * S + s;
  }
};

// The same on the host: what a block of such a launch is made of.
struct ScoresTile {
  int TT, SS, LT, warps_t, warps_h;
  __host__ __device__ int queries() const { return warps_t * LT * TT; }
  __host__ __device__ int keys() const { return kWarp / LT * SS; }
  __host__ __device__ int rows() const { return queries() + keys() + 1; }  // and v
  __host__ __device__ int stage_floats() const { return warps_h * rows() * kSliceStride; }
  __host__ __device__ int shared_floats() const {
    const int parts = (warps_h + 1) / 2 * warps_t * kWarp * TT * SS;
    return 2 * stage_floats() > parts ? 2 * stage_floats() : parts;
  }
};

// Scores of a tile one after another, for whatever the pair form cannot hold.
__device__ void exact_scores(const ScoresArguments& a, int b, int t0, int n_t, int s0, int n_s) {
  const int warps = blockDim.x * blockDim.y * blockDim.z / kWarp, lane = threadIdx.x;
  const int warp = threadIdx.y + blockDim.y * threadIdx.z;
  for (int i = warp; i < n_t * n_s; i += warps) {
    const int t = t0 + i / n_s, s = s0 + i % n_s;
    float sum = 0.f;
    for (int h = lane; h < a.H; h += kWarp)
      sum += a.v[h] * tanhf(a.raw_query(b, t, h) + a.raw_keys(b, s, h));
    sum = warp_sum(sum);
    if (lane == 0) store(a.scores, a.type, a.at(b, t, s), sum);
  }
}

// blockDim (32, warps_t, warps_h)
template <int TT, int SS, int LT>
__global__ void __launch_bounds__(kWarp * kMostWarpsT * kMostWarpsH, 1)
    additive_scores(ScoresArguments a) {
  constexpr int LS = kWarp / LT;
  const ScoresTile tile{TT, SS, LT, static_cast<int>(blockDim.y), static_cast<int>(blockDim.z)};
  const int tile_s = blockIdx.x % a.tiles_s, tile_t = blockIdx.x / a.tiles_s % a.tiles_t;
  const int b = blockIdx.x / a.tiles_s / a.tiles_t;
  const int t0 = tile_t * tile.queries(), s0 = tile_s * tile.keys();
  const int n_t = a.T - t0 < tile.queries() ? a.T - t0 : tile.queries();
  const int n_s = a.S - s0 < tile.keys() ? a.S - s0 : tile.keys();
  const Path path =
      choose_path(a.query.largest(b, t0, n_t), a.keys.largest(b, s0, n_s), a.v[a.query.Hp]);
  if (path == Path::kExact) return exact_scores(a, b, t0, n_t, s0, n_s);

  float* const stages = shared_memory();
  const int lane = threadIdx.x, wt = threadIdx.y, wh = threadIdx.z;
  const int slices = a.query.Hp / kSlice, chunks = (slices + tile.warps_h - 1) / tile.warps_h;

  // A thread copies the same 16 bytes of a slice in every step-th row. Rows behind the last one
  // are that one again.
  const int thread = lane + kWarp * (wt + tile.warps_t * wh), piece = thread % (2 * tile.warps_h);
  const int first_row = thread / (2 * tile.warps_h), step = kWarp / 2 * tile.warps_t;
  const float *const q_rows = a.query.row(b, t0), *const k_rows = a.keys.row(b, s0);
  const auto place = [&](int chunk, int row) {
    return stages + chunk % 2 * tile.stage_floats() +
           (piece / 2 * tile.rows() + row) * kSliceStride + piece % 2 * 4;
  };
  const auto copy = [&](int chunk) {
    const int h = (chunk * tile.warps_h * 2 + piece) * 4;
    for (int row = first_row; row < tile.rows() && h < a.query.Hp; row += step) {
      const int s = row - tile.queries();
      const float* from = s < 0 ? q_rows + static_cast<int64_t>(min(row, n_t - 1)) * a.query.Hp
                          : s < tile.keys()
                              ? k_rows + static_cast<int64_t>(min(s, n_s - 1)) * a.query.Hp
                              : a.v;
      copy_async(place(chunk, row), from + h);
    }
    close_copies();
  };
  // Where some rows are powers and others powers minus one all become powers, each by the thread
  // that copied it.
  uint32_t uneven = 0;
  if (path == Path::kPairs)
    for (int row = first_row, bit = 1; row < tile.rows() - 1; row += step, bit *= 2) {
      const int s = row - tile.queries();
      if (s < 0 ? a.query.minus_one(b, min(t0 + row, a.T - 1))
                : a.keys.minus_one(b, min(s0 + s, a.S - 1)))
        uneven |= bit;
    }
  const auto even_out = [&](int chunk) {
    for (int row = first_row, bits = uneven; bits; row += step, bits /= 2)
      if (bits % 2)
        for (int i = 0; i < 4; ++i) place(chunk, row)[i] += row < tile.queries() ? 0.5f : 1.f;
  };

  float sum[TT][SS] = {};
  const auto add_slice = [&]<Path form>(const float* slice) {
    const float* q = slice + (wt * LT * TT + lane / LS) * kSliceStride;
    const float* k = slice + (tile.queries() + lane % LS) * kSliceStride;
    const float* v = slice + (tile.rows() - 1) * kSliceStride;
#pragma unroll 1
    for (int h = 0; h < kSlice; h += 4) {
      const float4 vs = *reinterpret_cast<const float4*>(v + h);
      float4 qs[TT];
#pragma unroll
      for (int i = 0; i < TT; ++i)
        qs[i] = *reinterpret_cast<const float4*>(q + i * LT * kSliceStride + h);
#pragma unroll
      for (int j = 0; j < SS; ++j) {
        const float4 ks = *reinterpret_cast<const float4*>(k + j * LS * kSliceStride + h);
#pragma unroll
        for (int i = 0; i < TT; ++i) {
          add_pair<form>(sum[i][j], qs[i].x, qs[i].y, ks.x, ks.y, vs.x, vs.y);
          add_pair<form>(sum[i][j], qs[i].z, qs[i].w, ks.z, ks.w, vs.z, vs.w);
        }
      }
    }
  };
  copy(0);
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copy(chunk + 1);
    wait_copies<1>();
    if (uneven) even_out(chunk);
    __syncthreads();
    const float* slice = stages + chunk % 2 * tile.stage_floats() + wh * tile.rows() * kSliceStride;
    if (chunk * tile.warps_h + wh < slices) {
      if (path == Path::kSmall) {
        add_slice.template operator()<Path::kSmall>(slice);
      } else {
        add_slice.template operator()<Path::kPairs>(slice);
      }
    }
    __syncthreads();
  }

  // The upper half of the warps that divided the features hands its sums to the lower half.
  for (int n = tile.warps_h; n > 1; n = (n + 1) / 2) {
    const int half = (n + 1) / 2, from = wh < half ? wh : wh - half;
    float* part = stages + (from * tile.warps_t + wt) * TT * SS * kWarp + lane;
    if (wh >= half && wh < n)
#pragma unroll
      for (int i = 0; i < TT * SS; ++i) part[i * kWarp] = sum[i / SS][i % SS];
    __syncthreads();
    if (wh < n - half)
#pragma unroll
      for (int i = 0; i < TT * SS; ++i) sum[i / SS][i % SS] += part[i * kWarp];
    __syncthreads();
  }
  if (wh != 0) return;
#pragma unroll
  for (int i = 0; i < TT; ++i)
#pragma unroll
    for (int j = 0; j < SS; ++j) {
      const int t = t0 + (wt * TT + i) * LT + lane / LS, s = s0 + j * LS + lane % LS;
      if (t < a.T && s < a.S) store(a.scores, a.type, a.at(b, t, s), sum[i][j]);
    }
}

}  // namespace seq2seq_fast
