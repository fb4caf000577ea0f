// A recurrent decoder with attention inside its recurrence, over T steps.
//
// In the loop: the query, attention, and for each layer one pass that makes all gates of a few
// units, and their states, from packed weights. The products of the inputs of whole runs of steps
// come before it; where nothing is fed back, those of every layer, which then take turns. Gates and
// weights are laid out as in cells.h and reference_decoder.py.
#include <torch/csrc/stable/library.h>

#include <deque>

#include "../decoder_ops.h"
#include "cells.h"
#include "decoder.h"
#include "location.h"

namespace seq2seq_fast::decoder {
namespace {

void advance_rows(Cell cell, const CellRows<double>& x) {
  with_cell(cell, [&]<Cell kCell>() {
    for (int64_t i = 0; i < x.rows * x.units; ++i) {
      const int64_t row = i / x.units, h = i % x.units, at = row * x.ld + h;
      const double* raw = x.raw + row * x.ld_raw + h;
      double* gates = x.gates + row * x.ld_gates + h;
      Unit<double> u;
      for (int j = 0; j < blocks_of(kCell); ++j) u.gates[j] = raw[j * kBlock];
      if constexpr (kCell == Cell::kLstm) u.cell_before = x.cell_before[at];
      if constexpr (kCell == Cell::kGru) u.hidden_before = x.hidden_before[at];
      advance<kCell>(u);
      for (int j = 0; j < blocks_of(kCell); ++j) gates[j * x.H] = u.gates[j];
      if constexpr (kCell == Cell::kLstm) x.memory[at] = u.cell;
      x.hidden[at] = u.hidden;
    }
  });
}
void advance_rows(Cell cell, const CellRows<float>& x) { loops.advance(cell, x); }

// Steps that are fed the argmax of the one before.
template <typename A>
struct Feedback {
  std::vector<int64_t> steps;
  std::vector<Tensor> readout;  // embedding (V, E), weight (V, H + D) or (V, O), bias (V,)
  std::optional<Tensor> dropout;
  Tensor tokens, logits;  // (F, B), (B, T + 1, V)

  bool is(size_t i, int64_t t) const { return i < steps.size() && steps[i] == t; }

  // Writes logits[:, steps[i]] and tokens[i], and what they embed to (B, E).
  // Of n rows: of the others they are zeros, and token 0.
  void read(size_t i, const std::vector<Tensor>& features, int64_t n, const Tensor& out) const {
    const auto& [embedding, weight, bias] = std::tie(readout[0], readout[1], readout[2]);
    const int64_t t = steps[i], B = out.size(0), E = embedding.size(1);
    const int64_t V = weight.size(0), ld = logits.stride(0);
    const Tensor rows = view(logits, {n, V}, {ld, 1}, t * V);
    int64_t column = 0;
    for (const Tensor& x : features) {
      product(rows, first_rows(x, n), transposed(columns(weight, column, x.size(1))),
              column ? &rows : &bias);
      column += x.size(1);
    }
    int64_t* ids = data<int64_t>(tokens) + static_cast<int64_t>(i) * B;
    clear_rows(ids, n, B, 1);
    clear_rows(data<A>(out), n, B, E);
    for (int64_t b = n; b < B; ++b) std::fill_n(data<A>(logits) + b * ld + t * V, V, A(0));
    const Rows<A> table(embedding);
    const A* factors = dropout ? data<A>(*dropout) + t * B * E : nullptr;
    parallel(n, V + E, [&](int64_t begin, int64_t end) {
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

template <typename A>
class Forward {
 public:
  Forward(const DecoderCall& call, const std::vector<Layer>& layers,
          const std::optional<Source>& source, const Feedback<A>& feedback, const Run& run,
          const Location<A>* location)
      : call_(call),
        layers_(layers),
        source_(source),
        feedback_(feedback),
        run_(run),
        location_(location),
        T_(call.inputs.size(0)),
        B_(call.inputs.size(1)),
        L_(run.hiddens.size(0)),
        H_(run.hiddens.size(3)),
        G_(run.gates.size(3)),
        sizes_(call.batch_sizes, T_, B_),
        in_turn_(!source && feedback.steps.empty()),
        dropped_(empty(call.inputs, {call.dropout ? (in_turn_ ? T_ : L_ - 1) : 0, B_, H_})),
        dropped_fed_(call.context_dropout ? B_ * call.fed(run).size(2) : 0),
        dropped_features_(call.features_dropout ? B_ * call.features_dropout->size(2) : 0) {
    const Cell cell = call.kind;
    const Layout layout = Layout::of(cell, H_);
    const bool few = in_place(T_, B_);
    for (const Layer& layer : layers)
      w_hidden_.emplace_back(layer.w_hidden, layout, Blocks::of_hidden(cell), few);
    for (int64_t l = 1; l < L_ && !in_turn_; ++l)
      w_input_.emplace_back(layers[l].w_input, layout, Blocks::of_input(cell), few);
    if (!source) return;
    w_context_.emplace(source->w_context, layout, Blocks::of_input(cell), few);
    w_query_.emplace(source->w_query, Layout::plain(source->w_query.size(0)), Blocks{}, few);
    if (call.vector.empty()) return;
    const Tensor& w = call.vector[0];
    const Layout plain = Layout::plain(w.size(0));
    w_vector_.emplace(columns(w, 0, H_), plain, columns(w, H_, w.size(1) - H_), plain, few);
  }

  void run() {
    if (in_turn_) return run_in_turn();
    from_inputs(0, 0);
    size_t next = 0;
    const Tensor fed_back =
        empty(call_.inputs, {B_, feedback_.steps.empty() ? 0 : call_.inputs.size(2)});
    for (int64_t t = 0; t < T_; ++t) {
      if (feedback_.is(next, t)) {
        feedback_.read(next, features(t), sizes_.at(std::max<int64_t>(t, 1) - 1), fed_back);
        begin_gates(0, t, 1, fed_back);
        from_inputs(t + 1, ++next);
      }
      if (source_ && !call_.query_after) attend(t, t);
      for (int64_t l = 0; l < L_; ++l) advance_layer(l, t);
      if (source_ && call_.query_after) attend(t, t + 1);
      if (w_vector_) make_vector(t);
    }
  }

 private:
  // Layer after layer, all steps of one before the next: what a layer reads is one product, and its
  // own weights have the cache to themselves.
  void run_in_turn() {
    Tensor x = rows_of(call_.inputs);
    for (int64_t l = 0; l < L_ && T_ > 0; ++l) {
      begin_gates(l, 0, T_, x);
      for (int64_t t = 0; t < T_; ++t) advance_layer(l, t);
      const Tensor after = view(run_.hiddens, {T_ * B_, H_}, {H_, 1}, (l * (T_ + 1) + 1) * B_ * H_);
      x = call_.dropout ? rows_of(dropped_) : after;
    }
  }
  // (T, B, N) to (T B, N)
  static Tensor rows_of(const Tensor& x) {
    return view(x, {x.size(0) * x.size(1), x.size(2)}, {x.size(2), 1});
  }

  // What the readout reads before step t.
  std::vector<Tensor> features(int64_t t) const {
    if (w_vector_) return {at(call_.vectors, t)};
    return {at(run_.hiddens, L_ - 1, t), source_ ? at(run_.contexts, t) : *call_.context};
  }

  // The attentional vector after step t: that of tanh is a cell that has no state.
  void make_vector(int64_t t) {
    const int64_t O = call_.vectors.size(2), D = run_.contexts.size(2);
    const A* top = data<A>(run_.hiddens) + ((L_ - 1) * (T_ + 1) + t + 1) * B_ * H_;
    const A* contexts = data<A>(run_.contexts) + (t + 1) * B_ * D;
    const A* factors = call_.vector_dropout ? data<A>(*call_.vector_dropout) + t * B_ * O : nullptr;
    A* out = data<A>(call_.vectors) + (t + 1) * B_ * O;
    const int64_t rows = sizes_.at(t);
    clear_rows(out, rows, B_, O);
    if (call_.features_dropout) {
      A *dropped_top = dropped_features_, *dropped_contexts = dropped_top + B_ * H_;
      const A* by = data<A>(*call_.features_dropout) + t * B_ * (H_ + D);
      for (int64_t b = 0; b < rows; ++b, by += H_ + D) {
        for (int64_t h = 0; h < H_; ++h) dropped_top[b * H_ + h] = top[b * H_ + h] * by[h];
        for (int64_t d = 0; d < D; ++d)
          dropped_contexts[b * D + d] = contexts[b * D + d] * by[H_ + d];
      }
      top = dropped_top, contexts = dropped_contexts;
    }
    const Packed<A>&of_output = w_vector_->output, &of_context = w_vector_->context;
    const int64_t work = of_output.operations() + of_context.operations();
    over_panels(of_output.layout.panels(), rows, work, [&](int64_t p, int64_t b, int64_t n) {
      Buffer<A> tile(n * kPanel);
      of_output.to_tile(p, top + b * H_, H_, n, data<A>(call_.vector[1]), 0, tile, H_);
      of_context.to_tile(p, contexts + b * D, D, n, nullptr, 0, tile, D);
      const int64_t first = b * O + p * kPanel, units = of_output.layout.units(p);
      if (call_.tanh)
        advance_rows(Cell::kRnn, CellRows<A>{n, units, tile, kPanel, out + first, O, O, nullptr,
                                             nullptr, out + first, nullptr, O});
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = first + i * O;
        if (!call_.tanh) std::copy_n(tile + i * kPanel, units, out + at);
        for (int64_t j = at; factors && j < at + units; ++j) out[j] *= factors[j];
      }
    });
  }

  // Layer l's gates of `steps` from t on: the bias, and what comes of their inputs.
  void begin_gates(int64_t l, int64_t t, int64_t steps, const Tensor& x) {
    const Tensor w = transposed(layers_[l].w_input), &bias = layers_[l].bias;
    const int64_t rows = steps * B_, first = (l * T_ + t) * B_ * G_, n = w.size(1);
    const Tensor gates = view(run_.gates, {rows, n}, {G_, 1}, first);
    const RowRuns there = runs_of(sizes_.of(t, steps), B_);
    const bool made = w.size(0) == 0 && x.size(1) == n;  // what the layer makes of its inputs
    STD_TORCH_CHECK(made || x.size(1) == w.size(0), "expected inputs as wide as weights, or gates");
    if (made) {
      add_bias(x, bias, l, t, steps);
    } else if (bias.dim() == 1) {
      const Tensor of_input = view(bias, {n}, {1});
      product(gates, x, w, &of_input, there);
      if (n < G_)  // a GRU's gate that does not read the input
        copy(view(run_.gates, {rows, G_ - n}, {G_, 1}, first + n),
             view(bias, {rows, G_ - n}, {0, 1}, n));
    } else {
      for (int64_t i = t; i < t + steps; ++i) fill(at(run_.gates, l, i), bias);
      product(gates, x, w, &gates, there);
    }
  }

  // The same, given what comes of their inputs, x (rows, n).
  void add_bias(const Tensor& x, const Tensor& bias, int64_t l, int64_t t, int64_t steps) const {
    const int64_t n = x.size(1), ld = x.stride(0), ld_bias = bias.dim() == 1 ? 0 : bias.stride(0);
    const A *from = data<A>(x), *biases = data<A>(bias);
    A* to = data<A>(run_.gates) + (l * T_ + t) * B_ * G_;
    parallel(steps * B_, G_ / 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const A *row = from + i * ld, *b = biases + i % B_ * ld_bias;
        for (int64_t j = 0; j < n; ++j) to[i * G_ + j] = b[j] + row[j];
        std::copy(b + n, b + G_, to + i * G_ + n);  // of a GRU's gate that does not read the input
      }
    });
  }

  // Those of the steps [t, the next one fed back), as one product.
  void from_inputs(int64_t t, size_t next) {
    const int64_t end = next < feedback_.steps.size() ? feedback_.steps[next] : T_;
    const int64_t E = call_.inputs.size(2);
    if (t < end)
      begin_gates(0, t, end - t, view(call_.inputs, {(end - t) * B_, E}, {E, 1}, t * B_ * E));
  }

  // Step t's query is the top layer's hidden state `state`.
  void attend(int64_t t, int64_t state) {
    const int64_t A_ = source_->v.size(0);
    const A* top = data<A>(run_.hiddens) + ((L_ - 1) * (T_ + 1) + state) * B_ * H_;
    A* queries = data<A>(run_.queries) + t * B_ * A_;
    const int64_t rows = sizes_.at(t);
    over_panels(w_query_->layout.panels(), rows, w_query_->operations(),
                [&](int64_t p, int64_t b, int64_t n) {
                  w_query_->product(p, top + b * H_, H_, n, data<A>(source_->b_query), 0,
                                    queries + b * A_, A_);
                });
    const Tensor contexts = at(run_.contexts, t + 1), weights = at(run_.weights, t);
    clear_rows(queries, rows, B_, A_);
    clear_rows(data<A>(contexts), rows, B_, contexts.size(1));
    clear_rows(data<A>(weights), rows, B_, weights.size(1));
    if (location_ == nullptr)
      return source_->attend(first_rows(at(run_.queries, t), rows), first_rows(contexts, rows),
                             first_rows(weights, rows));
    const int64_t numbers = location_->state_numbers();
    A* place = data<A>(call_.locations) + t * B_ * numbers;  // of rows that are over it stays
    std::copy(place + rows * numbers, place + B_ * numbers, place + (B_ + rows) * numbers);
    std::vector<typename Location<A>::Row> places;
    for (int64_t b = 0; b < rows; ++b) {
      const auto row = [b](const Tensor& x, int64_t i) {
        return data<A>(x) + i * x.stride(0) + b * x.stride(1);
      };
      places.push_back({b, row(run_.queries, t), row(call_.locations, t), row(run_.contexts, t + 1),
                        row(run_.weights, t), row(call_.locations, t + 1)});
    }
    location_->attend(places);
  }

  void advance_layer(int64_t l, int64_t t) {
    const bool has_cell = call_.kind == Cell::kLstm;
    const int64_t slab = B_ * H_, rows = sizes_.at(t);
    A* gates = data<A>(run_.gates) + (l * T_ + t) * B_ * G_;
    A* before = data<A>(run_.hiddens) + (l * (T_ + 1) + t) * slab;
    A* after = data<A>(run_.hiddens) + (l * (T_ + 1) + t + 1) * slab;
    A* memory = has_cell ? data<A>(run_.cells) + (l * (T_ + 1) + t) * slab : nullptr;
    const A* factors =
        call_.dropout && l + 1 < L_ ? data<A>(*call_.dropout) + (l * T_ + t) * slab : nullptr;
    const A* kept =
        call_.state_dropout ? data<A>(*call_.state_dropout) + (l * T_ + t) * slab : nullptr;
    A* dropped = factors ? data<A>(dropped_) + (in_turn_ ? t : l) * slab : nullptr;
    // What the layer reads beside its own state, by w_x, and what that is added to.
    const Packed<A>* w_x = nullptr;
    const A *x = nullptr, *bias = nullptr;  // gates that have been begun have theirs
    int64_t width = H_;
    if (l > 0 && !in_turn_) {
      w_x = &w_input_[l - 1];
      bias = data<A>(layers_[l].bias);
      x = call_.dropout ? data<A>(dropped_) + (l - 1) * slab
                        : data<A>(run_.hiddens) + ((l - 1) * (T_ + 1) + t + 1) * slab;
    } else if (source_) {
      w_x = &*w_context_;
      const Tensor& fed = call_.fed(run_);
      width = fed.size(2);
      x = data<A>(fed) + (call_.query_after ? t : t + 1) * B_ * width;
      if (call_.context_dropout) {
        const A* by = data<A>(*call_.context_dropout) + t * B_ * width;
        for (int64_t i = 0; i < rows * width; ++i) dropped_fed_[i] = x[i] * by[i];
        x = dropped_fed_;
      }
    }
    const Packed<A>& w_hidden = w_hidden_[l];
    // An encoder begins with zeros, whose product is a tenth of its work in ten steps.
    const bool from_zeros =
        t == 0 && std::all_of(before, before + slab, [](A h) { return h == 0; });
    const Layout& layout = w_hidden.layout;
    for (A* state : {before, memory})  // of rows that are over
      if (state) std::copy(state + rows * H_, state + slab, state + slab + rows * H_);
    over_panels(
        layout.panels(), rows, 2 * w_hidden.operations(), [&](int64_t p, int64_t b, int64_t n) {
          Buffer<A> tile(n *
                         kPanel);  // rows of gates lie where one drives the other out of the cache
          const A* init = bias ? bias : gates + b * G_;
          const int64_t ld_init = bias ? 0 : G_;
          if (w_x) w_x->to_tile(p, x + b * width, width, n, init, ld_init, tile, width);
          w_hidden.to_tile(p, before + b * H_, H_, n, w_x ? nullptr : init, ld_init, tile,
                           from_zeros ? 0 : H_);
          const int64_t h = p * layout.step, units = layout.units(p), first = b * H_ + h;
          advance_rows(call_.kind,
                       CellRows<A>{n, units, tile, kPanel, gates + b * G_ + h, G_, H_,
                                   before + first, memory ? memory + first : nullptr, after + first,
                                   memory ? memory + slab + first : nullptr, H_});
          if (!kept && !factors) return;
          for (int64_t to = first; to < first + n * H_; to += H_) {
            for (int64_t j = to; kept && j < to + units; ++j) after[j] *= kept[j];
            for (int64_t j = to; factors && j < to + units; ++j) dropped[j] = after[j] * factors[j];
          }
        });
  }

  const DecoderCall& call_;
  const std::vector<Layer>& layers_;
  const std::optional<Source>& source_;
  const Feedback<A>& feedback_;
  const Run& run_;
  const Location<A>* const location_;
  const int64_t T_, B_, L_, H_, G_;
  const BatchSizes sizes_;
  const bool in_turn_;
  const Tensor dropped_;  // what the next layer reads: of each layer, or in turn of each step
  Buffer<A> dropped_fed_, dropped_features_;
  std::deque<Packed<A>> w_hidden_, w_input_;  // of all layers, of all but the first
  std::optional<Packed<A>> w_context_, w_query_;
  std::optional<OfVector<A>> w_vector_;
};

Run decode(const DecoderCall& call) {
  keep_freed_memory();
  Run run = run_of(call.inputs, call.hidden, call.cell, call.attention, call.context, call.kind,
                   call.feedback, call.readout);
  for (const Tensor& x : {run.hiddens, run.cells, run.gates})
    ask_for_huge_pages(x.data_ptr(), x.numel() * x.element_size());
  std::optional<Source> source;
  if (!call.attention.empty())
    source.emplace(call.attention, call.mask, call.powers, call.location.empty());
  const std::vector<Layer> weights = layers_of(call.layers);
  std::vector<Tensor> readout = call.readout;
  if (!readout.empty()) readout[2] = torch::stable::contiguous(readout[2]);
  const auto go = [&]<typename A>() {
    const Feedback<A> steps = {call.feedback, readout, call.input_dropout, run.tokens, run.logits};
    std::optional<Location<A>> place;
    if (!call.location.empty())
      place.emplace(call.location, call.accumulates, source->keys, source->values, source->v,
                    call.mask);
    Forward<A>(call, weights, source, steps, run, place ? &*place : nullptr).run();
  };
  if (call.inputs.scalar_type() == ScalarType::Double)
    go.template operator()<double>();
  else
    go.template operator()<float>();
  return run;
}

}  // namespace
}  // namespace seq2seq_fast::decoder

STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast, CPU, m) {
  using Ops = seq2seq_fast::DecoderOps<seq2seq_fast::decoder::decode>;
  m.impl("attention_decoder", TORCH_BOX(&Ops::plain));
  m.impl("extended_decoder", TORCH_BOX(&Ops::extended));
}
