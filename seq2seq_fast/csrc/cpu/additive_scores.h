// Additive scores in float32 for the ops that stand on them. The arithmetic is told in
// additive_scores_loops.h.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "../common.h"
#include "additive_scores_loops.h"

namespace seq2seq_fast {

// Queries and v of a call, padded with zeros to H4, a whole number of groups.
struct Queries {
  int64_t B, T, H, H4, ld;
  Buffer<float> rows;    // (B, T, 3, ld): exp(2q), exp(2q) - 1, q
  Buffer<float> v, max;  // (H4,), max|q| (B, T)
  float max_v;
  Queries(const Tensor& query, const Tensor& v);
  const float* row(int64_t b, int64_t t) const { return rows + (b * T + t) * 3 * ld; }
};

// Keys as exponentials: (B, blocks, H4 + 1, kLanes), each block followed by a row that begins with
// the block's max|k|.
struct Keys {
  int64_t B, S, H, H4, blocks;
  Rows<float> raw;
  Buffer<float> own;  // where the caller brought no powers
  const float* data;
  Keys(const Tensor& keys, const std::optional<Tensor>& powers);
  const float* block(int64_t b, int64_t i) const {
    return data + (b * blocks + i) * (H4 + 1) * kLanes;
  }
  float max(int64_t b, int64_t i) const { return block(b, i)[H4 * kLanes]; }
  // Features [h, h + width) of a block of k itself, which Mode::kExact works on, into the front of
  // `buffer`: (width, kLanes), zeros as padding
  void gather(int64_t b, int64_t i, int64_t h, int64_t width, float* buffer) const;
  int64_t gather_floats() const { return H4 * kLanes + raw.scratch(kLanes); }
};

void check(const Tensor& query, const Tensor& keys, const Tensor& v);

// Scores of queries [t, t + n) with blocks [first, last), into out (n, ld); `buffer` holds
// keys.gather_floats().
void scores_tile(const Queries& q, const Keys& k, int64_t b, int64_t t, int64_t n, int64_t first,
                 int64_t last, float* out, int64_t ld, float* buffer);

// Gradients of query, keys and v, given g (B, T, blocks * kLanes), which is zero behind S. What is
// not needed comes back empty.
struct Needs {
  bool query, keys, v;
};
std::array<Tensor, 3> scores_backward(const Queries& q, const Keys& k, const float* g,
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
