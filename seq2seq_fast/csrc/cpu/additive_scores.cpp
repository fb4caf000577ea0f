// Additive scores on the CPU: preparation, tiles, threads, registration. See additive_scores.h.
//
// Memory beyond inputs and outputs: three rows per query, one per key, and in backward tiles of a
// thread; never (B, T, S, H). Forward threads own (b, tile of queries, block of keys), backward
// threads own (b, group of features), so that no result depends on how many there are.
#include "additive_scores.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace seq2seq_fast {

Mode choose(float max_q, float max_k, float max_v) {
  const float m = max_q + max_k;
  if (!(m < 43.f && max_v < 1e5f)) return Mode::kExact;  // v x^4 stays finite
  if (m < 2.f && max_k < kSmallKeys) return Mode::kSmall;
  return m < 9.5f ? Mode::kFast : Mode::kLarge;
}

namespace {

// Rows of width H in the layout of loops.h: row `at` of `rows` in every group.
void scatter(const float* from, int64_t H, int64_t Hp, int64_t rows, int64_t at, float* out) {
  for (int64_t h = 0; h < Hp; h += kGroup) {
    const int64_t width = std::min(kGroup, Hp - h), used = std::clamp<int64_t>(H - h, 0, width);
    float* to = out + rows * h + at * width;
    std::fill(std::copy_n(from + h, used, to), to + width, 0.f);
  }
}

void scale_columns(float* x, int64_t rows, int64_t width, const float* scale) {
  for (int64_t i = 0; i < rows; ++i, x += width)
    for (int64_t j = 0; j < width; ++j) x[j] *= scale[j];
}

}  // namespace

void make_streams(const float* q, int64_t width, float max_q, float* to) {
  if (max_q < 43.f) {
    loops.exp2x(q, width, to + kPower * width);
    loops.expm1_2x(q, width, to + kPowerMinusOne * width);
  }
  std::copy_n(q, width, to + kRaw * width);
}

Queries::Queries(const Tensor& query, const Tensor& v_)
    : B(query.size(0)),
      T(query.size(1)),
      H(query.size(2)),
      Hp(round_up(H, kPad)),
      streams(product_of({kStreams, B, T, Hp})),
      v(Hp),
      max(B * T) {
  const Rows<float> vs(v_), qs(query);
  Buffer<float> scratch(vs.scratch(1));
  std::fill(std::copy_n(vs.block(0, 0, 1, scratch).data, H, +v), v + Hp, 0.f);
  max_v = loops.largest(v, H);
  parallel(B * T, 4 * H, [&](int64_t begin, int64_t end) {
    Buffer<float> row(Hp), scratch(qs.scratch(1));
    for (int64_t i = begin; i < end; ++i) {
      std::fill(std::copy_n(qs.block(i / T, i % T, 1, scratch).data, H, +row), row + Hp, 0.f);
      max[i] = loops.largest(row, H);
      for (int64_t h = 0; h < Hp; h += kGroup)
        make_streams(row + h, width(h), max[i], streams + (at(i / T, i % T, h) - streams));
    }
  });
}

namespace {

// A row of Keys has at most 2 S Hp of them.
int64_t floats_of_all(int64_t B, int64_t S, int64_t Hp) {
  return product_of({B, 2, S, Hp}) == 0 ? 0 : B * Keys::floats(S, Hp);
}

void make_powers(float* x, int64_t n, float max) {
  if (max < kSmallKeys) {
    loops.expm1_2x(x, n, x);
  } else if (max < 43.f) {
    loops.exp2x(x, n, x);
  }
}

// The powers of a block, and its largest magnitude.
float powers_of_block(const Rows<float>& raw, int64_t b, int64_t s, int64_t count, int64_t H,
                      int64_t Hp, float* out, float* scratch) {
  const auto rows = raw.block(b, s, count, scratch);
  for (int64_t j = 0; j < count; ++j) scatter(rows.data + j * rows.ld, H, Hp, count, j, out);
  const float max = loops.largest(out, count * Hp);
  make_powers(out, count * Hp, max);
  return max;
}

// What Keys holds, of raw (B, S, H).
void make_all_powers(const Rows<float>& raw, int64_t B, int64_t S, int64_t H, float* powers) {
  const int64_t Hp = round_up(H, kPad), blocks = (S + kRows - 1) / kRows;
  parallel(B * blocks, 8 * H * kRows, [&](int64_t begin, int64_t end) {
    Buffer<float> scratch(raw.scratch(kRows));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks, block = i % blocks, s = block * kRows;
      float* const out = powers + b * Keys::floats(S, Hp);
      out[S * Hp + block] =
          powers_of_block(raw, b, s, std::min(kRows, S - s), H, Hp, out + s * Hp, scratch);
    }
  });
}

Tensor prepare_keys(Tensor keys) {
  STD_TORCH_CHECK(keys.dim() == 3, "expected keys (B, S, H)");
  const int64_t B = keys.size(0), S = keys.size(1), H = keys.size(2);
  const int64_t Hp = round_up(H, kPad);
  floats_of_all(B, S, Hp);  // or an error
  Tensor powers = empty(keys, {B, Keys::floats(S, Hp)}, ScalarType::Float);
  make_all_powers(Rows<float>(keys), B, S, H, static_cast<float*>(powers.data_ptr()));
  return powers;
}

}  // namespace

Keys::Keys(const Tensor& keys, const std::optional<Tensor>& powers, Beforehand made)
    : B(keys.size(0)),
      S(keys.size(1)),
      H(keys.size(2)),
      Hp(round_up(H, kPad)),
      blocks((S + kRows - 1) / kRows),
      raw(keys),
      own(powers || made != Beforehand::kAll ? 0 : floats_of_all(B, S, Hp)),
      maxima(powers || made != Beforehand::kMaxima ? 0 : product_of({B, blocks})),
      data(powers                     ? static_cast<const float*>(powers->data_ptr())
           : made == Beforehand::kAll ? +own
                                      : nullptr) {
  if (!powers && made == Beforehand::kAll) make_all_powers(raw, B, S, H, own);
  if (!powers && made == Beforehand::kMaxima)
    parallel(B * blocks, H * kRows, [&](int64_t begin, int64_t end) {
      Buffer<float> scratch(raw.scratch(kRows));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / blocks, block = i % blocks;
        const auto rows = raw.block(b, block * kRows, count(block), scratch);
        float& max = maxima[i] = 0;
        for (int64_t j = 0; j < count(block); ++j) {
          const float of_row = loops.largest(rows.data + j * rows.ld, H);
          max = of_row <= max || max != max ? max : of_row;  // NaN, if there is one
        }
      }
    });
  STD_TORCH_CHECK(
      !powers || (powers->dim() == 2 && powers->size(0) == B && powers->size(1) == floats(S, Hp) &&
                  powers->is_contiguous() && powers->scalar_type() == ScalarType::Float),
      "powers: expected what prepare_keys made of these keys");
}

void Keys::gather(int64_t b, int64_t i, float* buffer) const {
  const auto rows = raw.block(b, i * kRows, count(i), buffer + kRows * Hp);
  for (int64_t j = 0; j < count(i); ++j)
    scatter(rows.data + j * rows.ld, H, Hp, count(i), j, buffer);
}

Keys::Block Keys::take(int64_t b, int64_t i, float* buffer) const {
  if (data != nullptr) return {block(b, i), max(b, i)};
  float* const out = buffer + gather_floats();
  const float max = powers_of_block(raw, b, i * kRows, count(i), H, Hp, out, buffer);
  return {out, max};
}

const float* Keys::group(int64_t b, int64_t i, int64_t h, int64_t width, float* buffer) const {
  if (data != nullptr) return block(b, i) + count(i) * h;
  const auto rows = raw.block(b, i * kRows, count(i), nullptr);  // in place
  const int64_t used = std::min(width, H - h);
  for (int64_t j = 0; j < count(i); ++j) {
    float* const to = buffer + j * width;
    std::fill(std::copy_n(rows.data + j * rows.ld + h, used, to), to + width, 0.f);
  }
  make_powers(buffer, count(i) * width, max(b, i));
  return buffer;
}

void scores_tile(const Queries& q, const Keys& k, int64_t b, int64_t t, int64_t n, int64_t first,
                 int64_t last, float* out, int64_t ld, float* buffer) {
  for (int64_t i = first; i < last; ++i, out += kRows) {
    bool gathered = false;
    const Keys::Block block = k.take(b, i, buffer);
    const auto mode = [&](int64_t j) { return choose(q.max[b * q.T + t + j], block.max, q.max_v); };
    for (int64_t j = 0, next; j < n; j = next) {  // runs of one mode, kQueries long at most
      const Mode m = mode(j);
      for (next = j + 1; next < std::min(n, j + kQueries) && mode(next) == m;) ++next;
      if (m == Mode::kExact && !gathered) {
        k.gather(b, i, buffer);
        gathered = true;
      }
      loops.scores(m, block.max < kSmallKeys, q.at(b, 0, 0), q.T, t + j, next - j,
                   m == Mode::kExact ? buffer : block.powers, k.count(i), q.v, q.Hp, out + j * ld,
                   ld);
    }
  }
}

Keys keys_of_backward(const Tensor& keys, const std::optional<Tensor>& powers) {
  const bool in_place = Rows<float>(keys).scratch(1) == 0;  // or each group would read whole rows
  return Keys(keys, powers, in_place ? Beforehand::kMaxima : Beforehand::kAll);
}

std::array<Tensor, 3> scores_backward(const Queries& q, const Keys& k, const float* g, int64_t ldg,
                                      const Tensor& query, const Tensor& keys, const Tensor& v,
                                      Needs needs) {
  const auto make = [](const Tensor& like, bool needed) {
    return needed ? empty(like, like.sizes()) : empty(like, {0});
  };
  Tensor dq = make(query, needs.query), dk = make(keys, needs.keys), dv = make(v, needs.v);
  const int64_t B = q.B, T = q.T, S = k.S, H = q.H, Hp = q.Hp;
  const int64_t groups = (Hp + kGroup - 1) / kGroup;
  Buffer<float> partial_v(B * Hp);
  Buffer<Mode> modes(product_of({B, k.blocks, T}));
  parallel(B * T, S, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float max_g = loops.largest(g + i * ldg, S);
      for (int64_t block = 0; block < k.blocks; ++block)
        modes[(i / T * k.blocks + block) * T + i % T] =
            max_g < INFINITY ? choose(q.max[i], k.max(i / T, block), q.max_v) : Mode::kExact;
    }
  });
  // Every gradient has a factor v that is left to the end, unless v is infinite or NaN.
  const bool v_last = q.max_v < INFINITY;
  parallel(B * groups, 4 * kGroup * T * S, [&](int64_t begin, int64_t end) {
    Buffer<float> sum_q(T * kGroup), sum_k(kRows * kGroup), raw(k.gather_floats());
    Buffer<float> buffer(k.data ? 0 : kRows * kGroup);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / groups, h = i % groups * kGroup;
      const int64_t width = q.width(h), used = std::min(kGroup, H - h);
      float w[kGroup], scale[kGroup], *sum_v = partial_v + b * Hp + h;
      for (int64_t j = 0; j < width; ++j) {
        w[j] = v_last ? 1.f : q.v[h + j];
        scale[j] = v_last ? q.v[h + j] : 1.f;
      }
      std::fill_n(sum_v, width, 0.f);
      std::fill_n(+sum_q, T * width, 0.f);
      for (int64_t block = 0; block < k.blocks; ++block) {
        const Mode* mode = modes + (b * k.blocks + block) * T;
        const int64_t count = k.count(block), s = block * kRows;
        const float* const powers = k.group(b, block, h, width, buffer);
        std::fill_n(+sum_k, count * width, 0.f);
        bool gathered = false;
        for (int64_t t = 0, next; t < T; t = next) {  // runs of one mode, kQueries long at most
          const bool exact = mode[t] == Mode::kExact;
          const int64_t most = std::min(T, t + kQueries);
          for (next = t + 1; next < most && mode[next] == mode[t];) ++next;
          if (exact && !gathered) {
            k.gather(b, block, raw);
            gathered = true;
          }
          loops.gradients(mode[t], k.minus_one(b, block), q.at(b, t, h), next - t,
                          exact ? raw + count * h : powers, count, g + (b * T + t) * ldg + s, ldg,
                          w, width, sum_q + t * width, sum_k, sum_v);
        }
        if (!needs.keys) continue;
        scale_columns(sum_k, count, width, scale);
        write<float>(dk, (b * S + s) * H + h, H, sum_k, width, count, used);
      }
      if (!needs.query) continue;
      scale_columns(sum_q, T, width, scale);
      write<float>(dq, b * T * H + h, H, sum_q, width, T, used);
    }
  });
  if (needs.v) {
    Buffer<float> total(H);
    std::fill_n(+total, H, 0.f);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t h = 0; h < H; ++h) total[h] += partial_v[b * Hp + h];
    write<float>(dv, 0, H, total, H, 1, H);
  }
  return {dq, dk, dv};
}

namespace {

Tensor additive_scores(Tensor query, Tensor keys, Tensor v) {
  check(query, keys, v);
  if (query.scalar_type() == ScalarType::Double) return scores_double(query, keys, v);
  const Queries q(query, v);
  const int64_t tiles = tiles_of(q.T);
  const Keys k(keys, std::nullopt, tiles == 1 ? Beforehand::kNothing : Beforehand::kAll);
  const int64_t items = q.B * k.blocks * tiles;
  Tensor out = empty(query, {q.B, q.T, k.S});
  parallel(items, kTile * kRows * q.H, [&](int64_t begin, int64_t end) {
    Buffer<float> tile(kTile * kRows), buffer(k.buffer_floats());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / (k.blocks * tiles), block = i / tiles % k.blocks, t = i % tiles * kTile;
      const int64_t n = std::min(kTile, q.T - t), s = block * kRows;
      scores_tile(q, k, b, t, n, block, block + 1, tile, kRows, buffer);
      write<float>(out, (b * q.T + t) * k.S + s, k.S, tile, kRows, n, k.count(block));
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
    const Keys k = keys_of_backward(keys, std::nullopt);
    const Rows<float> rows(grad);
    Buffer<float> g(product_of({q.B, q.T, k.S})), scratch(rows.scratch(1));
    for (int64_t i = 0; i < q.B * q.T; ++i)
      std::copy_n(rows.block(i / q.T, i % q.T, 1, scratch).data, k.S, g + i * k.S);
    out = scores_backward(q, k, g, k.S, query, keys, v, needs);
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
