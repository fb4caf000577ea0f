// Launches of attention's kernels, and their registration.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "additive_attention.cuh"
#include "additive_scores.h"
#include "one_query.h"

namespace seq2seq_fast {
namespace {

Tensor bmm(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::bmm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Softmax softmax_of(const std::optional<Tensor>& mask, const std::optional<Tensor>& bias,
                   double scale) {
  Softmax softmax{};
  softmax.scale = static_cast<float>(scale);
  if (bias) softmax.bias = view_of(*bias);
  if (!mask) return softmax;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "expected a bool mask");
  softmax.mask = static_cast<const uint8_t*>(mask->data_ptr());
  for (int64_t i = 0; i < 3; ++i) softmax.mask_stride[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
  return softmax;
}

std::tuple<Tensor, Tensor> additive_attention(Tensor query_, Tensor keys, Tensor values, Tensor v,
                                              std::optional<Tensor> mask,
                                              std::optional<Tensor> score_bias, double scale,
                                              std::optional<Tensor> powers) {
  const bool no_t = query_.dim() == 2;  // (B, H): no T axis in the results either
  const Tensor query = no_t ? view(query_, {query_.size(0), 1, query_.size(1)},
                                   {query_.stride(0), 0, query_.stride(1)})
                            : query_;
  check_attention(query, keys, values, v, mask, score_bias);
  check_device(query, keys, values, v, mask.value_or(query), score_bias.value_or(query));
  const Device device(query);
  const int64_t B = query.size(0), T = query.size(1), S = keys.size(1), D = values.size(2);
  Tensor weights = no_t ? empty(query, {B, S}) : empty(query, {B, T, S});
  if (goes_one_by_one(query)) {
    Tensor context = no_t ? empty(query, {B, D}) : empty(query, {B, T, D});
    one_query_attention(device, query, keys, values, v, softmax_of(mask, score_bias, scale), powers,
                        context, weights);
    return {context, weights};
  }
  Tensor scores = empty(query, {B, T, S}, ScalarType::Float);
  make_scores(device, prepare(device, query, keys, v, powers), query, keys, scores);
  const SoftmaxArguments a{floats_of(scores),
                           softmax_of(mask, score_bias, scale),
                           weights.data_ptr(),
                           type_of(weights),
                           static_cast<int>(T),
                           static_cast<int>(S),
                           B * T};
  device.launch(softmax_rows, ceil_div(B * T, kRowWarps), dim3(kWarp, kRowWarps), 0, a);
  const Tensor w = no_t ? view(weights, {B, 1, S}, {S, S, 1}) : weights;
  const Tensor context = bmm(w, values);
  return {no_t ? view(context, {B, D}, {D, 1}) : context, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> additive_attention_backward(
    Tensor grad_context, Tensor grad_weights, Tensor query, Tensor keys, Tensor values, Tensor v,
    Tensor weights, double scale, std::optional<Tensor> powers, bool need_query, bool need_keys,
    bool need_values, bool need_v, bool need_bias) {
  check_attention(query, keys, values, v, std::nullopt, std::nullopt);
  const int64_t B = query.size(0), T = query.size(1), S = keys.size(1), D = values.size(2);
  check_shape(grad_context, B, T, D, "expected grad_context (B, T, D)");
  check_shape(grad_weights, B, T, S, "expected grad_weights (B, T, S)");
  check_shape(weights, B, T, S, "expected weights (B, T, S)");
  check_device(query, keys, values, v, grad_context, grad_weights, weights);
  const Device device(query);
  const bool need_scores = need_query || need_keys || need_v;
  const auto transposed = [](const Tensor& x) {
    return view(x, {x.size(0), x.size(2), x.size(1)}, {x.stride(0), x.stride(2), x.stride(1)});
  };
  // one each: outputs of an op may not alias
  const auto none = [&] { return empty(query, {0}); };
  Tensor grad_values = need_values ? bmm(transposed(weights), grad_context) : none();
  if (!need_scores && !need_bias) return {none(), none(), grad_values, none(), none()};

  Tensor grad_bias = need_bias ? empty(query, {B, T, S}) : none();
  const auto floats = [&] { return empty(query, {B, T, S}, ScalarType::Float); };
  Tensor grad_scores = need_scores ? floats() : none();
  SoftmaxBackwardArguments a{view_of(weights), view_of(grad_weights)};
  if (need_scores) a.grad_scores = floats_of(grad_scores);
  if (need_bias) a.grad_bias = grad_bias.data_ptr();
  a.type = type_of(query);
  a.scale = static_cast<float>(scale);
  a.T = size_of(query, 1), a.S = size_of(keys, 1), a.D = size_of(values, 2);
  a.rows = B * T;
  const dim3 threads(kWarp, kRowWarps);
  // A block for each of few rows reads large sources slowly.
  constexpr int64_t kLargeSource = 1 << 17;
  const bool idle = 2 * a.rows <= device.multiprocessors && S * D >= kLargeSource;
  if (T <= kFewQueries && S <= kMostKeysInShared && !idle) {
    a.grad_context = view_of(grad_context), a.values = view_of(values);
    device.launch(few_softmax_backward_rows, a.rows, threads, S + 2 * kRowWarps, a);
  } else {
    const Tensor from_context = bmm(grad_context, transposed(values));
    a.from_context = view_of(from_context);
    device.launch(softmax_backward_rows, ceil_div(a.rows, kRowWarps), threads, 0, a);
  }
  if (!need_scores) return {none(), none(), grad_values, none(), grad_bias};
  auto [dq, dk, dv] = scores_backward(device, prepare(device, query, keys, v, powers), grad_scores,
                                      query, keys, v, {need_query, need_keys, need_v});
  return {dq, dk, grad_values, dv, grad_bias};
}

}  // namespace
}  // namespace seq2seq_fast

S2S_CUDA_LIBRARY(m) {
  m.impl("additive_attention", TORCH_BOX(&seq2seq_fast::additive_attention));
  m.impl("additive_attention_backward", TORCH_BOX(&seq2seq_fast::additive_attention_backward));
}
