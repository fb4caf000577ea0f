// weights = softmax(scale scores + score_bias), context = weights values, and their gradients.
//
// Forward takes a tile of queries of one batch row through scores, softmax and context while all of
// it is in cache. Where there are too few tiles to share out, the three run one after another,
// split over blocks of keys and over parts of D; the arithmetic of a result is the same both ways.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "additive_scores.h"

namespace seq2seq_fast {
namespace {

constexpr int64_t kStrip = 16;  // rows of the gradient of values that are made together
constexpr int64_t kPart = 128;  // of D, where one query's context is shared out

struct Softmax {
  Rows<float> bias;
  const bool* mask = nullptr;
  int64_t stride[3] = {};
  float scale;
  Softmax(const std::optional<Tensor>& mask_, const std::optional<Tensor>& bias_, double scale_)
      : scale(static_cast<float>(scale_)) {
    if (bias_) bias = Rows<float>(*bias_);
    if (!mask_) return;
    STD_TORCH_CHECK(mask_->scalar_type() == ScalarType::Bool, "expected a bool mask");
    mask = static_cast<const bool*>(mask_->data_ptr());
    for (int64_t i = 0; i < 3; ++i) stride[i] = mask_->size(i) == 1 ? 0 : mask_->stride(i);
  }
  void row(int64_t b, int64_t t, float* x, int64_t S, float* scratch) const {
    loops.softmax(x, S, scale, bias ? bias.block(b, t, 1, scratch).data : nullptr,
                  mask ? mask + b * stride[0] + t * stride[1] : nullptr, stride[2]);
  }
};

// out (n, D) = w (n, S) values[b], where w[i][s] is at w + i * wi + s * ws
void weighted_sum(const Rows<float>& values, int64_t b, int64_t first_d, int64_t D, int64_t S,
                  const float* w, int64_t wi, int64_t ws, int64_t n, float* out, float* scratch) {
  const auto rows = values.block(b, 0, S, scratch);
  loops.weighted_rows(w, wi, ws, rows.data + first_d, rows.ld, n, S, D, out, D);
}

}  // namespace

void attend(const Tensor& query, const Keys& k, const Tensor& values, const Tensor& v,
            const std::optional<Tensor>& mask, const std::optional<Tensor>& score_bias,
            double scale, const Tensor& context, const Tensor& weights) {
  const Queries q(query, v);
  const Rows<float> rows(values);
  const Softmax softmax(mask, score_bias, scale);
  const int64_t B = q.B, T = q.T, S = k.S, D = values.size(2), Sp = k.blocks * kRows;
  const int64_t tiles = tiles_of(T), most = std::min(kTile, T);

  const auto softmax_rows = [&](int64_t b, int64_t t, int64_t n, float* w, float* scratch) {
    for (int64_t i = 0; i < n; ++i) {
      softmax.row(b, t + i, w + i * Sp, S, scratch);
      write<float>(weights, (b * T + t + i) * S, S, w + i * Sp, Sp, 1, S);
    }
  };
  const auto context_part = [&](int64_t b, int64_t t, int64_t n, int64_t d, int64_t width,
                                const float* w, float* out, float* scratch) {
    weighted_sum(rows, b, d, width, S, w, Sp, 1, n, out, scratch);
    write<float>(context, (b * T + t) * D + d, D, out, width, n, width);
  };
  const int64_t scratch_floats =
      std::max(rows.scratch(S), softmax.bias ? softmax.bias.scratch(1) : 0);

  const int64_t items = B * tiles, operations = most * S * (q.H + D);
  if (items >= 4 * static_cast<int64_t>(torch::stable::get_num_threads()) ||
      is_small(items, operations)) {
    parallel(items, operations, [&](int64_t begin, int64_t end) {
      Buffer<float> w(most * Sp), out(most * D), buffer(k.buffer_floats());
      Buffer<float> scratch(scratch_floats);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / tiles, t = i % tiles * kTile, n = std::min(kTile, T - t);
        scores_tile(q, k, b, t, n, 0, k.blocks, w, Sp, buffer);
        softmax_rows(b, t, n, w, scratch);
        context_part(b, t, n, 0, D, w, out, scratch);
      }
    });
    return;
  }
  Buffer<float> w(B * T * Sp);
  parallel(B * tiles * k.blocks, most * kRows * q.H, [&](int64_t begin, int64_t end) {
    Buffer<float> buffer(k.buffer_floats());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i % k.blocks, b = i / k.blocks / tiles,
                    t = i / k.blocks % tiles * kTile;
      scores_tile(q, k, b, t, std::min(kTile, T - t), block, block + 1,
                  w + (b * T + t) * Sp + block * kRows, Sp, buffer);
    }
  });
  parallel(B * T, 4 * S, [&](int64_t begin, int64_t end) {
    Buffer<float> scratch(scratch_floats);
    for (int64_t i = begin; i < end; ++i) softmax_rows(i / T, i % T, 1, w + i * Sp, scratch);
  });
  const int64_t parts = (D + kPart - 1) / kPart;
  parallel(B * tiles * parts, most * S * kPart / 4, [&](int64_t begin, int64_t end) {
    Buffer<float> out(most * kPart), scratch(scratch_floats);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t d = i % parts * kPart, b = i / parts / tiles, t = i / parts % tiles * kTile;
      context_part(b, t, std::min(kTile, T - t), d, std::min(kPart, D - d), w + (b * T + t) * Sp,
                   out, scratch);
    }
  });
}

namespace {

std::tuple<Tensor, Tensor> additive_attention(Tensor query_, Tensor keys, Tensor values, Tensor v,
                                              std::optional<Tensor> mask,
                                              std::optional<Tensor> score_bias, double scale,
                                              std::optional<Tensor> powers) {
  const bool one_query = query_.dim() == 2;  // (B, H): no T axis in the results either
  const Tensor query = one_query ? view(query_, {query_.size(0), 1, query_.size(1)},
                                        {query_.stride(0), 0, query_.stride(1)})
                                 : query_;
  check_attention(query, keys, values, v, mask, score_bias);
  if (query.scalar_type() == ScalarType::Double) {
    auto [c, w] = attention_double(query, keys, values, v, mask, score_bias, scale);
    if (!one_query) return {c, w};
    return {view(c, {c.size(0), c.size(2)}, {c.size(2), 1}),
            view(w, {w.size(0), w.size(2)}, {w.size(2), 1})};
  }
  const int64_t B = query.size(0), T = query.size(1), S = keys.size(1), D = values.size(2);
  Tensor context = one_query ? empty(query, {B, D}) : empty(query, {B, T, D});
  Tensor weights = one_query ? empty(query, {B, S}) : empty(query, {B, T, S});
  const Keys k(keys, powers, tiles_of(T) == 1 ? Beforehand::kNothing : Beforehand::kAll);
  attend(query, k, values, v, mask, score_bias, scale, context, weights);
  return {context, weights};
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
  const Needs needs{need_query, need_keys, need_v};
  const bool need_scores = need_query || need_keys || need_v;
  // one each: outputs of an op may not alias
  const auto none = [&] { return empty(query, {0}); };
  if (query.scalar_type() == ScalarType::Double)
    return attention_backward_double(grad_context, grad_weights, query, keys, values, v, weights,
                                     scale, needs, need_values, need_bias);

  const Rows<float> dc(grad_context), dw(grad_weights), rows(values), w(weights);
  const int64_t Sp = round_up(S, kRows);
  Tensor grad_values = need_values ? empty(values, {B, S, D}) : none();
  Tensor grad_bias = need_bias ? empty(query, {B, T, S}) : none();
  if (need_values) {
    const int64_t strips = (S + kStrip - 1) / kStrip;
    parallel(B * strips, kStrip * T * D / 4, [&](int64_t begin, int64_t end) {
      Buffer<float> out(kStrip * D), scratch(dc.scratch(T)), scratch_w(w.scratch(T));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / strips, s = i % strips * kStrip, n = std::min(kStrip, S - s);
        const auto wt = w.block(b, 0, T, scratch_w);
        weighted_sum(dc, b, 0, D, T, wt.data + s, 1, wt.ld, n, out, scratch);
        write<float>(grad_values, (b * S + s) * D, D, out, D, n, D);
      }
    });
  }
  if (!need_scores && !need_bias) return {none(), none(), grad_values, none(), none()};

  Buffer<float> g(B * T * Sp);
  const int64_t most = std::min<int64_t>(4, T), quads = (T + 3) / 4;
  parallel(B * quads, most * S * D / 4, [&](int64_t begin, int64_t end) {
    Buffer<float> scratch(rows.scratch(S)), scratch_c(dc.scratch(most));
    Buffer<float> scratch_w(w.scratch(1) + dw.scratch(1));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / quads, t = i % quads * 4, n = std::min<int64_t>(4, T - t);
      float* to = g + (b * T + t) * Sp;
      const auto c = dc.block(b, t, n, scratch_c), r = rows.block(b, 0, S, scratch);
      loops.products(c.data, c.ld, r.data, r.ld, n, S, D, to, Sp);
      for (int64_t j = 0; j < n; ++j, to += Sp) {
        const float* extra = dw.block(b, t + j, 1, scratch_w).data;
        for (int64_t s = 0; s < S; ++s) to[s] += extra[s];
        loops.softmax_backward(to, w.block(b, t + j, 1, scratch_w).data, S);
        if (need_bias) write<float>(grad_bias, (b * T + t + j) * S, S, to, S, 1, S);
        loops.scale_and_flush(to, S, static_cast<float>(scale));
      }
    }
  });
  if (!need_scores) return {none(), none(), grad_values, none(), grad_bias};
  auto [dq, dk, dv] = scores_backward(Queries(query, v), keys_of_backward(keys, powers), g, Sp,
                                      query, keys, v, needs);
  return {dq, dk, grad_values, dv, grad_bias};
}

}  // namespace
}  // namespace seq2seq_fast

STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast, CPU, m) {
  m.impl("additive_attention", TORCH_BOX(&seq2seq_fast::additive_attention));
  m.impl("additive_attention_backward", TORCH_BOX(&seq2seq_fast::additive_attention_backward));
}
