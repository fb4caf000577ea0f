// Blocks that run a recurrence together, all of its steps in one launch.
//
// Rows of a batch do not depend on each other, so that a team of blocks takes some of them and
// meets only its own members. A product with weights is shared out by columns: every member makes
// its own for all rows of the team, with weights that stay in its shared memory where they fit, and
// that it reads again in every step where they do not.
#pragma once
#include <type_traits>

#include "device.cuh"

namespace seq2seq_fast {

constexpr int kTeamWarps = 8, kTeamThreads = kWarp * kTeamWarps;
constexpr int kCountStride = 32;  // counts that are waited for lie in lines of their own
constexpr int kTileRows = 8, kTileColumns = 8;
constexpr int kMostLoopLayers = 8;  // of a recurrence
// Of products by the tensor cores, see `Parts`: a tile has so many columns and one or two times so
// many rows, and takes so many numbers of each in a turn.
constexpr int kMatrixRows = 8, kMatrixColumns = 32, kTurn = 32, kParts = 3;

struct Team {
  unsigned* arrived;  // (teams, kCountStride), zero before
  int size, rows;     // of a team: blocks, and at most so many rows
  int memory;         // where shared memory for one phase begins, behind the weights that stay
  int rows_at_once;   // of a product
};

// A block's place, and how often its team has met.
class Member {
 public:
  const Team& team;
  const int index, row0, n_rows;
  __device__ Member(const Team& team_, int rows)
      : team(team_),
        index(blockIdx.x % team.size),
        row0(blockIdx.x / team.size * team.rows),
        n_rows(min(team.rows, rows - row0)),
        arrived_(team.arrived + blockIdx.x / team.size * kCountStride),
        target_(0) {}

  // What members have written before is there behind it.
  __device__ __forceinline__ void meet() {
    target_ += team.size;
    __syncthreads();
    if (threadIdx.x == 0) {
      announce(arrived_);
      await(arrived_, target_);
    }
    __syncthreads();
  }

 private:
  unsigned* const arrived_;
  unsigned target_;
};

// out[r, column] = sum_k x[r, k] w[column, k], where columns are `kinds` blocks of `units`, and a
// member makes all kinds of its units.
struct TeamProduct {
  const void* w;  // (kinds units, width) of `type`, contiguous
  Type type;
  int width;  // rows are multiples of 16 bytes
  int units, kinds;
  int units_of_member, splits;  // splits of the width among warps
  int at, kept;  // where a member's columns lie in shared memory, and how many of them

  __device__ __forceinline__ int first_unit(const Member& member) const {
    return member.index * units_of_member;
  }
  __device__ __forceinline__ int n_units(const Member& member) const {
    return max(0, min(units_of_member, units - first_unit(member)));
  }
  __host__ __device__ int columns_of_member() const { return units_of_member * kinds; }
  // Whether the tensor cores make it, of x in parts.
  __host__ __device__ bool by_matrices(int rows) const {
    return type == Type::kBFloat16 && rows > 4;
  }
  // In shared memory from one column to the next. What eight lanes read of two of them lies in
  // different banks.
  __host__ __device__ int kept_floats() const {
    return type == Type::kBFloat16 ? static_cast<int>(round_up(width / 2, 32)) + 16
                                   : floats_of_column();
  }
  __host__ __device__ int x_floats(int rows) const {
    return by_matrices(rows) ? min(rows, kMatrixRows) * words_of_line(rows) : rows * width;
  }
  // Of `fill_parts`: a matrix has one row of two numbers' words for a row of x, with zeros up to
  // the end of a turn; they lie side by side in a line, and lines in different banks.
  __host__ __device__ int words_of_matrix() const {
    return static_cast<int>(round_up(width, kTurn));
  }
  __host__ __device__ int words_of_line(int rows) const {
    return (rows > kMatrixRows ? kParts : 2) * words_of_matrix() + 4;
  }
  __host__ __device__ int floats_of_column() const {
    return type == Type::kFloat ? width : width / 2;
  }
};

// Which column of all of a product a member's j-th is: kind j % kinds of its unit j / kinds.
__device__ __forceinline__ int64_t column_of(int units, int kinds, int first_unit, int j) {
  return static_cast<int64_t>(j % kinds) * units + first_unit + j / kinds;
}

// A member's weights to shared memory, once before the first step. They are there for a product
// when all threads have called `wait_for_weights`.
__device__ __forceinline__ void keep_weights(const TeamProduct& p, const Member& member) {
  const int quads = p.floats_of_column() / 4, n = min(p.kept, p.n_units(member) * p.kinds);
  const int first = p.first_unit(member);
  const float* const from = static_cast<const float*>(p.w);
  float* const to = shared_memory() + p.at;
  for (int i = threadIdx.x; i < n * quads; i += kTeamThreads) {
    const int64_t column = column_of(p.units, p.kinds, first, i / quads);
    copy_async(to + i / quads * p.kept_floats() + i % quads * 4,
               from + 4 * (column * quads + i % quads));
  }
}
// A product has a barrier of its own before it reads them.
__device__ __forceinline__ void wait_for_weights() {
  close_copies();
  wait_copies<0>();
}

// Asks for the first of a member's weights that are read again in every step, while it still waits
// for its team. So much of all members is a third of an H100's second-level cache.
constexpr int64_t kAskedFor = 128 << 10;
__device__ __forceinline__ void ask_for_weights(const TeamProduct& p, const Member& member) {
  constexpr int kLine = 128;
  const int bytes = 4 * p.floats_of_column(), first = p.first_unit(member);
  const int lines = static_cast<int>(ceil_div(bytes, kLine));
  const int n = min(p.n_units(member) * p.kinds - p.kept, static_cast<int>(kAskedFor / bytes));
  for (int i = threadIdx.x; i < n * lines; i += kTeamThreads)
    ask_for_line(static_cast<const char*>(p.w) +
                 column_of(p.units, p.kinds, first, p.kept + i / lines) * bytes +
                 i % lines * kLine);
}

// Adds up each of N numbers over the lanes. What a lane gets are those from `first_sum` on.
template <int N>
__device__ __forceinline__ void sum_over_lanes(float (&x)[N]) {
  const int lane = threadIdx.x % kWarp;
  int n = N;
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    if (n == 1) {
      x[0] += __shfl_xor_sync(kAll, x[0], lanes);
      continue;
    }
    n /= 2;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if (i >= n) break;
      const bool upper = lane & lanes;
      const float given = upper ? x[i] : x[i + n], kept = upper ? x[i + n] : x[i];
      x[i] = kept + __shfl_xor_sync(kAll, given, lanes);
    }
  }
}
template <int N>
__device__ __forceinline__ int first_sum() {
  int first = 0, n = N;
  for (int lanes = kWarp / 2; lanes > 0 && n > 1; lanes /= 2) {
    n /= 2;
    if (threadIdx.x % kWarp & lanes) first += n;
  }
  return first;
}

template <typename W>
struct alignas(4 * sizeof(W)) Four {
  W w[4];
};

// A tile of R rows and kTileColumns columns over a range of the width, which lanes share out in
// fours. Rows and columns behind the last are that one again.
template <int R, typename W, typename Column>
__device__ __forceinline__ void add_tile(float* sums, int ld_sums, const float* x, int ld_x,
                                         int n_rows, int n_columns, int begin, int end,
                                         const Column& column) {
  constexpr int C = kTileColumns;
  // More bytes on their way where there are registers for it, beside those of who calls.
  [[maybe_unused]] constexpr int kAtOnce = R <= (sizeof(W) == 2 ? 4 : 2) ? 2 : 1;
  const int lane = threadIdx.x % kWarp;
  const W* w[C];
#pragma unroll
  for (int c = 0; c < C; ++c) w[c] = column(min(c, n_columns - 1));
  float sum[R * C] = {};
#pragma unroll kAtOnce
  for (int k = begin + 4 * lane; k < end; k += 4 * kWarp) {
    Four<W> ws[C];
#pragma unroll
    for (int c = 0; c < C; ++c) ws[c] = *reinterpret_cast<const Four<W>*>(w[c] + k);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float4 xs = *reinterpret_cast<const float4*>(x + min(r, n_rows - 1) * ld_x + k);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        float& s = sum[r * C + c];
        s += xs.x * to_float(ws[c].w[0]), s += xs.y * to_float(ws[c].w[1]);
        s += xs.z * to_float(ws[c].w[2]), s += xs.w * to_float(ws[c].w[3]);
      }
    }
  }
  sum_over_lanes(sum);
  const int first = first_sum<R * C>();
  constexpr int kOwn = R * C > kWarp ? R * C / kWarp : 1;  // sums of a lane
  if constexpr (R * C < kWarp)
    if (lane % (kWarp / (R * C)) != 0) return;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int r = (first + i) / C, c = (first + i) % C;
    if (r < n_rows && c < n_columns) sums[r * ld_sums + c] = sum[i];
  }
}

// Four numbers in parts of bfloat16 that add up to them, in pairs of neighbours.
struct Parts {
  uint2 of[kParts];
  __device__ __forceinline__ explicit Parts(float4 x) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) of[part] = make_uint2(take(x.x, x.y), take(x.z, x.w));
  }
  // The next part of two numbers, which are left with the rest.
  __device__ __forceinline__ static uint32_t take(float& low, float& high) {
    const uint32_t pair = bfloat16_pair(low, high);
    low = rest(low, __uint_as_float(pair << 16));
    high = rest(high, __uint_as_float(pair & 0xffff0000u));
    return pair;
  }
  // Nothing is left of an infinity.
  __device__ __forceinline__ static float rest(float x, float part) {
    return magnitude(part) == 0x7f800000u ? 0.f : x - part;
  }
};

// The same tile for bfloat16 weights by the tensor cores, of 8 R rows and kMatrixColumns columns.
// x is there as the matrices of `fill_parts`, `of_matrix` words each. What a lane reads at once,
// eight neighbours along the width, it takes for the four pairs that two products want of it, of
// both factors alike: the order of a sum's terms is free. So all of it is multiplied as it has been
// read. Weights are read kAhead - 1 turns early, since from the second level of the cache they take
// as long; behind a row's end x is zero, and they are the last ones again.
template <int R, typename Column>
__device__ __forceinline__ void add_matrix_tile(float* sums, int ld_sums, const float* x, int ld_x,
                                                int of_matrix, int n_rows, int n_columns, int begin,
                                                int end, const Column& column) {
  constexpr int C = kMatrixColumns / 8, kMatrices = R == 2 ? kParts : 2, kAhead = 4;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const BFloat16* w[C];
#pragma unroll
  for (int c = 0; c < C; ++c) w[c] = column(min(8 * c + g, n_columns - 1));
  const float* const line = x + min(g, n_rows - 1) * ld_x + 8 * t;
  float large[C][4] = {}, small[C][4] = {};  // of the first matrix, and of the others
  const auto read = [](const void* from) { return *static_cast<const uint4*>(from); };
  uint4 ws[kAhead][C];
  const auto read_weights = [&](uint4(&to)[C], int k) {
    const int there = min(k + 8 * t, end - 8);
#pragma unroll
    for (int c = 0; c < C; ++c) to[c] = read(w[c] + there);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) read_weights(ws[i], begin + kTurn * i);
#pragma unroll 1
  for (int k0 = begin; k0 < end; k0 += kTurn * kAhead)
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int k = k0 + kTurn * i;
      if (k >= end) break;
#pragma unroll
      for (int m = kMatrices - 1; m >= 0; --m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 xs = read(line + m * of_matrix + k + 4 * half);
          const uint32_t a[4] = {xs.x, xs.y, xs.z, xs.w};
#pragma unroll
          for (int c = 0; c < C; ++c) {
            const uint4& four = ws[i][c];
            const uint32_t b[2] = {half == 0 ? four.x : four.z, half == 0 ? four.y : four.w};
            multiply_add(m == 0 ? large[c] : small[c], a, b);
          }
        }
      read_weights(ws[i], k + kTurn * kAhead);
    }
#pragma unroll
  for (int c = 0; c < C; ++c)
#pragma unroll
    for (int i = 0; i < 2 * R; ++i) {
      const int at = 8 * c + 2 * t + i % 2, row = 8 * (i / 2) + g;
      const float rest = R == 1 ? large[c][i + 2] + small[c][i] : small[c][i];
      if (row < n_rows && at < n_columns) sums[row * ld_sums + at] = large[c][i] + rest;
    }
}

// Shared memory of a product beside its weights: rows of x, and the parts of the sums.
__host__ __device__ inline int64_t team_product_floats(const TeamProduct& p, int rows) {
  return p.x_floats(rows) + int64_t{rows} * p.splits * p.columns_of_member();
}

// Sums of n rows of x, which are at `memory`, to `parts`: (splits, rows, columns of a member). Not
// inlined: there are many products, and this is most of their code.
template <typename W>
static __device__ __noinline__ void make_sums(const W* w, int width, int units, int kinds,
                                              int first_unit, int n_columns, int ld, int splits,
                                              int at, int n_kept, int kept_floats, int memory,
                                              int ld_x, int of_matrix, float* parts, int rows,
                                              int n) {
  const float* const x = shared_memory() + memory;
  const int range = static_cast<int>(round_up(ceil_div(width, splits), 4 * kWarp));
  const int warp = threadIdx.x / kWarp;
  const auto for_tiles = [&](int tile_rows, int tile_columns, const auto& add) {
    const int tiles_r = static_cast<int>(ceil_div(n, tile_rows));
    const int tiles = static_cast<int>(ceil_div(n_columns, tile_columns)) * tiles_r;
    for (int task = warp; task < tiles * splits; task += kTeamWarps) {
      const int split = task % splits, tile = task / splits;
      const int r = tile % tiles_r * tile_rows, c = tile / tiles_r * tile_columns;
      float* const sums = parts + (split * rows + r) * ld + c;
      const int begin = split * range, end = min(begin + range, width);
      const auto add_from = [&](const auto& column) {
        add(sums, x + r * ld_x, n - r, n_columns - c, begin, end, column);
      };
      if (c < n_kept) {
        const int ld_w = kept_floats * (4 / static_cast<int>(sizeof(W)));
        const W* const kept = reinterpret_cast<const W*>(shared_memory() + at) + c * ld_w;
        add_from([&](int j) { return kept + j * ld_w; });
      } else {
        add_from([&](int j) { return w + column_of(units, kinds, first_unit, c + j) * width; });
      }
    }
  };
  const auto multiply = [&]<int R>() {
    for_tiles(R, kTileColumns,
              [&](float* sums, const float* from, int n_r, int n_c, int begin, int end,
                  const auto& column) {
                add_tile<R, W>(sums, ld, from, ld_x, n_r, n_c, begin, end, column);
              });
  };
  const auto multiply_matrices = [&]<int R>() {
    for_tiles(R * kMatrixRows, kMatrixColumns,
              [&](float* sums, const float* from, int n_r, int n_c, int begin, int end,
                  const auto& column) {
                add_matrix_tile<R>(sums, ld, from, ld_x, of_matrix, n_r, n_c, begin, end, column);
              });
  };
  if (n == 1) {
    multiply.template operator()<1>();
  } else if (n == 2) {
    multiply.template operator()<2>();
  } else if (n <= 4) {
    multiply.template operator()<4>();
  } else if constexpr (std::is_same_v<W, BFloat16>) {
    if (n <= kMatrixRows)
      multiply_matrices.template operator()<1>();
    else
      multiply_matrices.template operator()<2>();
  } else {
    multiply.template operator()<kTileRows>();
  }
}

// Columns of several tensors side by side, as an operand of a product.
struct Columns {
  const float *rows, *factors;  // contiguous; absent: zeros, and ones
  int width;
  __device__ __forceinline__ const float* address(int row, int k) const {
    return rows == nullptr ? nullptr : rows + int64_t{row} * width + k;
  }
  __device__ __forceinline__ float4 four(int row, int k) const {
    if (rows == nullptr) return make_float4(0.f, 0.f, 0.f, 0.f);
    const int64_t at = int64_t{row} * width + k;
    float4 x = __ldcg(reinterpret_cast<const float4*>(rows + at));
    if (factors != nullptr) {
      const float4 f = __ldcg(reinterpret_cast<const float4*>(factors + at));
      x.x *= f.x, x.y *= f.y, x.z *= f.z, x.w *= f.w;
    }
    return x;
  }
  __device__ __forceinline__ float one(int row, int k) const {
    if (rows == nullptr) return 0.f;
    const int64_t at = int64_t{row} * width + k;
    const float x = __ldcg(rows + at);
    return factors == nullptr ? x : x * __ldcg(factors + at);
  }
};
// The row's k-th and three more of such columns side by side; behind the last come zeros.
// `by_four`: all widths are multiples of 4, and rows aligned.
__device__ __forceinline__ float one_of(int, int) { return 0.f; }
template <typename... Others>
__device__ __forceinline__ float one_of(int row, int k, const Columns& first,
                                        const Others&... others) {
  return k < first.width ? first.one(row, k) : one_of(row, k - first.width, others...);
}
__device__ __forceinline__ float4 aligned_four_of(int, int) {
  return make_float4(0.f, 0.f, 0.f, 0.f);
}
template <typename... Others>
__device__ __forceinline__ float4 aligned_four_of(int row, int k, const Columns& first,
                                                  const Others&... others) {
  return k < first.width ? first.four(row, k) : aligned_four_of(row, k - first.width, others...);
}
template <typename... Parts>
__device__ __forceinline__ float4 four_of(bool by_four, int row, int k, const Parts&... parts) {
  if (by_four) return aligned_four_of(row, k, parts...);
  return make_float4(one_of(row, k, parts...), one_of(row, k + 1, parts...),
                     one_of(row, k + 2, parts...), one_of(row, k + 3, parts...));
}
// Where those four lie; null: zeros.
__device__ __forceinline__ const float* address_of(int, int) { return nullptr; }
template <typename... Others>
__device__ __forceinline__ const float* address_of(int row, int k, const Columns& first,
                                                   const Others&... others) {
  return k < first.width ? first.address(row, k) : address_of(row, k - first.width, others...);
}

// Puts n rows of such columns, so many quads each, into shared memory. Aligned fours are copied as
// they lie, all of a thread's before it waits for the first. Not inlined, as make_sums is not.
static __device__ __noinline__ void fill_rows(int memory, int row0, int n, int quads, bool by_four,
                                              const float* rows_a, const float* factors,
                                              int width_a, const float* rows_b, int width_b,
                                              const float* rows_c, int width_c) {
  const Columns a{rows_a, factors, width_a}, b{rows_b, {}, width_b}, c{rows_c, {}, width_c};
  float4* const x = reinterpret_cast<float4*>(shared_memory() + memory);
  if (by_four && factors == nullptr) {
    const int rows_on = kTeamThreads / quads, quads_on = kTeamThreads % quads;
    int r = threadIdx.x / quads, quad = threadIdx.x % quads;
    while (r < n) {
      const float* const from = address_of(row0 + r, 4 * quad, a, b, c);
      float4* const to = x + r * quads + quad;
      if (from != nullptr)
        copy_async(&to->x, from);
      else
        *to = make_float4(0.f, 0.f, 0.f, 0.f);
      r += rows_on, quad += quads_on;
      if (quad >= quads) quad -= quads, ++r;
    }
    close_copies();
    wait_copies<0>();
    return;
  }
  constexpr int kAtOnce = 4;  // reads on their way before the first is waited for
  for (int i0 = threadIdx.x; i0 < n * quads; i0 += kAtOnce * kTeamThreads) {
    float4 read[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = i0 + j * kTeamThreads;
      if (i < n * quads) read[j] = four_of(by_four, row0 + i / quads, i % quads * 4, a, b, c);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = i0 + j * kTeamThreads;
      if (i < n * quads) x[i] = read[j];
    }
  }
}

// Puts n rows of such columns into shared memory as 16-row matrices of bfloat16: two rows, eight
// apart, lie in a line, pair by pair in turns, as the tensor cores want them. Of more than eight
// rows each part is a matrix; of fewer there are two, of the first two parts and of the last.
static __device__ __noinline__ void fill_parts(int memory, int ld_x, int words, int row0, int n,
                                               bool by_four, const float* rows_a,
                                               const float* factors, int width_a,
                                               const float* rows_b, int width_b,
                                               const float* rows_c, int width_c) {
  const Columns a{rows_a, factors, width_a}, b{rows_b, {}, width_b}, c{rows_c, {}, width_c};
  const bool two_rows = n > kMatrixRows;
  const int quads = words / 4, all = min(n, kMatrixRows) * quads;
  uint4* const x = reinterpret_cast<uint4*>(shared_memory() + memory);
  constexpr int kAtOnce = 2;  // lines whose reads are on their way before the first is waited for
  for (int i0 = threadIdx.x; i0 < all; i0 += kAtOnce * kTeamThreads) {
    float4 read[kAtOnce][2];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = i0 + j * kTeamThreads, row = i / quads, k = i % quads * 4;
      if (i < all) read[j][0] = four_of(by_four, row0 + row, k, a, b, c);
      if (i < all && row + kMatrixRows < n)
        read[j][1] = four_of(by_four, row0 + row + kMatrixRows, k, a, b, c);
      else
        read[j][1] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = i0 + j * kTeamThreads;
      if (i >= all) break;
      uint4* const to = x + i / quads * (ld_x / 4) + i % quads;
      const Parts first(read[j][0]);
      const auto put = [&](int matrix, uint2 upper, uint2 lower) {
        to[matrix * quads] = make_uint4(upper.x, lower.x, upper.y, lower.y);
      };
      if (two_rows) {
        const Parts second(read[j][1]);
#pragma unroll
        for (int part = 0; part < kParts; ++part) put(part, first.of[part], second.of[part]);
      } else {
        put(0, first.of[0], first.of[1]);
        put(1, first.of[2], make_uint2(0, 0));
      }
    }
  }
}

// Makes a member's columns for all rows of its team, of x = [a | b | c]; a alone may have factors.
// `finish(row, unit, sum)` is called for each with sum(kind), always by the same thread for the
// same row and unit. `any_type`: weights may have 16 bits.
template <bool any_type = false, typename Finish>
__device__ __forceinline__ void team_product(const TeamProduct& p, const Member& member,
                                             const Finish& finish, bool by_four, const Columns& a,
                                             const Columns& b = {}, const Columns& c = {}) {
  const int n_units = p.n_units(member), ld = p.columns_of_member();
  if (n_units == 0) return;
  const int memory = member.team.memory, rows = member.team.rows_at_once;
  for (int r0 = 0; r0 < member.n_rows; r0 += rows) {
    const int n = min(rows, member.n_rows - r0), row0 = member.row0 + r0;
    const bool in_parts = any_type && p.by_matrices(n);
    const int ld_x = in_parts ? p.words_of_line(n) : p.width, of_matrix = p.words_of_matrix();
    float* const sums = shared_memory() + memory + p.x_floats(n);
    if (in_parts)
      fill_parts(memory, ld_x, of_matrix, row0, n, by_four, a.rows, a.factors, a.width, b.rows,
                 b.width, c.rows, c.width);
    else
      fill_rows(memory, row0, n, p.width / 4, by_four, a.rows, a.factors, a.width, b.rows, b.width,
                c.rows, c.width);
    __syncthreads();
    const auto make = [&]<typename W>() {
      make_sums(static_cast<const W*>(p.w), p.width, p.units, p.kinds, p.first_unit(member),
                n_units * p.kinds, ld, p.splits, p.at, p.kept, p.kept_floats(), memory, ld_x,
                of_matrix, sums, rows, n);
    };
    if constexpr (any_type) {
      if (p.type == Type::kBFloat16)
        make.template operator()<BFloat16>();
      else if (p.type == Type::kHalf)
        make.template operator()<Half>();
      else
        make.template operator()<float>();
    } else {
      make.template operator()<float>();
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n * n_units; i += kTeamThreads) {
      const int r = i / n_units, u = i % n_units;
      finish(row0 + r, p.first_unit(member) + u, [&](int kind) {
        float sum = 0.f;
        for (int split = 0; split < p.splits; ++split)
          sum += sums[(split * rows + r) * ld + u * p.kinds + kind];
        return sum;
      });
    }
  }
}

}  // namespace seq2seq_fast
