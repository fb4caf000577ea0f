// Products and the source, for the attention decoder.
#include "decoder.h"

#include <cmath>

namespace seq2seq_fast::decoder {

void fill(const Tensor& out, const Tensor& bias) {
  const int64_t W = bias.size(bias.dim() - 1), stride = bias.stride(bias.dim() - 1);
  copy(out, view(bias, {out.size(0), W}, {bias.dim() == 1 ? 0 : bias.stride(0), stride}));
}
std::vector<Layer> layers_of(const std::vector<Tensor>& x) {
  std::vector<Layer> layers;
  for (size_t i = 0; i + 2 < x.size(); i += 3)
    layers.push_back({x[i], x[i + 1], torch::stable::contiguous(x[i + 2])});
  return layers;
}

Source::Source(const std::vector<Tensor>& x, const std::optional<Tensor>& mask_,
               const std::optional<Tensor>& powers, bool prepare)
    : w_context(x[0]),
      w_query(x[1]),
      b_query(torch::stable::contiguous(x[2])),
      keys(x[3]),
      values(x[4]),
      v(x[5]) {
  if (prepare && keys.scalar_type() == ScalarType::Float) prepared.emplace(keys, powers);
  if (mask_)
    mask =
        view(*mask_, {mask_->size(0), 1, mask_->size(1)}, {mask_->stride(0), 0, mask_->stride(1)});
}

void Source::attend(const Tensor& query, const Tensor& context, const Tensor& weights) const {
  if (prepared)
    return seq2seq_fast::attend(one_of_each(query), *prepared, values, v, mask, std::nullopt, 1.0,
                                one_of_each(context), one_of_each(weights));
  auto [c, w] = attention_double(one_of_each(query), keys, values, v, mask, std::nullopt, 1.0);
  copy(one_of_each(context), c);
  copy(one_of_each(weights), w);
}

static void backward_in_float(const Source& source, const Tensor& dcontext, const Tensor& dweights,
                              const Tensor& query, const Tensor& weights, const Tensor& dscores,
                              const Tensor& dquery) {
  const Keys& k = *source.prepared;
  const Queries q(one_of_each(query), source.v);
  const Rows<float> rows(source.values);
  const int64_t S = k.S, D = source.values.size(2), Hp = k.Hp;
  const bool v_last = q.max_v < INFINITY;  // as in scores_backward
  parallel(q.B, S * (D / 4 + 4 * k.H), [&](int64_t begin, int64_t end) {
    Buffer<float> scratch(rows.scratch(S)), g(S), sum(Hp), ones(Hp), raw(k.gather_floats());
    std::fill_n(+ones, Hp, 1.f);
    for (int64_t b = begin; b < end; ++b) {
      const auto r = rows.block(b, 0, S, scratch);
      const float *dw = data<float>(dweights) + b * S, *w = data<float>(weights) + b * S;
      loops.products(data<float>(dcontext) + b * D, D, r.data, r.ld, 1, S, D, g, S);
      for (int64_t s = 0; s < S; ++s) g[s] += dw[s];
      loops.softmax_backward(g, w, S);
      std::copy_n(+g, S, data<float>(dscores) + b * S);
      loops.scale_and_flush(g, S, 1.f);
      const bool finite = loops.largest(g, S) < INFINITY;
      std::fill_n(+sum, Hp, 0.f);
      for (int64_t i = 0; i < k.blocks; ++i) {
        const Mode mode = finite ? choose(q.max[b], k.max(b, i), q.max_v) : Mode::kExact;
        const bool exact = mode == Mode::kExact;
        if (exact) k.gather(b, i, raw);
        for (int64_t h = 0; h < Hp; h += kGroup)
          loops.gradients(mode, k.minus_one(b, i), q.at(b, 0, h), 1,
                          (exact ? raw : k.block(b, i)) + k.count(i) * h, k.count(i), g + i * kRows,
                          S, (v_last ? +ones : +q.v) + h, q.width(h), sum + h, nullptr, nullptr);
      }
      float* to = data<float>(dquery) + b * k.H;
      for (int64_t h = 0; h < k.H; ++h) to[h] = v_last ? sum[h] * q.v[h] : sum[h];
    }
  });
}

void Source::attend_backward(const Tensor& dcontext, const Tensor& dweights, const Tensor& query,
                             const Tensor& weights, const Tensor& dscores,
                             const Tensor& dquery) const {
  if (prepared)
    return backward_in_float(*this, dcontext, dweights, query, weights, dscores, dquery);
  auto [dq, dk, dvalues, dv, ds] = attention_backward_double(
      one_of_each(dcontext), one_of_each(dweights), one_of_each(query), keys, values, v,
      one_of_each(weights), 1.0, {true, false, false}, false, true);
  copy(one_of_each(dquery), dq);
  copy(one_of_each(dscores), ds);
}

}  // namespace seq2seq_fast::decoder
