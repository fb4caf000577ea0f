// A recurrent decoder with attention inside its recurrence, over T steps, forward and backward.
//
// Time first: every step works on slabs of rows that lie together. Matrix products are the BLAS
// behind torch; the products of whole sequences of inputs come before the loop, and those that make
// gradients of weights, keys and values are left to the caller. Layouts are in cells.h.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "additive_scores.h"
#include "cells.h"

namespace seq2seq_fast {
namespace {

Cell cell_of(const std::string& name) {
  if (name == "lstm") return Cell::kLstm;
  if (name == "gru") return Cell::kGru;
  STD_TORCH_CHECK(name == "rnn", "expected cell_type lstm, gru or rnn");
  return Cell::kRnn;
}

// Row i of axis 0, of axes 0 and 1; the rest is contiguous or a matrix with a stride.
Tensor at(const Tensor& x, int64_t i) {
  return view(x, {x.size(1), x.size(2)}, {x.stride(1), x.stride(2)}, i * x.stride(0));
}
Tensor at(const Tensor& x, int64_t i, int64_t j) {
  return view(x, {x.size(2), x.size(3)}, {x.stride(2), x.stride(3)},
              i * x.stride(0) + j * x.stride(1));
}
Tensor columns(const Tensor& x, int64_t first, int64_t count) {
  return view(x, {x.size(0), count}, {x.stride(0), x.stride(1)}, first * x.stride(1));
}
Tensor transposed(const Tensor& x) {
  return view(x, {x.size(1), x.size(0)}, {x.stride(1), x.stride(0)});
}
// (B, W) as (B, 1, W)
Tensor one_step(const Tensor& x) {
  return view(x, {x.size(0), 1, x.size(1)}, {x.stride(0), 0, x.stride(1)});
}

// out = beta out + a b
void product(const Tensor& out, const Tensor& a, const Tensor& b, double beta) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, 1.0));
}

void copy(const Tensor& to, const Tensor& from) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(to.get(), from.get(), 0));
}

// Each row becomes the bias, (W,) or (B, W).
void fill(const Tensor& out, const Tensor& bias) {
  const int64_t rows = bias.dim() == 1 ? 1 : bias.size(0);
  copy(out, view(bias, {out.size(0), bias.size(bias.dim() - 1)},
                 {rows == 1 ? 0 : bias.stride(0), bias.stride(bias.dim() - 1)}));
}

template <typename A>
A* data(const Tensor& x) {
  return static_cast<A*>(x.data_ptr());
}

struct Layer {
  Tensor w_input, w_hidden, bias;
};

std::vector<Layer> layers_of(const std::vector<Tensor>& x) {
  std::vector<Layer> layers;
  for (size_t i = 0; i + 2 < x.size(); i += 3) layers.push_back({x[i], x[i + 1], x[i + 2]});
  return layers;
}

struct Source {
  Tensor w_context, w_query, b_query, keys, values, v;
  std::optional<Keys> prepared;
  std::optional<Tensor> mask;

  Source(const std::vector<Tensor>& x, const std::optional<Tensor>& mask_,
         const std::optional<Tensor>& powers)
      : w_context(x[0]), w_query(x[1]), b_query(x[2]), keys(x[3]), values(x[4]), v(x[5]) {
    if (keys.scalar_type() == ScalarType::Float) prepared.emplace(keys, powers);
    if (mask_)
      mask = view(*mask_, {mask_->size(0), 1, mask_->size(1)},
                  {mask_->stride(0), 0, mask_->stride(1)});
  }

  // query (B, A) to context (B, D) and weights (B, S)
  void attend(const Tensor& query, const Tensor& context, const Tensor& weights) const {
    if (prepared)
      return seq2seq_fast::attend(one_step(query), *prepared, values, v, mask, std::nullopt, 1.0,
                                  one_step(context), one_step(weights));
    auto [c, w] = attention_double(one_step(query), keys, values, v, mask, std::nullopt, 1.0);
    copy(one_step(context), c);
    copy(one_step(weights), w);
  }

  // Gradients of the scores (B, S) and the query, from those of context and weights.
  void attend_backward(const Tensor& dcontext, const Tensor& dweights, const Tensor& query,
                       const Tensor& weights, const Tensor& dscores, const Tensor& dquery) const {
    if (prepared) return backward_in_float(dcontext, dweights, query, weights, dscores, dquery);
    auto [dq, dk, dvalues, dv, ds] = attention_backward_double(
        one_step(dcontext), one_step(dweights), one_step(query), keys, values, v, one_step(weights),
        1.0, {true, false, false}, false, true);
    copy(one_step(dquery), dq);
    copy(one_step(dscores), ds);
  }

 private:
  void backward_in_float(const Tensor& dcontext, const Tensor& dweights, const Tensor& query,
                         const Tensor& weights, const Tensor& dscores, const Tensor& dquery) const {
    const Keys& k = *prepared;
    const Queries q(one_step(query), v);
    const Rows<float> rows(values);
    const int64_t S = k.S, D = values.size(2), Hp = k.Hp;
    const bool v_last = q.max_v < INFINITY;  // as in scores_backward
    parallel(k.B, S * (D / 4 + 4 * k.H), [&](int64_t begin, int64_t end) {
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
                            (exact ? raw : k.block(b, i)) + k.count(i) * h, k.count(i),
                            g + i * kRows, S, (v_last ? +ones : +q.v) + h, q.width(h), sum + h,
                            nullptr, nullptr);
        }
        float* to = data<float>(dquery) + b * k.H;
        for (int64_t h = 0; h < k.H; ++h) to[h] = v_last ? sum[h] * q.v[h] : sum[h];
      }
    });
  }
};

// Plain loops for float64; float32 has its vectors.
template <Cell kCell>
void advance_row(double* gates, const double* hidden_before, const double* cell_before, int64_t H,
                 double* hidden, double* cell) {
  for (int64_t h = 0; h < H; ++h) {
    Unit<double> u;
    for (int i = 0; i < blocks_of(kCell); ++i) u.gates[i] = gates[i * H + h];
    if constexpr (kCell == Cell::kLstm) u.cell_before = cell_before[h];
    if constexpr (kCell == Cell::kGru) u.hidden_before = hidden_before[h];
    advance<kCell>(u);
    for (int i = 0; i < blocks_of(kCell); ++i) gates[i * H + h] = u.gates[i];
    if constexpr (kCell == Cell::kLstm) cell[h] = u.cell;
    hidden[h] = u.hidden;
  }
}
template <Cell kCell>
void retreat_row(const double* gates, const double* hidden_before, const double* cell_before,
                 const double* cell, int64_t H, double* dh, double* dc, double* dgates) {
  for (int64_t h = 0; h < H; ++h) {
    Unit<double> u;
    double out[4], none = 0;
    for (int i = 0; i < blocks_of(kCell); ++i) u.gates[i] = gates[i * H + h];
    if constexpr (kCell == Cell::kGru) u.hidden_before = hidden_before[h];
    if constexpr (kCell == Cell::kLstm) u.cell_before = cell_before[h], u.cell = cell[h];
    retreat<kCell>(u, dh[h], kCell == Cell::kLstm ? dc[h] : none, out);
    for (int i = 0; i < blocks_of(kCell); ++i) dgates[i * H + h] = out[i];
  }
}
template <typename F>
void with_cell(Cell cell, F f) {
  if (cell == Cell::kLstm) return f.template operator()<Cell::kLstm>();
  if (cell == Cell::kGru) return f.template operator()<Cell::kGru>();
  f.template operator()<Cell::kRnn>();
}
void advance_cell(Cell cell, double* gates, const double* hidden_before, const double* cell_before,
                  int64_t H, double* hidden, double* memory) {
  with_cell(cell, [&]<Cell kCell>() {
    advance_row<kCell>(gates, hidden_before, cell_before, H, hidden, memory);
  });
}
void retreat_cell(Cell cell, const double* gates, const double* hidden_before,
                  const double* cell_before, const double* memory, int64_t H, double* dh,
                  double* dc, double* dgates) {
  with_cell(cell, [&]<Cell kCell>() {
    retreat_row<kCell>(gates, hidden_before, cell_before, memory, H, dh, dc, dgates);
  });
}
void advance_cell(Cell cell, float* gates, const float* hidden_before, const float* cell_before,
                  int64_t H, float* hidden, float* memory) {
  loops.advance(cell, gates, hidden_before, cell_before, H, hidden, memory);
}
void retreat_cell(Cell cell, const float* gates, const float* hidden_before,
                  const float* cell_before, const float* memory, int64_t H, float* dh, float* dc,
                  float* dgates) {
  loops.retreat(cell, gates, hidden_before, cell_before, memory, H, dh, dc, dgates);
}

// A step that is fed the argmax of the one before.
template <typename A>
struct Feedback {
  std::vector<int64_t> steps;
  std::vector<Tensor> readout;  // embedding (V, E), weight (V, H + D), bias (V,)
  std::optional<Tensor> dropout;
  Tensor tokens, logits;  // (F, B), (B, T + 1, V)

  // Writes logits[:, t] and tokens[i], and what they embed to (B, E).
  void read(int64_t i, const Tensor& hidden, const Tensor& context, const Tensor& out) const {
    const Tensor &embedding = readout[0], &weight = readout[1];
    const int64_t t = steps[i], B = hidden.size(0), H = hidden.size(1), E = embedding.size(1);
    const int64_t V = weight.size(0), ld = logits.stride(0);
    const Tensor rows = view(logits, {B, V}, {ld, 1}, t * V);
    fill(rows, readout[2]);
    product(rows, hidden, transposed(columns(weight, 0, H)), 1);
    product(rows, context, transposed(columns(weight, H, context.size(1))), 1);
    int64_t* ids = data<int64_t>(tokens) + i * B;
    const Rows<A> table(embedding);
    const A* factors = dropout ? data<A>(*dropout) + t * B * E : nullptr;
    parallel(B, V + E, [&](int64_t begin, int64_t end) {
      Buffer<A> scratch(table.scratch(1));
      for (int64_t b = begin; b < end; ++b) {
        ids[b] = argmax(data<A>(rows) + b * ld, V);
        const A* from = table.block(0, ids[b], 1, scratch).data;
        A* to = data<A>(out) + b * E;
        for (int64_t e = 0; e < E; ++e) to[e] = factors ? from[e] * factors[b * E + e] : from[e];
      }
    });
  }

  // The first of the largest, or the first NaN, as torch.argmax has it.
  static int64_t argmax(const A* x, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n && x[best] == x[best]; ++i)
      if (!(x[i] <= x[best])) best = i;
    return best;
  }
};

// What a run leaves; see reference_decoder.py.
struct Run {
  Tensor hiddens, cells, gates, queries, contexts, weights;
};

template <typename A>
void forward(const Tensor& inputs, const std::vector<Layer>& layers,
             const std::optional<Source>& source, const std::optional<Tensor>& fixed,
             const std::optional<Tensor>& dropout, Cell cell, bool query_after,
             const Feedback<A>& feedback, const Run& run) {
  const int64_t T = inputs.size(0), B = inputs.size(1), E = inputs.size(2);
  const int64_t L = run.hiddens.size(0), H = run.hiddens.size(3), G = run.gates.size(3);
  const int64_t first_hidden = G - layers[0].w_hidden.size(0);
  const Tensor w_first = transposed(layers[0].w_input);
  const Tensor all_inputs = view(inputs, {T * B, E}, {E, 1});
  const Tensor all_gates = view(run.gates, {T * B, G}, {G, 1});
  const auto from_inputs = [&](const Tensor& x, int64_t t, int64_t steps) {
    const Tensor rows = view(all_gates, {steps * B, w_first.size(1)}, {G, 1}, t * B * G);
    product(rows, x, w_first, 1);
  };
  // The steps [t, next fed back) as one product.
  const auto forced = [&](int64_t t, size_t next) {
    const int64_t end = next < feedback.steps.size() ? feedback.steps[next] : T;
    if (t < end) from_inputs(view(all_inputs, {(end - t) * B, E}, {E, 1}, t * B * E), t, end - t);
  };
  Tensor fed_back = empty(inputs, {B, feedback.steps.empty() ? 0 : E});
  Tensor dropped = empty(inputs, {B, dropout ? H : 0});
  std::vector<Tensor> w_input, w_hidden;
  for (const Layer& layer : layers) {
    w_input.push_back(transposed(layer.w_input));
    w_hidden.push_back(transposed(layer.w_hidden));
  }
  const auto attend = [&](int64_t t, const Tensor& state) {
    const Tensor query = at(run.queries, t);
    fill(query, source->b_query);
    product(query, state, transposed(source->w_query), 1);
    source->attend(query, at(run.contexts, t + 1), at(run.weights, t));
  };

  for (int64_t t = 0; t < T; ++t) fill(at(run.gates, 0, t), layers[0].bias);
  forced(0, 0);
  size_t next = 0;
  for (int64_t t = 0; t < T; ++t) {
    const Tensor state = at(run.hiddens, L - 1, t);
    if (next < feedback.steps.size() && feedback.steps[next] == t) {
      feedback.read(next, state, source ? at(run.contexts, t) : *fixed, fed_back);
      from_inputs(fed_back, t, 1);
      forced(t + 1, ++next);
    }
    if (source) {
      if (!query_after) attend(t, state);
      product(columns(at(run.gates, 0, t), 0, w_first.size(1)),
              at(run.contexts, query_after ? t : t + 1), transposed(source->w_context), 1);
    }
    for (int64_t l = 0; l < L; ++l) {
      const Tensor gates = at(run.gates, l, t), before = at(run.hiddens, l, t);
      if (l > 0) {
        fill(gates, layers[l].bias);
        product(columns(gates, 0, w_input[l].size(1)),
                dropout ? dropped : at(run.hiddens, l - 1, t + 1), w_input[l], 1);
      }
      product(columns(gates, first_hidden, w_hidden[l].size(1)), before, w_hidden[l], 1);
      const int64_t from = (l * (T + 1) + t) * B * H, to = from + B * H;
      A *g = data<A>(gates), *h = data<A>(run.hiddens);
      A* c = cell == Cell::kLstm ? data<A>(run.cells) : nullptr;
      const A* factors = dropout && l + 1 < L ? data<A>(*dropout) + (l * T + t) * B * H : nullptr;
      parallel(B, 20 * G, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          A* out = h + to + b * H;
          advance_cell(cell, g + b * G, h + from + b * H, c ? c + from + b * H : nullptr, H, out,
                       c ? c + to + b * H : nullptr);
          if (!factors) continue;
          for (int64_t i = 0; i < H; ++i) data<A>(dropped)[b * H + i] = out[i] * factors[b * H + i];
        }
      });
    }
    if (source && query_after) attend(t, at(run.hiddens, L - 1, t + 1));
  }
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs attention_decoder(Tensor inputs, Tensor hidden, Tensor cell, std::vector<Tensor> layers,
                          std::vector<Tensor> attention, std::optional<Tensor> mask,
                          std::optional<Tensor> powers, std::optional<Tensor> context,
                          std::optional<Tensor> dropout, std::string cell_type, bool query_after,
                          std::vector<int64_t> feedback, std::vector<Tensor> readout,
                          std::optional<Tensor> input_dropout) {
  const Cell kind = cell_of(cell_type);
  const int64_t T = inputs.size(0), B = inputs.size(1), L = hidden.size(0), H = hidden.size(2);
  const int64_t G = blocks_of(kind) * H;
  const auto none = [&] { return empty(inputs, {0}); };
  Run run = {
      empty(inputs, {L, T + 1, B, H}), none(), empty(inputs, {L, T, B, G}), none(), none(), none()};
  for (int64_t l = 0; l < L; ++l) copy(at(run.hiddens, l, 0), at(hidden, l));
  if (kind == Cell::kLstm) {
    run.cells = empty(inputs, {L, T + 1, B, H});
    for (int64_t l = 0; l < L; ++l) copy(at(run.cells, l, 0), at(cell, l));
  }
  std::optional<Source> source;
  if (!attention.empty()) {
    source.emplace(attention, mask, powers);
    run.queries = empty(inputs, {T, B, source->v.size(0)});
    run.weights = empty(inputs, {T, B, source->keys.size(1)});
    run.contexts = empty(inputs, {T + 1, B, source->values.size(2)});
    Tensor first = at(run.contexts, 0);
    if (context)
      copy(first, *context);
    else
      torch::stable::zero_(first);
  }
  const int64_t V = feedback.empty() ? 0 : readout[1].size(0), F = feedback.size();
  Tensor tokens = feedback.empty() ? empty(inputs, {0}, ScalarType::Long)
                                   : empty(inputs, {F, B}, ScalarType::Long);
  Tensor logits = feedback.empty() ? none() : empty(inputs, {B, T + 1, V});
  const auto go = [&]<typename A>() {
    const Feedback<A> fed = {feedback, readout, input_dropout, tokens, logits};
    forward<A>(inputs, layers_of(layers), source, context, dropout, kind, query_after, fed, run);
  };
  if (inputs.scalar_type() == ScalarType::Double)
    go.template operator()<double>();
  else
    go.template operator()<float>();
  return {run.hiddens,  run.cells,   run.gates, run.queries,
          run.contexts, run.weights, tokens,    logits};
}

// Gradients that the loop carries or leaves; see reference_decoder.py.
struct Gradients {
  Tensor gates, queries, scores, contexts, hidden, cell, context;
};

template <typename A>
void backward(const Tensor& grad_outputs, const Tensor& grad_contexts, const Tensor& grad_weights,
              const Run& run, const std::vector<Layer>& layers, const std::optional<Source>& source,
              const std::optional<Tensor>& dropout, Cell cell, bool query_after,
              const Gradients& d) {
  const int64_t L = run.gates.size(0), T = run.gates.size(1), B = run.gates.size(2);
  const int64_t G = run.gates.size(3), H = run.hiddens.size(3);
  const int64_t n_input = layers[0].w_input.size(0), n_hidden = layers[0].w_hidden.size(0);
  Tensor dropped = empty(run.gates, {B, dropout ? H : 0});
  const auto attend_backward = [&](int64_t t) {
    source->attend_backward(at(d.contexts, t), at(grad_weights, t), at(run.queries, t),
                            at(run.weights, t), at(d.scores, t), at(d.queries, t));
    product(at(d.hidden, L - 1), at(d.queries, t), source->w_query, 1);
  };
  for (int64_t t = T - 1; t >= 0; --t) {
    const A* grad = data<A>(grad_outputs) + t * B * H;
    A* top = data<A>(d.hidden) + (L - 1) * B * H;
    for (int64_t i = 0; i < B * H; ++i) top[i] += grad[i];
    if (source) copy(at(d.contexts, t), at(grad_contexts, t));
    if (source && query_after) {
      if (t + 1 < T)
        product(at(d.contexts, t), columns(at(d.gates, 0, t + 1), 0, n_input), source->w_context,
                1);
      attend_backward(t);
    }
    for (int64_t l = L - 1; l >= 0; --l) {
      const int64_t before = (l * (T + 1) + t) * B * H, after = before + B * H;
      const Tensor dgates = at(d.gates, l, t), dhidden = at(d.hidden, l);
      const A *h = data<A>(run.hiddens), *g = data<A>(at(run.gates, l, t));
      const A* c = cell == Cell::kLstm ? data<A>(run.cells) : nullptr;
      A *dh = data<A>(dhidden), *dg = data<A>(dgates);
      A* dc = c ? data<A>(d.cell) + l * B * H : nullptr;
      parallel(B, 20 * G, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
          retreat_cell(cell, g + b * G, h + before + b * H, c ? c + before + b * H : nullptr,
                       c ? c + after + b * H : nullptr, H, dh + b * H, dc ? dc + b * H : nullptr,
                       dg + b * G);
      });
      product(dhidden, columns(dgates, G - n_hidden, n_hidden), layers[l].w_hidden,
              cell == Cell::kGru ? 1 : 0);
      if (l == 0) continue;
      const Tensor below = at(d.hidden, l - 1), dx = columns(dgates, 0, n_input);
      if (!dropout) {
        product(below, dx, layers[l].w_input, 1);
        continue;
      }
      product(dropped, dx, layers[l].w_input, 0);
      const A *factors = data<A>(*dropout) + ((l - 1) * T + t) * B * H, *x = data<A>(dropped);
      A* to = data<A>(below);
      for (int64_t i = 0; i < B * H; ++i) to[i] += x[i] * factors[i];
    }
    if (source && !query_after) {
      product(at(d.contexts, t), columns(at(d.gates, 0, t), 0, n_input), source->w_context, 1);
      attend_backward(t);
    }
  }
  if (!source) return;
  if (query_after && T > 0)
    product(d.context, columns(at(d.gates, 0, 0), 0, n_input), source->w_context, 0);
  else
    torch::stable::zero_(const_cast<Tensor&>(d.context));
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Backward attention_decoder_backward(Tensor grad_outputs, Tensor grad_contexts, Tensor grad_weights,
                                    Tensor grad_hidden, Tensor grad_cell, Tensor hiddens,
                                    Tensor cells, Tensor gates, Tensor queries, Tensor weights,
                                    std::vector<Tensor> layers, std::vector<Tensor> attention,
                                    std::optional<Tensor> powers, std::optional<Tensor> dropout,
                                    std::string cell_type, bool query_after) {
  const auto like = [](const Tensor& x) { return empty(x, x.sizes()); };
  std::optional<Source> source;
  if (!attention.empty()) source.emplace(attention, std::nullopt, powers);
  Gradients d = {like(gates),
                 like(queries),
                 like(weights),
                 like(grad_contexts),
                 like(grad_hidden),
                 like(grad_cell),
                 source ? empty(gates, {gates.size(2), grad_contexts.size(2)}) : empty(gates, {0})};
  copy(d.hidden, grad_hidden);
  copy(d.cell, grad_cell);
  const Run run = {hiddens, cells, gates, queries, grad_contexts, weights};
  const auto go = [&]<typename A>() {
    backward<A>(grad_outputs, grad_contexts, grad_weights, run, layers_of(layers), source, dropout,
                cell_of(cell_type), query_after, d);
  };
  if (gates.scalar_type() == ScalarType::Double)
    go.template operator()<double>();
  else
    go.template operator()<float>();
  return {d.gates, d.queries, d.scores, d.contexts, d.hidden, d.cell, d.context};
}

}  // namespace
}  // namespace seq2seq_fast

STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast, CPU, m) {
  m.impl("attention_decoder", TORCH_BOX(&seq2seq_fast::attention_decoder));
  m.impl("attention_decoder_backward", TORCH_BOX(&seq2seq_fast::attention_decoder_backward));
}
