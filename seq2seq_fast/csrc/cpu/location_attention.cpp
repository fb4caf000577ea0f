// One query of each source, whose scores see where was attended before.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../checks.h"
#include "location.h"

namespace seq2seq_fast {
namespace {

void check_location(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& v,
                    const std::vector<Tensor>& location) {
  STD_TORCH_CHECK(query.dim() == 2 && location.size() == 3,
                  "expected query (B, A) and three of location");
  check_attention(one_of_each(query), keys, values, v, std::nullopt, std::nullopt);
  check_shape(location[2], keys.size(0), location[0].size(1), keys.size(1),
              "expected state (B, C, S)");
  STD_TORCH_CHECK(location[2].scalar_type() == query.scalar_type(),
                  "expected tensors of one dtype");
}

// f<A>(), where A is float or double
template <typename F>
auto in_either(const Tensor& x, F f) {
  if (x.scalar_type() == ScalarType::Double) return f.template operator()<double>();
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "expected float32 or float64");
  return f.template operator()<float>();
}

std::tuple<Tensor, Tensor, Tensor> location_attention(Tensor query, Tensor keys, Tensor values,
                                                      Tensor v, std::optional<Tensor> mask,
                                                      std::vector<Tensor> location,
                                                      std::vector<int64_t> accumulates) {
  check_location(query, keys, values, v, location);
  const int64_t B = keys.size(0), S = keys.size(1), D = values.size(2), A = query.size(1);
  const Tensor q = torch::stable::contiguous(query), state = torch::stable::contiguous(location[2]);
  const int64_t numbers = state.size(1) * S;
  const Tensor context = empty(query, {B, D}), weights = empty(query, {B, S}),
               next = empty(query, state.sizes());
  in_either(query, [&]<typename T>() {
    const Location<T> place(location, accumulates, keys, values, v, mask);
    const auto row = [](const Tensor& x, int64_t b, int64_t n) { return data<T>(x) + b * n; };
    std::vector<typename Location<T>::Row> rows;
    for (int64_t b = 0; b < B; ++b)
      rows.push_back({b, row(q, b, A), row(state, b, numbers), row(context, b, D),
                      row(weights, b, S), row(next, b, numbers)});
    place.attend(rows);
  });
  return {context, weights, next};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> location_attention_backward(
    Tensor grad_context, Tensor grad_weights, Tensor grad_next, Tensor query, Tensor keys,
    Tensor values, Tensor v, Tensor weights, std::vector<Tensor> location,
    std::vector<int64_t> accumulates, bool detach) {
  check_location(query, keys, values, v, location);
  const auto dense = [&](const Tensor& x) {
    STD_TORCH_CHECK(x.scalar_type() == query.scalar_type(), "expected tensors of one dtype");
    return torch::stable::contiguous(x);
  };
  const Tensor dc = dense(grad_context), dw = dense(grad_weights), q = dense(query),
               w = dense(weights), state = dense(location[2]);
  const Tensor dquery = empty(query, query.sizes()), dscores = empty(query, weights.sizes());
  return in_either(query, [&]<typename T>() {
    Location<T> place(location, accumulates, keys, values, v, std::nullopt);
    place.begin_backward(dense(grad_next), detach);
    place.attend_backward(query.size(0), data<T>(dc), data<T>(dw), data<T>(q), data<T>(state),
                          data<T>(w), data<T>(dscores), data<T>(dquery));
    const auto [dkeys, dv, dconv, dprojection, dstate] = place.results();
    return std::tuple(dquery, dkeys, dv, dconv, dprojection, dstate);
  });
}

}  // namespace
}  // namespace seq2seq_fast

STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast, CPU, m) {
  m.impl("location_attention", TORCH_BOX(&seq2seq_fast::location_attention));
  m.impl("location_attention_backward", TORCH_BOX(&seq2seq_fast::location_attention_backward));
}
