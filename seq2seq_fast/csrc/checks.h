// Shapes and dtypes as kernels take them for granted. The public functions check the same and more,
// with names in their messages; this is for who calls an op itself.
#pragma once
#include <string>

#include "cell.h"
#include "common.h"

namespace seq2seq_fast {

inline void check(const Tensor& query, const Tensor& keys, const Tensor& v) {
  STD_TORCH_CHECK(query.dim() == 3 && keys.dim() == 3 && v.dim() == 1 &&
                      query.size(0) == keys.size(0) && query.size(2) == keys.size(2) &&
                      query.size(2) == v.size(0),
                  "expected query (B, T, H), keys (B, S, H) and v (H,)");
  STD_TORCH_CHECK(keys.size(1) > 0, "expected keys of at least one position");
  STD_TORCH_CHECK(
      query.scalar_type() == keys.scalar_type() && query.scalar_type() == v.scalar_type(),
      "expected query, keys and v of one dtype");
}

inline void check_shape(const Tensor& x, int64_t B, int64_t N, int64_t W, const char* message) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == B && x.size(1) == N && x.size(2) == W, message);
}

inline void check_attention(const Tensor& query, const Tensor& keys, const Tensor& values,
                            const Tensor& v, const std::optional<Tensor>& mask,
                            const std::optional<Tensor>& bias) {
  check(query, keys, v);
  const int64_t B = query.size(0), T = query.size(1), S = keys.size(1);
  STD_TORCH_CHECK(values.dim() == 3 && values.size(0) == B && values.size(1) == S &&
                      values.scalar_type() == query.scalar_type(),
                  "expected values (B, S, D) of query's dtype");
  if (bias) check_shape(*bias, B, T, S, "expected score_bias (B, T, S)");
  if (mask) check_shape(*mask, B, mask->size(1) == 1 ? 1 : T, S, "expected mask (B, T or 1, S)");
}

inline Cell cell_of(const std::string& name) {
  if (name == "lstm") return Cell::kLstm;
  if (name == "gru") return Cell::kGru;
  STD_TORCH_CHECK(name == "rnn", "expected cell_type lstm, gru or rnn");
  return Cell::kRnn;
}

}  // namespace seq2seq_fast
