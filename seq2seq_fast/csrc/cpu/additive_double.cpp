// float64 in plain loops: the precision that gradcheck and other oracles run in.
#include <cmath>

#include "additive_scores.h"

namespace seq2seq_fast {
namespace {

// A strided view of up to three axes.
struct View {
  double* data;
  int64_t stride[3] = {};
  explicit View(const Tensor& x) : data(static_cast<double*>(x.data_ptr())) {
    for (int64_t i = 0; i < x.dim(); ++i) stride[i] = x.stride(i);
  }
  double& operator()(int64_t i, int64_t j = 0, int64_t k = 0) const {
    return data[i * stride[0] + j * stride[1] + k * stride[2]];
  }
};

}  // namespace

Tensor scores_double(const Tensor& query, const Tensor& keys, const Tensor& v) {
  const View q(query), k(keys), w(v);
  const int64_t B = query.size(0), T = query.size(1), S = keys.size(1), H = query.size(2);
  Tensor out = empty(query, {B, T, S});
  const View o(out);
  parallel(B * T * S, 10 * H, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / (T * S), t = i / S % T, s = i % S;
      double sum = 0;
      for (int64_t h = 0; h < H; ++h) sum += w(h) * std::tanh(q(b, t, h) + k(b, s, h));
      o(b, t, s) = sum;
    }
  });
  return out;
}

std::array<Tensor, 3> scores_backward_double(const Tensor& grad, const Tensor& query,
                                             const Tensor& keys, const Tensor& v, Needs needs) {
  const View g(grad), q(query), k(keys), w(v);
  const int64_t B = query.size(0), T = query.size(1), S = keys.size(1), H = query.size(2);
  Tensor dq = empty(query, {B, T, H});
  Tensor dk = empty(keys, {B, S, H}), dv = empty(v, {H});
  const View oq(dq), ok(dk), ov(dv);
  parallel(H, 10 * B * T * S, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      double sum_v = 0;
      for (int64_t b = 0; b < B; ++b) {
        for (int64_t s = 0; s < S; ++s) ok(b, s, h) = 0;
        for (int64_t t = 0; t < T; ++t) {
          double sum_q = 0;
          for (int64_t s = 0; s < S; ++s) {
            const double y = std::tanh(q(b, t, h) + k(b, s, h));
            const double e = g(b, t, s) * w(h) * ((1 - y) * (1 + y));
            sum_q += e, sum_v += g(b, t, s) * y;
            ok(b, s, h) += e;
          }
          oq(b, t, h) = sum_q;
        }
      }
      ov(h) = sum_v;
    }
  });
  // one each: outputs of an op may not alias
  const auto none = [&] { return empty(query, {0}); };
  return {needs.query ? dq : none(), needs.keys ? dk : none(), needs.v ? dv : none()};
}

std::tuple<Tensor, Tensor> attention_double(const Tensor& query, const Tensor& keys,
                                            const Tensor& values, const Tensor& v,
                                            const std::optional<Tensor>& mask,
                                            const std::optional<Tensor>& score_bias, double scale) {
  const int64_t B = query.size(0), T = query.size(1), S = keys.size(1), D = values.size(2);
  Tensor weights = scores_double(query, keys, v);
  Tensor context = empty(query, {B, T, D});
  const View w(weights), c(context), x(values);
  const std::optional<View> bias = score_bias ? std::optional<View>(*score_bias) : std::nullopt;
  const auto attended = [&](int64_t b, int64_t t, int64_t s) {
    return !mask || static_cast<const bool*>(
                        mask->data_ptr())[b * mask->stride(0) +
                                          (mask->size(1) == 1 ? 0 : t) * mask->stride(1) +
                                          s * mask->stride(2)];
  };
  parallel(B * T, 4 * S * D, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / T, t = i % T;
      double top = -INFINITY, total = 0;
      for (int64_t s = 0; s < S; ++s) {
        w(b, t, s) = scale * w(b, t, s) + (bias ? (*bias)(b, t, s) : 0);
        if (attended(b, t, s) && w(b, t, s) > top) top = w(b, t, s);
      }
      for (int64_t s = 0; s < S; ++s) {
        w(b, t, s) = attended(b, t, s) ? std::exp(w(b, t, s) - top) : 0;
        total += w(b, t, s);
      }
      for (int64_t s = 0; s < S; ++s)
        if (attended(b, t, s)) w(b, t, s) /= total;
      for (int64_t d = 0; d < D; ++d) c(b, t, d) = 0;
      for (int64_t s = 0; s < S; ++s)
        for (int64_t d = 0; d < D; ++d) c(b, t, d) += w(b, t, s) * x(b, s, d);
    }
  });
  return {context, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_double(
    const Tensor& grad_context, const Tensor& grad_weights, const Tensor& query, const Tensor& keys,
    const Tensor& values, const Tensor& v, const Tensor& weights, double scale, Needs needs,
    bool need_values, bool need_bias) {
  const int64_t B = query.size(0), T = query.size(1), S = keys.size(1), D = values.size(2);
  Tensor grad_values = empty(values, {B, S, D});
  Tensor grad_bias = empty(query, {B, T, S});
  Tensor grad_scores = empty(query, {B, T, S});
  const View dc(grad_context), dw(grad_weights), x(values), w(weights);
  const View dx(grad_values), db(grad_bias), g(grad_scores);
  parallel(B, 4 * T * S * D, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t s = 0; s < S; ++s)
        for (int64_t d = 0; d < D; ++d) dx(b, s, d) = 0;
      for (int64_t t = 0; t < T; ++t) {
        double dot = 0;
        for (int64_t s = 0; s < S; ++s) {
          double sum = dw(b, t, s);
          for (int64_t d = 0; d < D; ++d) {
            sum += dc(b, t, d) * x(b, s, d);
            dx(b, s, d) += w(b, t, s) * dc(b, t, d);
          }
          db(b, t, s) = sum;
          dot += sum * w(b, t, s);
        }
        for (int64_t s = 0; s < S; ++s) {
          db(b, t, s) = w(b, t, s) * (db(b, t, s) - dot);
          g(b, t, s) = scale * db(b, t, s);
        }
      }
    }
  });
  // one each: outputs of an op may not alias
  const auto none = [&] { return empty(query, {0}); };
  std::array<Tensor, 3> out = {none(), none(), none()};
  if (needs.query || needs.keys || needs.v)
    out = scores_backward_double(grad_scores, query, keys, v, needs);
  return {out[0], out[1], need_values ? grad_values : none(), out[2],
          need_bias ? grad_bias : none()};
}

}  // namespace seq2seq_fast
