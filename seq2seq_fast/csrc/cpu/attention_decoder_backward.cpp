// The recurrence of the attention decoder backward: gradients of gates, queries, scores and
// contexts at each step. Those of weights, keys and values are products over all steps, which are
// left to the caller.
#include <torch/csrc/stable/library.h>

#include <deque>

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
  Backward(const Given& given, const States& run, const std::vector<Layer>& layers,
           const std::optional<Source>& source, const std::optional<Tensor>& dropout, Cell cell,
           bool query_after, bool need_state, const Gradients& d, Location<A>* location,
           const Tensor& locations, const std::optional<Tensor>& state_dropout)
      : given_(given),
        run_(run),
        source_(source),
        dropout_(dropout),
        cell_(cell),
        query_after_(query_after),
        need_state_(need_state),
        d_(d),
        location_(location),
        locations_(locations),
        state_dropout_(state_dropout),
        L_(run.gates.size(0)),
        T_(run.gates.size(1)),
        B_(run.gates.size(2)),
        G_(run.gates.size(3)),
        H_(run.hiddens.size(3)),
        first_hidden_(G_ - layers[0].w_hidden.size(0)),
        dropped_(dropout ? B_ * H_ : 0) {
    const auto add = [](std::deque<Packed<A>>& to, const Tensor& w) {
      to.emplace_back(transposed(w), Layout::plain(w.size(1)));
    };
    for (const Layer& layer : layers) add(w_hidden_, layer.w_hidden);
    for (int64_t l = 1; l < L_; ++l) add(w_input_, layers[l].w_input);
    if (!source) return;
    w_context_.emplace(transposed(source->w_context), Layout::plain(source->w_context.size(1)));
    w_query_.emplace(transposed(source->w_query), Layout::plain(H_));
  }

  void run() {
    if (source_ && T_ > 0) copy(at(d_.contexts, T_ - 1), at(given_.contexts, T_ - 1));
    for (int64_t t = T_ - 1; t >= 0; --t) {
      if (source_ && query_after_) attend(t);
      for (int64_t l = L_ - 1; l >= 0; --l) {
        retreat_layer(l, t);
        pass_on(l, t);
      }
      if (source_ && !query_after_) attend(t);
    }
  }

 private:
  A* hidden(int64_t l) const { return data<A>(d_.hidden) + l * B_ * H_; }
  A* gates(int64_t l, int64_t t) const { return data<A>(d_.gates) + (l * T_ + t) * B_ * G_; }

  // From the context's gradient to the query's, and on to the top layer's hidden state.
  void attend(int64_t t) {
    if (location_ == nullptr) {
      source_->attend_backward(at(d_.contexts, t), at(given_.weights, t), at(run_.queries, t),
                               at(run_.weights, t), at(d_.scores, t), at(d_.queries, t));
    } else {
      const auto step = [&](const Tensor& x) { return data<A>(x) + t * x.stride(0); };
      location_->attend_backward(step(d_.contexts), step(given_.weights), step(run_.queries),
                                 step(locations_), step(run_.weights), step(d_.scores),
                                 step(d_.queries));
    }
    const int64_t width = source_->v.size(0);
    const A* queries = data<A>(d_.queries) + t * B_ * width;
    A* top = hidden(L_ - 1);
    // Before the step the top layer's gradient is the one of step t - 1.
    over_panels(w_query_->layout.panels(), B_, w_query_->operations(),
                [&](int64_t p, int64_t b, int64_t n) {
                  w_query_->product(p, queries + b * width, width, n, top + b * H_, H_,
                                    top + b * H_, H_);
                });
  }

  void retreat_layer(int64_t l, int64_t t) {
    const int64_t slab = B_ * H_, before = (l * (T_ + 1) + t) * slab;
    const A* from = data<A>(run_.gates) + (l * T_ + t) * B_ * G_;
    const A* h = data<A>(run_.hiddens) + before;
    const A* c = cell_ == Cell::kLstm ? data<A>(run_.cells) + before : nullptr;
    const Tensor& outputs = given_.outputs;
    const A* output = l == L_ - 1 ? data<A>(outputs) + t * outputs.stride(0) : nullptr;
    const int64_t ld_output = outputs.stride(1);
    const A* kept = state_dropout_ ? data<A>(*state_dropout_) + (l * T_ + t) * slab : nullptr;
    A *dh = hidden(l), *dg = gates(l, t), *dc = c ? data<A>(d_.cell) + l * slab : nullptr;
    constexpr int64_t kRows = 4;
    parallel_in_turns((B_ + kRows - 1) / kRows, kRows * 20 * H_, [&](int64_t task) {
      for (int64_t b = task * kRows; b < std::min(B_, (task + 1) * kRows); ++b) {
        const int64_t row = b * H_;
        for (int64_t i = 0; output && i < H_; ++i) dh[row + i] += output[b * ld_output + i];
        for (int64_t i = row; kept && i < row + H_; ++i) dh[i] *= kept[i];
        retreat_units(cell_, from + b * G_, H_, h + row, c ? c + row : nullptr,
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
    const Packed<A>* w_x = l > 0 ? &w_input_[l - 1] : source_ ? &*w_context_ : nullptr;
    A* dx = nullptr;
    const A *init = nullptr, *factors = nullptr;  // dx = init + factors * product
    int64_t width = H_, ld_init = H_;
    if (l > 0) {
      dx = hidden(l - 1);
      init = dx;
      if (dropout_) factors = data<A>(*dropout_) + ((l - 1) * T_ + t) * B_ * H_;
    } else if (source_) {
      const int64_t of = query_after_ ? t - 1 : t;  // whose context the step read
      width = given_.contexts.size(2);
      dx = of < 0 ? data<A>(d_.context) : data<A>(d_.contexts) + of * B_ * width;
      init = of < 0 ? nullptr : data<A>(given_.contexts) + of * given_.contexts.stride(0);
      ld_init = given_.contexts.stride(1);
    }
    const int64_t hidden_panels = t > 0 || need_state_ ? w_hidden.layout.panels() : 0;
    const int64_t panels = hidden_panels + (w_x ? w_x->layout.panels() : 0);
    over_panels(panels, B_, w_hidden.operations(), [&](int64_t p, int64_t b, int64_t n) {
      if (p < hidden_panels) {
        // Of a GRU a part has passed the gates by.
        w_hidden.product(p, dg + b * G_ + first_hidden_, G_, n,
                         cell_ == Cell::kGru ? dh + b * H_ : nullptr, H_, dh + b * H_, H_);
        return;
      }
      p -= hidden_panels;
      const A* from = dg + b * G_;
      if (!factors) {
        w_x->product(p, from, G_, n, init ? init + b * ld_init : nullptr, ld_init, dx + b * width,
                     width);
        return;
      }
      w_x->product(p, from, G_, n, nullptr, 0, dropped_ + b * width, width);
      const int64_t column = p * w_x->layout.step, units = w_x->layout.units(p);
      for (int64_t i = b; i < b + n; ++i)
        for (int64_t j = i * width + column; j < i * width + column + units; ++j)
          dx[j] += dropped_[j] * factors[j];
    });
  }

  const Given& given_;
  const States& run_;
  const std::optional<Source>& source_;
  const std::optional<Tensor>& dropout_;
  const Cell cell_;
  const bool query_after_, need_state_;
  const Gradients& d_;
  Location<A>* const location_;
  const Tensor& locations_;                     // (T + 1, B, C, S)
  const std::optional<Tensor>& state_dropout_;  // (L, T, B, H)
  const int64_t L_, T_, B_, G_, H_, first_hidden_;
  Buffer<A> dropped_;
  std::deque<Packed<A>> w_hidden_, w_input_;  // of all layers, of all but the first
  std::optional<Packed<A>> w_context_, w_query_;
};

// What a location gives beside: gradients of keys, v, conv, projection and the state before the
// first step.
using OfLocation = std::array<Tensor, 5>;

// Where there is no location, what is of it is empty.
std::pair<Gradients, OfLocation> retreat(
    const Given& given, const Tensor& grad_hidden, const Tensor& grad_cell, const States& run,
    const std::vector<Tensor>& layers, const std::vector<Tensor>& attention,
    const std::optional<Tensor>& powers, const std::optional<Tensor>& dropout,
    const std::string& cell_type, bool query_after, bool need_state,
    const std::vector<Tensor>& location, const std::vector<int64_t>& accumulates,
    const Tensor& grad_location, bool detach, const std::optional<Tensor>& state_dropout) {
  std::optional<Source> source;
  if (!attention.empty()) source.emplace(attention, std::nullopt, powers, location.empty());
  const Gradients d =
      gradients_of(given, run, grad_hidden, grad_cell, source.has_value(), query_after);
  ask_for_huge_pages(d.gates.data_ptr(), d.gates.numel() * d.gates.element_size());
  const std::vector<Layer> all = layers_of(layers);
  const auto none = [&] { return empty(run.gates, {0}); };
  OfLocation of_location = {none(), none(), none(), none(), none()};
  const auto go = [&]<typename A>() {
    std::optional<Location<A>> place;
    if (!location.empty()) {
      place.emplace(location, accumulates, source->keys, source->values, source->v, std::nullopt);
      place->begin_backward(grad_location, detach);
    }
    Backward<A>(given, run, all, source, dropout, cell_of(cell_type), query_after, need_state, d,
                place ? &*place : nullptr, place ? location[2] : run.weights, state_dropout)
        .run();
    if (place) of_location = place->results();
  };
  if (run.gates.scalar_type() == ScalarType::Double)
    go.template operator()<double>();
  else
    go.template operator()<float>();
  return {d, of_location};
}

auto attention_decoder_backward(Tensor grad_outputs, Tensor grad_contexts, Tensor grad_weights,
                                Tensor grad_hidden, Tensor grad_cell, Tensor hiddens, Tensor cells,
                                Tensor gates, Tensor queries, Tensor weights,
                                std::vector<Tensor> layers, std::vector<Tensor> attention,
                                std::optional<Tensor> powers, std::optional<Tensor> dropout,
                                std::string cell_type, bool query_after, bool need_state) {
  return retreat({grad_outputs, grad_contexts, grad_weights}, grad_hidden, grad_cell,
                 {hiddens, cells, gates, queries, weights}, layers, attention, powers, dropout,
                 cell_type, query_after, need_state, {}, {}, grad_hidden, false, std::nullopt)
      .first.results(need_state);
}

auto extended_decoder_backward(Tensor grad_outputs, Tensor grad_contexts, Tensor grad_weights,
                               Tensor grad_hidden, Tensor grad_cell, Tensor hiddens, Tensor cells,
                               Tensor gates, Tensor queries, Tensor weights,
                               std::vector<Tensor> layers, std::vector<Tensor> attention,
                               std::optional<Tensor> powers, std::optional<Tensor> dropout,
                               std::string cell_type, bool query_after, bool need_state,
                               Tensor grad_location, std::vector<Tensor> location,
                               std::vector<int64_t> accumulates, bool detach,
                               std::optional<Tensor> state_dropout) {
  const auto [d, of_location] = retreat(
      {grad_outputs, grad_contexts, grad_weights}, grad_hidden, grad_cell,
      {hiddens, cells, gates, queries, weights}, layers, attention, powers, dropout, cell_type,
      query_after, need_state, location, accumulates, grad_location, detach, state_dropout);
  const auto& [dkeys, dv, dconv, dprojection, dstate] = of_location;
  return std::tuple_cat(d.results(need_state), std::tuple(dkeys, dv, dconv, dprojection, dstate));
}

}  // namespace
}  // namespace seq2seq_fast::decoder

STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast, CPU, m) {
  m.impl("attention_decoder_backward",
         TORCH_BOX(&seq2seq_fast::decoder::attention_decoder_backward));
  m.impl("extended_decoder_backward", TORCH_BOX(&seq2seq_fast::decoder::extended_decoder_backward));
}
