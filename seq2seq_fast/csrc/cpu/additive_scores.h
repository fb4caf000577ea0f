// Additive scores in float32 for the ops that stand on them. The arithmetic is told in loops.h.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "../checks.h"
#include "loops.h"

namespace seq2seq_fast {

inline int64_t tiles_of(int64_t T) { return (T + kTile - 1) / kTile; }

// Queries and v of a call, as loops.h wants them.
struct Queries {
  int64_t B, T, H, Hp;
  Buffer<float> streams;  // (B, groups, T, kStreams, width of the group)
  Buffer<float> v, max;   // (Hp,), max|q| (B, T)
  float max_v;
  Queries(const Tensor& query, const Tensor& v);
  int64_t width(int64_t h) const { return std::min(kGroup, Hp - h); }
  const float* at(int64_t b, int64_t t, int64_t h) const {
    return streams + kStreams * (b * T * Hp + h * T + t * width(h));
  }
};

// A group of features of a query, of whom all have magnitudes up to max_q, into `to` (kStreams,
// width)
void make_streams(const float* q, int64_t width, float max_q, float* to);

// Which of keys' exponentials are made beforehand: all, unless each is met once, block by block or
// group by group of a block's features. To write all of them and read them again takes longer.
enum class Beforehand { kAll, kMaxima, kNothing };

// Keys as exponentials, as loops.h wants them.
struct Keys {
  int64_t B, S, H, Hp, blocks;
  Rows<float> raw;
  Buffer<float> own, maxima;  // where the caller brought no powers
  const float* data;          // (B, S * Hp numbers and a max|k| of each block), or null
  Keys(const Tensor& keys, const std::optional<Tensor>& powers, Beforehand made = Beforehand::kAll);
  static int64_t floats(int64_t S, int64_t Hp) {
    return S * Hp + round_up((S + kRows - 1) / kRows, kPad);
  }
  int64_t count(int64_t i) const { return std::min(kRows, S - i * kRows); }
  const float* block(int64_t b, int64_t i) const {
    return data + b * floats(S, Hp) + i * kRows * Hp;
  }
  float max(int64_t b, int64_t i) const {
    return data ? data[b * floats(S, Hp) + S * Hp + i] : maxima[b * blocks + i];
  }
  bool minus_one(int64_t b, int64_t i) const { return max(b, i) < kSmallKeys; }
  // A block of k itself, which Mode::kExact works on, laid out as its powers are, into the front of
  // `buffer`.
  void gather(int64_t b, int64_t i, float* buffer) const;
  int64_t gather_floats() const { return kRows * Hp + raw.scratch(kRows); }

  struct Block {
    const float* powers;
    float max;
  };
  // A block's powers, which `buffer` has room for behind what `gather` writes.
  Block take(int64_t b, int64_t i, float* buffer) const;
  // Those of `width` features from h on; `buffer` holds kRows * width.
  const float* group(int64_t b, int64_t i, int64_t h, int64_t width, float* buffer) const;
  int64_t buffer_floats() const { return gather_floats() + (data ? 0 : kRows * Hp); }
};

// Scores of queries [t, t + n) with blocks [first, last), into out (n, kRows for each
// block), ld apart; `buffer` holds keys.buffer_floats().
void scores_tile(const Queries& q, const Keys& k, int64_t b, int64_t t, int64_t n, int64_t first,
                 int64_t last, float* out, int64_t ld, float* buffer);

// context (B, T, D) and weights (B, T, S), contiguous. See additive_attention.cpp.
void attend(const Tensor& query, const Keys& k, const Tensor& values, const Tensor& v,
            const std::optional<Tensor>& mask, const std::optional<Tensor>& score_bias,
            double scale, const Tensor& context, const Tensor& weights);

// How a query meets a block of keys; see loops.h.
Mode choose(float max_q, float max_k, float max_v);

// Gradients of query, keys and v, given g (B, T, S), rows ldg apart. What is not needed comes back
// empty.
struct Needs {
  bool query, keys, v;
};
Keys keys_of_backward(const Tensor& keys, const std::optional<Tensor>& powers);
std::array<Tensor, 3> scores_backward(const Queries& q, const Keys& k, const float* g, int64_t ldg,
                                      const Tensor& query, const Tensor& keys, const Tensor& v,
                                      Needs needs);

// float64, in plain loops
Tensor scores_double(const Tensor& query, const Tensor& keys, const Tensor& v);
std::array<Tensor, 3> scores_backward_double(const Tensor& grad, const Tensor& query,
                                             const Tensor& keys, const Tensor& v, Needs needs);

std::tuple<Tensor, Tensor> attention_double(const Tensor& query, const Tensor& keys,
                                            const Tensor& values, const Tensor& v,
                                            const std::optional<Tensor>& mask,
                                            const std::optional<Tensor>& score_bias, double scale);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_double(
    const Tensor& grad_context, const Tensor& grad_weights, const Tensor& query, const Tensor& keys,
    const Tensor& values, const Tensor& v, const Tensor& weights, double scale, Needs needs,
    bool need_values, bool need_bias);

}  // namespace seq2seq_fast
