// The recurrence of the attention decoder backward: gradients of gates, queries, scores and
// contexts at each step. Those of weights, keys and values are products over all steps, which are
// left to the caller.
#include <torch/csrc/stable/library.h>

#include <deque>

#include "../decoder_ops.h"
#include "cells.h"
#include "decoder.h"
#include "location.h"

namespace seq2seq_fast::decoder {
namespace {

void retreat_units(Cell cell, const double* gates, int64_t H, const double* hidden_before,
                   const double* cell_before, const double* memory, int64_t n, double* dh,
                   double* dc, double* dgates) {
  with_cell(cell, [&]<Cell kCell>() {
    for (int64_t h = 0; h < n; ++h) {
      Unit<double> u;
      double out[4], none = 0;
      for (int i = 0; i < blocks_of(kCell); ++i) u.gates[i] = gates[i * H + h];
      if constexpr (kCell == Cell::kGru) u.hidden_before = hidden_before[h];
      if constexpr (kCell == Cell::kLstm) u.cell_before = cell_before[h], u.cell = memory[h];
      retreat<kCell>(u, dh[h], kCell == Cell::kLstm ? dc[h] : none, out);
      for (int i = 0; i < blocks_of(kCell); ++i) dgates[i * H + h] = out[i];
    }
  });
}
void retreat_units(Cell cell, const float* gates, int64_t H, const float* hidden_before,
                   const float* cell_before, const float* memory, int64_t n, float* dh, float* dc,
                   float* dgates) {
  loops.retreat(cell, gates, H, hidden_before, cell_before, memory, n, dh, dc, dgates);
}

template <typename A>
class Backward {
 public:
  Backward(const DecoderBackwardCall& call, const std::vector<Layer>& layers,
           const std::optional<Source>& source, const Gradients& d, Location<A>* location)
      : call_(call),
        layers_(layers),
        run_(call.run),
        source_(source),
        d_(d),
        location_(location),
        L_(run_.gates.size(0)),
        T_(run_.gates.size(1)),
        B_(run_.gates.size(2)),
        G_(run_.gates.size(3)),
        H_(run_.hiddens.size(3)),
        first_hidden_(G_ - layers[0].w_hidden.size(0)),
        sizes_(call.batch_sizes, T_, B_),
        in_turn_(!source),
        outputs_(call.given.outputs) {
    const auto add = [](std::deque<Packed<A>>& to, const Tensor& w) {
      to.emplace_back(transposed(w), Layout::plain(w.size(1)));
    };
    for (const Layer& layer : layers) add(w_hidden_, layer.w_hidden);
    if (in_turn_) return;
    for (int64_t l = 1; l < L_; ++l) add(w_input_, layers[l].w_input);
    w_context_.emplace(transposed(source->w_context), Layout::plain(source->w_context.size(1)));
    w_query_.emplace(transposed(source->w_query), Layout::plain(H_));
    if (call.vector.empty()) return;
    const Tensor& w = call.vector[0];
    const int64_t D = w.size(1) - H_;
    w_vector_.emplace(transposed(columns(w, 0, H_)), Layout::plain(H_),
                      transposed(columns(w, H_, D)), Layout::plain(D));
  }

  void run() {
    if (in_turn_) return run_in_turn();
    if (T_ > 0) copy(at(d_.contexts, T_ - 1), at(call_.given.contexts, T_ - 1));
    if (w_vector_ && T_ > 0) copy(at(d_.vectors, T_ - 1), at(call_.grad_vectors, T_ - 1));
    for (int64_t t = T_ - 1; t >= 0; --t) {
      if (w_vector_) retreat_vector(t);
      if (call_.query_after) attend(t);
      for (int64_t l = L_ - 1; l >= 0; --l) {
        retreat_layer(l, t);
        pass_on(l, t);
      }
      if (!call_.query_after) attend(t);
    }
  }

 private:
  // As forward: all steps of a layer, and then the gradient of all that it read, as one product.
  void run_in_turn() {
    for (int64_t l = L_ - 1; l >= 0 && T_ > 0; --l) {
      for (int64_t t = T_ - 1; t >= 0; --t) {
        retreat_layer(l, t);
        pass_on(l, t);
      }
      if (l > 0) outputs_ = of_inputs(l);
    }
  }
  // The gradient of the hidden states (T, B, H) that layer l read.
  Tensor of_inputs(int64_t l) const {
    const Tensor& w = layers_[l].w_input;
    const Tensor out = empty(d_.gates, {T_, B_, H_});
    const Tensor gates = view(d_.gates, {T_ * B_, w.size(0)}, {G_, 1}, l * T_ * B_ * G_);
    product(view(out, {T_ * B_, H_}, {H_, 1}), gates, w, nullptr, runs_of(sizes_.of_steps, B_));
    if (!call_.dropout) return out;
    const int64_t n = B_ * H_;
    const A* factors = data<A>(*call_.dropout) + (l - 1) * T_ * n;
    A* d = data<A>(out);
    parallel(T_, n / 2, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * n; i < end * n; ++i) d[i] *= factors[i];
    });
    return out;
  }

  A* hidden(int64_t l) const { return data<A>(d_.hidden) + l * B_ * H_; }
  A* gates(int64_t l, int64_t t) const { return data<A>(d_.gates) + (l * T_ + t) * B_ * G_; }

  // From the attentional vector's gradient to that before its activation, and on to the context and
  // the top layer's hidden state.
  void retreat_vector(int64_t t) {
    const int64_t O = d_.vectors.size(2), D = call_.given.contexts.size(2);
    const A* after = data<A>(call_.vectors) + (t + 1) * B_ * O;
    const A* factors = call_.vector_dropout ? data<A>(*call_.vector_dropout) + t * B_ * O : nullptr;
    A* d = data<A>(d_.vectors) + t * B_ * O;
    const int64_t rows = sizes_.at(t);
    clear_rows(d, rows, B_, O);
    parallel(rows, O / 2, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * O; i < end * O; ++i) {
        const A factor = factors ? factors[i] : A(1);
        const A x = factor != 0 ? after[i] / factor : A(0);  // before dropout
        d[i] *= factor;
        if (call_.tanh) d[i] *= 1 - x * x;
      }
    });
    const Tensor& given = call_.given.contexts;
    A *top = hidden(L_ - 1), *contexts = data<A>(d_.contexts) + t * B_ * D;
    const A* of_features =
        call_.features_dropout ? data<A>(*call_.features_dropout) + t * B_ * (H_ + D) : nullptr;
    const int64_t of_output = w_vector_->output.layout.panels();
    over_panels(of_output + w_vector_->context.layout.panels(), rows,
                w_vector_->output.operations(), [&](int64_t p, int64_t b, int64_t n) {
                  const A* from = d + b * O;
                  const A* by = of_features ? of_features + b * (H_ + D) : nullptr;
                  if (p < of_output)
                    return add_product(w_vector_->output, p, from, O, n, by, H_ + D, top + b * H_,
                                       H_, top + b * H_, H_);
                  const A* init = data<A>(given) + t * given.stride(0) + b * given.stride(1);
                  add_product(w_vector_->context, p - of_output, from, O, n, by ? by + H_ : nullptr,
                              H_ + D, init, given.stride(1), contexts + b * D, D);
                });
  }

  // A panel's units of out = init + factors * (a w^T), for n rows. Absent: zeros, and ones.
  static void add_product(const Packed<A>& w, int64_t p, const A* a, int64_t lda, int64_t n,
                          const A* factors, int64_t ld_factors, const A* init, int64_t ld_init,
                          A* out, int64_t ldo) {
    if (!factors) return w.product(p, a, lda, n, init, ld_init, out, ldo);
    const int64_t first = p * w.layout.step, units = w.layout.units(p);
    Buffer<A> tile(n * kPanel);
    std::fill_n(static_cast<A*>(tile), n * kPanel, A(0));
    w.to_tile(p, a, lda, n, nullptr, 0, tile, w.K());
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = first; j < first + units; ++j)
        out[i * ldo + j] = (init ? init[i * ld_init + j] : A(0)) +
                           factors[i * ld_factors + j] * tile[i * kPanel + j - first];
  }

  // From the context's gradient to the query's, and on to the top layer's hidden state.
  void attend(int64_t t) {
    const int64_t rows = sizes_.at(t);
    for (const Tensor& x : {d_.contexts, d_.scores, d_.queries})
      clear_rows(data<A>(x) + t * x.stride(0), rows, B_, x.size(2));
    if (location_ == nullptr) {
      const auto step = [&](const Tensor& x) { return first_rows(at(x, t), rows); };
      source_->attend_backward(step(d_.contexts), step(call_.given.weights), step(run_.queries),
                               step(run_.weights), step(d_.scores), step(d_.queries));
    } else {
      const auto step = [&](const Tensor& x) { return data<A>(x) + t * x.stride(0); };
      location_->attend_backward(rows, step(d_.contexts), step(call_.given.weights),
                                 step(run_.queries), step(call_.location[2]), step(run_.weights),
                                 step(d_.scores), step(d_.queries));
    }
    const int64_t width = source_->v.size(0);
    const A* queries = data<A>(d_.queries) + t * B_ * width;
    A* top = hidden(L_ - 1);
    // Before the step the top layer's gradient is the one of step t - 1.
    over_panels(w_query_->layout.panels(), rows, w_query_->operations(),
                [&](int64_t p, int64_t b, int64_t n) {
                  w_query_->product(p, queries + b * width, width, n, top + b * H_, H_,
                                    top + b * H_, H_);
                });
  }

  void retreat_layer(int64_t l, int64_t t) {
    const int64_t slab = B_ * H_, before = (l * (T_ + 1) + t) * slab;
    const A* from = data<A>(run_.gates) + (l * T_ + t) * B_ * G_;
    const A* h = data<A>(run_.hiddens) + before;
    const A* c = call_.kind == Cell::kLstm ? data<A>(run_.cells) + before : nullptr;
    const A* output =
        in_turn_ || l == L_ - 1 ? data<A>(outputs_) + t * outputs_.stride(0) : nullptr;
    const int64_t ld_output = outputs_.stride(1);
    const A* kept =
        call_.state_dropout ? data<A>(*call_.state_dropout) + (l * T_ + t) * slab : nullptr;
    A *dh = hidden(l), *dg = gates(l, t), *dc = c ? data<A>(d_.cell) + l * slab : nullptr;
    constexpr int64_t kRows = 4;
    const int64_t rows = sizes_.at(t);
    clear_rows(dg, rows, B_, G_);
    parallel_in_turns((rows + kRows - 1) / kRows, kRows * 20 * H_, [&](int64_t task) {
      for (int64_t b = task * kRows; b < std::min(rows, (task + 1) * kRows); ++b) {
        const int64_t row = b * H_;
        for (int64_t i = 0; output && i < H_; ++i) dh[row + i] += output[b * ld_output + i];
        for (int64_t i = row; kept && i < row + H_; ++i) dh[i] *= kept[i];
        retreat_units(call_.kind, from + b * G_, H_, h + row, c ? c + row : nullptr,
                      c ? c + slab + row : nullptr, H_, dh + row, c ? dc + row : nullptr,
                      dg + b * G_);
      }
    });
  }

  // From gates to the hidden state before the step, and to what the layer read beside it.
  void pass_on(int64_t l, int64_t t) {
    const A* dg = gates(l, t);
    A* dh = hidden(l);
    const Packed<A>& w_hidden = w_hidden_[l];
    const Packed<A>* w_x = nullptr;
    A* dx = nullptr;
    const A *init = nullptr, *factors = nullptr;  // dx = init + factors * product
    int64_t width = H_, ld_init = H_;
    if (l > 0 && !in_turn_) {
      w_x = &w_input_[l - 1];
      dx = hidden(l - 1);
      init = dx;
      if (call_.dropout) factors = data<A>(*call_.dropout) + ((l - 1) * T_ + t) * B_ * H_;
    } else if (source_) {
      w_x = &*w_context_;
      const int64_t of = call_.query_after ? t - 1 : t;  // whose context the step read
      const Tensor& given = w_vector_ ? call_.grad_vectors : call_.given.contexts;
      width = given.size(2);
      dx = of < 0 ? data<A>(d_.context)
                  : data<A>(w_vector_ ? d_.vectors : d_.contexts) + of * B_ * width;
      init = of < 0 ? nullptr : data<A>(given) + of * given.stride(0);
      ld_init = given.stride(1);
      if (call_.context_dropout) factors = data<A>(*call_.context_dropout) + t * B_ * width;
      if (call_.query_after) begin_context(of, sizes_.at(t), init, ld_init, dx, width);
    }
    const int64_t hidden_panels = t > 0 || call_.need_state ? w_hidden.layout.panels() : 0;
    const int64_t panels = hidden_panels + (w_x ? w_x->layout.panels() : 0);
    over_panels(panels, sizes_.at(t), w_hidden.operations(), [&](int64_t p, int64_t b, int64_t n) {
      if (p < hidden_panels) {
        // Of a GRU a part has passed the gates by.
        w_hidden.product(p, dg + b * G_ + first_hidden_, G_, n,
                         call_.kind == Cell::kGru ? dh + b * H_ : nullptr, H_, dh + b * H_, H_);
        return;
      }
      p -= hidden_panels;
      add_product(*w_x, p, dg + b * G_, G_, n, factors ? factors + b * width : nullptr, width,
                  init ? init + b * ld_init : nullptr, ld_init, dx + b * width, width);
    });
  }

  // The gradient dx of the context after step t for the rows from n on, which no step reads: what
  // is given, of a step that they have.
  void begin_context(int64_t t, int64_t n, const A* given, int64_t ld, A* dx, int64_t width) const {
    if (t < 0) return clear_rows(dx, n, B_, width);
    for (int64_t b = n; b < sizes_.at(t); ++b) std::copy_n(given + b * ld, width, dx + b * width);
  }

  const DecoderBackwardCall& call_;
  const std::vector<Layer>& layers_;
  const States& run_;
  const std::optional<Source>& source_;
  const Gradients& d_;
  Location<A>* const location_;
  const int64_t L_, T_, B_, G_, H_, first_hidden_;
  const BatchSizes sizes_;
  const bool in_turn_;  // the layers, where nothing is fed back
  Tensor outputs_;  // gradients (T, B, H) of the top layer's outputs, or in turn of each layer's
  std::deque<Packed<A>> w_hidden_, w_input_;  // of all layers, of all but the first
  std::optional<Packed<A>> w_context_, w_query_;
  std::optional<OfVector<A>> w_vector_;
};

std::pair<Gradients, OfLocation> retreat(const DecoderBackwardCall& call) {
  std::optional<Source> source;
  if (!call.attention.empty())
    source.emplace(call.attention, std::nullopt, call.powers, call.location.empty());
  const Gradients d = gradients_of(call);
  ask_for_huge_pages(d.gates.data_ptr(), d.gates.numel() * d.gates.element_size());
  const std::vector<Layer> layers = layers_of(call.layers);
  OfLocation of_location = of_no_location(d.gates);
  const auto go = [&]<typename A>() {
    std::optional<Location<A>> place;
    if (!call.location.empty()) {
      place.emplace(call.location, call.accumulates, source->keys, source->values, source->v,
                    std::nullopt);
      place->begin_backward(call.grad_location, call.detach);
    }
    Backward<A>(call, layers, source, d, place ? &*place : nullptr).run();
    if (place) of_location = place->results();
  };
  if (d.gates.scalar_type() == ScalarType::Double)
    go.template operator()<double>();
  else
    go.template operator()<float>();
  return {d, of_location};
}

}  // namespace
}  // namespace seq2seq_fast::decoder

STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast, CPU, m) {
  using Ops = seq2seq_fast::DecoderBackwardOps<seq2seq_fast::decoder::retreat>;
  m.impl("attention_decoder_backward", TORCH_BOX(&Ops::plain));
  m.impl("extended_decoder_backward", TORCH_BOX(&Ops::extended));
}
