// What the attention decoder's forward and backward share on a GPU: products, weights, the
// source.
#pragma once
#include <vector>

#include "../decoder_run.h"
#include "additive_scores.h"
#include "cells.h"
#include "one_query.h"

namespace seq2seq_fast {

// out = a w^T, by the BLAS behind torch
inline void product(const Tensor& out, const Tensor& a, const Tensor& w) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a),
                                    torch::stable::detail::from(transposed(w)),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// out = a w^T + bias
inline void linear(const Tensor& out, const Tensor& a, const Tensor& w, const Tensor& bias) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(a), torch::stable::detail::from(w),
                                    torch::stable::detail::from(std::optional<Tensor>(bias)),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor rows(const Tensor& x, int64_t first, int64_t count) {
  return view(x, {count, x.size(1)}, {x.stride(0), x.stride(1)}, first * x.stride(0));
}
inline FloatRows float_rows(const Tensor& x) { return {floats_of(x), x.stride(0)}; }
inline FloatRows float_rows(const Tensor& x, int64_t first_column) {
  return {floats_of(x) + first_column, x.stride(0)};
}

// A layer's weights side by side, (G, width + H); blocks that one of the two lacks are zero, as are
// columns behind them up to a multiple of `multiple`.
inline Tensor side_by_side(const Tensor* w_x, const Tensor& w_hidden, int64_t G,
                           int64_t multiple = 1) {
  const int64_t width = w_x != nullptr ? w_x->size(1) : 0, H = w_hidden.size(1);
  Tensor w = empty(w_hidden, {G, round_up(width + H, multiple)});
  const bool whole =
      w_hidden.size(0) == G && (w_x == nullptr || w_x->size(0) == G) && w.size(1) == width + H;
  if (!whole) torch::stable::zero_(w);
  if (w_x != nullptr) copy(rows(columns(w, 0, width), 0, w_x->size(0)), *w_x);
  copy(rows(columns(w, width, H), G - w_hidden.size(0), w_hidden.size(0)), w_hidden);
  return w;
}

// w^T, (width, G), contiguous; behind its rows come zeros up to a multiple of four.
inline Tensor turned(const Tensor& w) {
  Tensor out = empty(w, {w.size(1), round_up(w.size(0), 4)});
  if (out.size(1) != w.size(0)) torch::stable::zero_(out);
  copy(columns(out, 0, w.size(0)), transposed(w));
  return out;
}

// Over the positions of a mask (B, S), or over all.
inline Softmax softmax_over(const std::optional<Tensor>& mask) {
  Softmax softmax{};
  softmax.scale = 1.f;
  if (!mask) return softmax;
  softmax.mask = static_cast<const uint8_t*>(mask->data_ptr());
  softmax.mask_stride[0] = mask->stride(0), softmax.mask_stride[2] = mask->stride(1);
  return softmax;
}

struct Source {
  Tensor w_context, w_query, b_query, keys, values, v, powers;
  Softmax softmax;

  // Keys are not prepared where the scores are not of query and keys alone.
  Source(const std::vector<Tensor>& x, const std::optional<Tensor>& mask,
         const std::optional<Tensor>& powers_, bool prepare = true)
      : w_context(x[0]),
        w_query(x[1]),
        b_query(torch::stable::contiguous(x[2])),
        keys(x[3]),
        values(x[4]),
        v(x[5]),
        powers(powers_   ? *powers_
               : prepare ? prepare_keys(keys)
                         : empty(keys, {0})),
        softmax(softmax_over(mask)) {
    STD_TORCH_CHECK(keys.size(1) > 0, "expected keys (B, S, A) of at least one place");
    STD_TORCH_CHECK(keys.size(2) <= kMostFeaturesInShared, "attention of width ", keys.size(2),
                    " is too wide, expected at most ", kMostFeaturesInShared);
  }
};

}  // namespace seq2seq_fast
