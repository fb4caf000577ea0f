// Additive scores on a GPU, for the ops that stand on them.
#pragma once
#include <array>
#include <optional>

#include "launch.h"
#include "powers.cuh"

namespace seq2seq_fast {

struct Needs {
  bool query, keys, v;
};

// Queries, keys and v of a call, as the kernels read them. `memory` holds what was made for it.
struct Prepared {
  Powers query, keys;
  const float* v;
  int B, T, S, H;
  Tensor memory;
};
Prepared prepare(const Device& device, const Tensor& query, const Tensor& keys, const Tensor& v,
                 const std::optional<Tensor>& powers);

Tensor prepare_keys(Tensor keys);

// powers as prepare_keys made them of these keys
Powers powers_of(const Tensor& powers, const Tensor& keys);

// into scores (B, T, S), contiguous, of any dtype
void make_scores(const Device& device, const Prepared& prepared, const Tensor& query,
                 const Tensor& keys, const Tensor& scores);

// Gradients of query, keys and v, given those of the scores (B, T, S). What is not needed comes
// back empty.
std::array<Tensor, 3> scores_backward(const Device& device, const Prepared& prepared,
                                      const Tensor& grad, const Tensor& query, const Tensor& keys,
                                      const Tensor& v, Needs needs);

}  // namespace seq2seq_fast
