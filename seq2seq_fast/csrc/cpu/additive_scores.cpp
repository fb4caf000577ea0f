// Additive scores on the CPU: preparation, tiles, threads, registration. See additive_scores.h.
//
// Memory beyond inputs and outputs: three rows per query, one per key, and in backward tiles of a
// thread; never (B, T, S, H). Forward threads own (b, tile of queries, block of keys), backward
// threads own (b, tile of features), so that no result depends on how many there are.
#include "additive_scores.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "vec.h"

namespace seq2seq_fast {
namespace {

constexpr int64_t kTile = 16;  // queries, or features, of a tile

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

Mode choose(float max_q, float max_k, float max_v) {
  const float m = max_q + max_k;
  if (!(m < 43.f && max_v < 1e5f)) return Mode::kExact;  // v x^4 stays finite
  if (m < 2.f && max_k < kSmallKeys) return Mode::kSmall;
  return m < 9.5f ? Mode::kFast : Mode::kClamped;
}

}  // namespace

void check(const Tensor& query, const Tensor& keys, const Tensor& v) {
  STD_TORCH_CHECK(query.dim() == 3 && keys.dim() == 3 && v.dim() == 1 &&
                      query.size(0) == keys.size(0) && query.size(2) == keys.size(2) &&
                      query.size(2) == v.size(0),
                  "expected query (B, T, H), keys (B, S, H) and v (H,)");
  STD_TORCH_CHECK(
      query.scalar_type() == keys.scalar_type() && query.scalar_type() == v.scalar_type(),
      "expected query, keys and v of one dtype");
}

Queries::Queries(const Tensor& query, const Tensor& v_)
    : B(query.size(0)),
      T(query.size(1)),
      H(query.size(2)),
      H4(round_up(H, kGroup)),
      ld(round_up(H, 8)),
      rows(B * T * 3 * ld),
      v(H4),
      max(B * T) {
  const Rows<float> vs(v_), qs(query);
  Buffer<float> scratch(vs.scratch(1));
  std::fill(std::copy_n(vs.block(0, 0, 1, scratch).data, H, +v), v + H4, 0.f);
  max_v = loops::largest(v, H);
  parallel(B * T, 4 * H, [&](int64_t begin, int64_t end) {
    Buffer<float> scratch(qs.scratch(1));
    for (int64_t i = begin; i < end; ++i) {
      float *row = rows + i * 3 * ld, *raw = row + 2 * ld;
      std::fill(std::copy_n(qs.block(i / T, i % T, 1, scratch).data, H, raw), raw + ld, 0.f);
      max[i] = loops::largest(raw, H);
      if (max[i] < 43.f) loops::exp2x(raw, ld, row);
      if (max[i] < 2.f) loops::expm1_2x(raw, ld, row + ld);
    }
  });
}

namespace {

// powers (B, blocks, H4 + 1, kLanes) of raw (B, S, H)
void make_powers(const Rows<float>& raw, int64_t B, int64_t S, int64_t H, float* powers) {
  const int64_t H4 = round_up(H, kGroup), blocks = (S + kLanes - 1) / kLanes;
  parallel(B * blocks, 8 * H * kLanes, [&](int64_t begin, int64_t end) {
    Buffer<float> block(H4 * kLanes), scratch(raw.scratch(kLanes));
    std::fill(block + H * kLanes, block + H4 * kLanes, 0.f);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = i % blocks * kLanes, width = std::min(kLanes, S - s);
      const auto rows = raw.block(i / blocks, s, width, scratch);
      loops::transpose_block(rows.data, rows.ld, width, H, block);
      float* out = powers + i * (H4 + 1) * kLanes;
      const float max = loops::largest(block, H * kLanes);
      if (max < kSmallKeys) {
        loops::expm1_2x(block, H4 * kLanes, out);
      } else if (max < 43.f) {
        loops::exp2x(block, H4 * kLanes, out);
      }
      std::fill_n(out + H4 * kLanes, kLanes, max);
    }
  });
}

Tensor prepare_keys(Tensor keys) {
  STD_TORCH_CHECK(keys.dim() == 3, "expected keys (B, S, H)");
  const int64_t B = keys.size(0), S = keys.size(1), H = keys.size(2);
  const int64_t floats = round_up(S, kLanes) * (round_up(H, kGroup) + 1);
  Tensor powers = empty(keys, {B, floats}, ScalarType::Float);
  make_powers(Rows<float>(keys), B, S, H, static_cast<float*>(powers.data_ptr()));
  return powers;
}

}  // namespace

Keys::Keys(const Tensor& keys, const std::optional<Tensor>& powers)
    : B(keys.size(0)),
      S(keys.size(1)),
      H(keys.size(2)),
      H4(round_up(H, kGroup)),
      blocks((S + kLanes - 1) / kLanes),
      raw(keys),
      own(powers ? 0 : B * blocks * (H4 + 1) * kLanes),
      data(powers ? static_cast<const float*>(powers->data_ptr()) : own) {
  if (!powers) make_powers(raw, B, S, H, own);
  STD_TORCH_CHECK(
      !powers || (powers->dim() == 2 && powers->size(0) == B &&
                  powers->size(1) == blocks * (H4 + 1) * kLanes && powers->is_contiguous() &&
                  powers->scalar_type() == ScalarType::Float),
      "powers: expected what prepare_keys made of these keys");
}

void Keys::gather(int64_t b, int64_t i, int64_t h, int64_t width, float* buffer) const {
  const int64_t s = i * kLanes, count = std::min(kLanes, S - s), used = std::min(width, H - h);
  const auto rows = raw.block(b, s, count, buffer + width * kLanes);
  loops::transpose_block(rows.data + h, rows.ld, count, used, buffer);
  std::fill(buffer + used * kLanes, buffer + width * kLanes, 0.f);
}

void scores_tile(const Queries& q, const Keys& k, int64_t b, int64_t t, int64_t n, int64_t first,
                 int64_t last, float* out, int64_t ld, float* buffer) {
  for (int64_t i = first; i < last; ++i, out += kLanes) {
    const float max_k = k.max(b, i);
    bool gathered = false;
    for (int64_t j = 0; j < n; ++j) {
      const Mode mode = choose(q.max[b * q.T + t + j], max_k, q.max_v);
      if (mode == Mode::kExact && !gathered) {
        k.gather(b, i, 0, k.H4, buffer);
        gathered = true;
      }
      loops::scores(mode, max_k < kSmallKeys, q.row(b, t + j), q.ld,
                    mode == Mode::kExact ? buffer : k.block(b, i), q.v, q.H4, out + j * ld);
    }
  }
}

// Mode::kExact for `count` keys of a block and one query. Padding has a g of zero, which an
// infinite v would turn into NaN.
static void gradients_of_infinite_v(const float* q, const float* k, const float* g, const float* v,
                                    int64_t count, int64_t width, float* dq, float* dk, float* dv) {
  for (int64_t j = 0; j < width; ++j)
    for (int64_t s = 0; s < count; ++s) {
      const float y = std::tanh(q[j] + k[j * kLanes + s]);
      const float e = g[s] * v[j] * (1.f - y * y);
      dq[j * kVec + s % kVec] += e;
      dk[j * kLanes + s] += e;
      dv[j * kVec + s % kVec] += g[s] * y;
    }
}

std::array<Tensor, 3> scores_backward(const Queries& q, const Keys& k, const float* g,
                                      const Tensor& query, const Tensor& keys, const Tensor& v,
                                      Needs needs) {
  const auto make = [](const Tensor& like, bool needed) {
    return needed ? empty(like, like.sizes()) : empty(like, {0});
  };
  Tensor dq = make(query, needs.query), dk = make(keys, needs.keys), dv = make(v, needs.v);
  const int64_t B = q.B, T = q.T, S = k.S, H = q.H, Sp = k.blocks * kLanes;
  const int64_t tiles = (q.H4 + kTile - 1) / kTile, tile_t = std::min(kTile, T);
  Buffer<float> max_g(B * T), partial_v(B * q.H4);
  Buffer<Mode> modes(B * k.blocks * T);
  parallel(B * T, Sp, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float max_g = loops::largest(g + i * Sp, Sp);
      for (int64_t block = 0; block < k.blocks; ++block)
        modes[(i / T * k.blocks + block) * T + i % T] =
            max_g < INFINITY ? choose(q.max[i], k.max(i / T, block), q.max_v) : Mode::kExact;
    }
  });
  // Every gradient has a factor v that is left to the end, unless v is infinite or NaN.
  const bool v_last = q.max_v < INFINITY;
  parallel(B * tiles, 4 * kTile * T * S, [&](int64_t begin, int64_t end) {
    Buffer<float> sum_k(Sp * kTile), sum_q(tile_t * kTile * kVec), sum_t(tile_t * kTile);
    Buffer<float> rows(kLanes * kTile), raw(k.gather_floats());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tiles, h = i % tiles * kTile;
      const int64_t width = std::min(kTile, q.H4 - h), used = std::min(kTile, H - h);
      float sum_v[kTile * kVec] = {}, w[kTile] = {}, scale[kTile] = {};
      for (int64_t j = 0; j < width; ++j) {
        w[j] = v_last ? 0.25f : q.v[h + j];
        scale[j] = v_last ? 4.f * q.v[h + j] : 1.f;
      }
      std::fill_n(+sum_k, Sp * kTile, 0.f);
      for (int64_t t0 = 0; t0 < T; t0 += kTile) {
        const int64_t n = std::min(kTile, T - t0), lanes = width * kVec;
        std::fill_n(+sum_q, n * lanes, 0.f);
        for (int64_t block = 0; block < k.blocks; ++block) {
          const Mode* mode = modes + (b * k.blocks + block) * T;
          bool gathered = false;
          for (int64_t t = t0, last; t < t0 + n; t = last) {  // runs of one mode
            for (last = t + 1; last < t0 + n && mode[last] == mode[t];) ++last;
            const bool exact = mode[t] == Mode::kExact;
            const int64_t count = std::min(kLanes, S - block * kLanes);
            if (exact && !gathered) {
              k.gather(b, block, h, width, raw);
              gathered = true;
            }
            if (!v_last && count < kLanes) {
              for (int64_t i = t; i < last; ++i)
                gradients_of_infinite_v(
                    q.row(b, i) + 2 * q.ld + h, raw, g + (b * T + i) * Sp + block * kLanes, w,
                    count, width, sum_q + (i - t0) * lanes, sum_k + block * kTile * kLanes, sum_v);
              continue;
            }
            loops::gradients(mode[t], k.max(b, block) < kSmallKeys, q.row(b, t) + h, q.ld,
                             exact ? +raw : k.block(b, block) + h * kLanes,
                             g + (b * T + t) * Sp + block * kLanes, Sp, w, last - t, width,
                             sum_q + (t - t0) * lanes, sum_k + block * kTile * kLanes, sum_v);
          }
        }
        if (!needs.query) continue;
        loops::lane_sums(sum_q, n * width, sum_t);
        for (int64_t t = 0; t < n; ++t)
          for (int64_t j = 0; j < width; ++j) sum_t[t * width + j] *= scale[j];
        write<float>(dq, (b * T + t0) * H + h, H, sum_t, width, n, used);
      }
      loops::lane_sums(sum_v, width, partial_v + b * q.H4 + h);
      for (int64_t s = 0; needs.keys && s < S; s += kLanes) {
        loops::scaled_transpose(sum_k + s * kTile, scale, rows);
        write<float>(dk, (b * S + s) * H + h, H, rows, kTile, std::min(kLanes, S - s), used);
      }
    }
  });
  if (needs.v) {
    Buffer<float> total(H);
    std::fill_n(+total, H, 0.f);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t h = 0; h < H; ++h) total[h] += partial_v[b * q.H4 + h];
    write<float>(dv, 0, H, total, H, 1, H);
  }
  return {dq, dk, dv};
}

namespace {

Tensor additive_scores(Tensor query, Tensor keys, Tensor v) {
  check(query, keys, v);
  if (query.scalar_type() == ScalarType::Double) return scores_double(query, keys, v);
  const Queries q(query, v);
  const Keys k(keys, std::nullopt);
  Tensor out = empty(query, {q.B, q.T, k.S});
  const int64_t tiles = (q.T + kTile - 1) / kTile, items = q.B * k.blocks * tiles;
  parallel(items, kTile * kLanes * q.H, [&](int64_t begin, int64_t end) {
    Buffer<float> tile(kTile * kLanes), buffer(k.gather_floats());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / (k.blocks * tiles), block = i / tiles % k.blocks, t = i % tiles * kTile;
      const int64_t n = std::min(kTile, q.T - t), s = block * kLanes;
      scores_tile(q, k, b, t, n, block, block + 1, tile, kLanes, buffer);
      write<float>(out, (b * q.T + t) * k.S + s, k.S, tile, kLanes, n, std::min(kLanes, k.S - s));
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> additive_scores_backward(Tensor grad, Tensor query, Tensor keys,
                                                            Tensor v, bool need_query,
                                                            bool need_keys, bool need_v) {
  check(query, keys, v);
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == query.size(0) &&
                      grad.size(1) == query.size(1) && grad.size(2) == keys.size(1) &&
                      grad.scalar_type() == query.scalar_type(),
                  "expected grad (B, T, S) of query's dtype");
  const Needs needs{need_query, need_keys, need_v};
  std::array<Tensor, 3> out;
  if (query.scalar_type() == ScalarType::Double) {
    out = scores_backward_double(grad, query, keys, v, needs);
  } else {
    const Queries q(query, v);
    const Keys k(keys, std::nullopt);
    const Rows<float> rows(grad);
    const int64_t Sp = k.blocks * kLanes;
    Buffer<float> g(q.B * q.T * Sp), scratch(rows.scratch(1));
    for (int64_t i = 0; i < q.B * q.T; ++i) {
      float* to = g + i * Sp;
      std::fill(std::copy_n(rows.block(i / q.T, i % q.T, 1, scratch).data, k.S, to), to + Sp, 0.f);
    }
    out = scores_backward(q, k, g, query, keys, v, needs);
  }
  return {out[0], out[1], out[2]};
}

}  // namespace
}  // namespace seq2seq_fast

STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast, CPU, m) {
  m.impl("prepare_keys", TORCH_BOX(&seq2seq_fast::prepare_keys));
  m.impl("additive_scores", TORCH_BOX(&seq2seq_fast::additive_scores));
  m.impl("additive_scores_backward", TORCH_BOX(&seq2seq_fast::additive_scores_backward));
}
