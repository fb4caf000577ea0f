// A recurrent decoder with attention inside its recurrence, over T steps.
//
// Steps that follow each other without one being fed another's argmax are one launch, see
// decoder_loop.cuh, or 2 L + 2 launches each: the query's product, attention, and for each layer
// the product of [x | hidden state] with its weights side by side, then its cell. Everything is
// allocated before the first step and nothing waits for the GPU, so that a CUDA graph can hold it.
#include <torch/csrc/stable/library.h>

#include "decoder.h"
#include "decoder_loop.h"
#include "feedback.cuh"
#include "location.h"

namespace seq2seq_fast {
namespace {

class Forward {
 public:
  Forward(const Device& device, const Tensor& inputs, const std::vector<Tensor>& layers,
          const std::optional<Source>& source, const std::optional<Tensor>& fixed,
          const std::optional<Tensor>& dropout, Cell cell, bool query_after,
          const std::vector<int64_t>& feedback, const std::vector<Tensor>& readout,
          const std::optional<Tensor>& input_dropout, const Run& run,
          const std::optional<Place>& place, const Tensor& locations,
          const std::optional<Tensor>& state_dropout)
      : device_(device),
        inputs_(inputs),
        layers_(layers),
        source_(source),
        fixed_(fixed),
        dropout_(dropout),
        cell_(cell),
        query_after_(query_after),
        feedback_(feedback),
        readout_(readout),
        input_dropout_(input_dropout),
        run_(run),
        place_(place),
        locations_(locations),
        state_dropout_(state_dropout),
        T_(inputs.size(0)),
        B_(inputs.size(1)),
        L_(run.hiddens.size(0)),
        H_(run.hiddens.size(3)),
        G_(run.gates.size(3)),
        fed_(empty(inputs, {B_, feedback.empty() ? 0 : inputs.size(2)})),
        together_(place || state_dropout ? nullptr
                                         : TogetherForward::make(device, layers, source, dropout,
                                                                 cell, query_after, run)) {
    if (place) placed_.emplace(empty(inputs, source->keys.sizes()));
    if (!feedback.empty()) features_.emplace(empty(inputs, {B_, readout[1].size(1)}));
  }

  void run() {
    const int64_t E = inputs_.size(2), n_input = layers_[0].size(0);
    // The input's part of all gates, where the gates themselves will lie.
    product(view(run_.gates, {T_ * B_, n_input}, {G_, 1}), view(inputs_, {T_ * B_, E}, {E, 1}),
            layers_[0]);
    int64_t begin = 0;
    for (size_t i = 0; i < feedback_.size(); begin = feedback_[i++]) {
      steps(begin, feedback_[i]);
      feed(feedback_[i], i);
    }
    steps(begin, T_);
    if (place_ && T_ > 0) follow(T_, false);
  }

 private:
  void steps(int64_t begin, int64_t end) {
    if (together_ && together_->run(begin, end)) return;
    together_.reset();
    if (!product_) prepare(begin);
    for (int64_t t = begin; t < end; ++t) {
      if (source_ && !query_after_) attend(t, t);
      for (int64_t l = 0; l < L_; ++l) advance(l, t);
      if (source_ && query_after_) attend(t, t + 1);
    }
  }

  // For launches of steps, step t the first one.
  void prepare(int64_t t) {
    product_.emplace(empty(inputs_, {B_, G_}));
    for (int64_t l = 0; l < L_; ++l) {
      const Tensor* w_x = l > 0 ? &layers_[3 * l] : source_ ? &source_->w_context : nullptr;
      weights_.push_back(side_by_side(w_x, layers_[3 * l + 1], G_));
      biases_.push_back(torch::stable::contiguous(layers_[3 * l + 2]));
      operands_.push_back(empty(inputs_, {B_, weights_.back().size(1)}));
      copy(columns(operands_[l], width(l), H_), at(run_.hiddens, l, t));
    }
    if (source_ && query_after_) copy(columns(operands_[0], 0, width(0)), at(run_.contexts, t));
  }

  int64_t width(int64_t l) const { return weights_[l].size(1) - H_; }

  // The argmax of what step t - 1 made in place of step t's input.
  void feed(int64_t t, size_t i) {
    const Tensor context = source_ ? at(run_.contexts, t) : *fixed_;
    copy(columns(*features_, 0, H_), at(run_.hiddens, L_ - 1, t));
    copy(columns(*features_, H_, context.size(1)), context);
    const int64_t V = readout_[1].size(0), E = inputs_.size(2), ld = run_.logits.stride(0);
    const Tensor logits = view(run_.logits, {B_, V}, {ld, 1}, t * V);
    product(logits, *features_, readout_[1]);
    FeedbackArguments a{floats_of(logits), ld, view_of(readout_[2]), view_of(readout_[0])};
    if (input_dropout_) a.factors = floats_of(at(*input_dropout_, t));
    a.tokens = static_cast<int64_t*>(run_.tokens.data_ptr()) + static_cast<int64_t>(i) * B_;
    a.x = floats_of(fed_);
    a.V = static_cast<int>(V), a.E = static_cast<int>(E);
    device_.launch(feed_back, B_, dim3(kFeedbackThreads), 2 * kFeedbackThreads, a);
    product(columns(at(run_.gates, 0, t), 0, layers_[0].size(0)), fed_, layers_[0]);
  }

  // Step t's query is the top layer's hidden state `state`.
  void attend(int64_t t, int64_t state) {
    const Source& s = *source_;
    const Tensor query = at(run_.queries, t), weights = at(run_.weights, t);
    linear(query, at(run_.hiddens, L_ - 1, state), s.w_query, s.b_query);
    const Tensor one = view(query, {B_, 1, query.size(1)}, {query.size(1), 0, 1});
    if (place_) follow(t, true);
    one_query_attention(device_, one, place_ ? *placed_ : s.keys, s.values, s.v, s.softmax,
                        place_ ? std::nullopt : std::optional(s.powers), at(run_.contexts, t + 1),
                        weights, {floats_of(operands_[0]), operands_[0].stride(0)});
  }

  // The location before step t, and where it is wanted what step t has for keys.
  void follow(int64_t t, bool wanted) {
    launch_place_keys(device_, *place_, t, locations_, run_.weights, source_->keys,
                      wanted ? placed_ : std::nullopt);
  }

  void advance(int64_t l, int64_t t) {
    product(*product_, operands_[l], weights_[l]);
    CellArguments a{float_rows(*product_)};
    const Tensor& bias = biases_[l];
    a.bias = {floats_of(bias), bias.dim() == 1 ? 0 : bias.stride(0)};
    a.gates = float_rows(at(run_.gates, l, t));
    if (l == 0) a.input = a.gates;
    a.hidden_before = float_rows(at(run_.hiddens, l, t));
    a.hidden = float_rows(at(run_.hiddens, l, t + 1));
    if (cell_ == Cell::kLstm) {
      a.cell_before = float_rows(at(run_.cells, l, t));
      a.cell = float_rows(at(run_.cells, l, t + 1));
    }
    a.to_self = float_rows(operands_[l], width(l));
    if (state_dropout_) a.kept = float_rows(at(*state_dropout_, l, t));
    if (l + 1 < L_) {
      a.to_next = float_rows(operands_[l + 1]);
      if (dropout_) a.factors = float_rows(at(*dropout_, l, t));
    }
    a.B = static_cast<int>(B_), a.H = static_cast<int>(H_);
    launch_advance(device_, cell_, a);
  }

  const Device& device_;
  const Tensor& inputs_;
  const std::vector<Tensor>& layers_;
  const std::optional<Source>& source_;
  const std::optional<Tensor>&fixed_, &dropout_;
  const Cell cell_;
  const bool query_after_;
  const std::vector<int64_t>& feedback_;
  const std::vector<Tensor>& readout_;
  const std::optional<Tensor>& input_dropout_;
  const Run& run_;
  const std::optional<Place>& place_;
  const Tensor& locations_;                     // (T + 1, B, C, S)
  const std::optional<Tensor>& state_dropout_;  // (L, T, B, H)
  const int64_t T_, B_, L_, H_, G_;
  std::optional<Tensor> placed_;              // keys (B, S, A) of a step
  const Tensor fed_;                          // (B, E)
  std::optional<Tensor> features_, product_;  // (B, H + D), (B, G)
  std::unique_ptr<TogetherForward> together_;
  // Of each layer: (G, width + H), (G,) or (B, G), and [x | hidden state] (B, width + H)
  std::vector<Tensor> weights_, biases_, operands_;
};

// Where there is no location, it and `accumulates` are empty; `locations` are what it is before
// each step, in which the first is there already.
Run decode(const Tensor& inputs, const Tensor& hidden, const Tensor& cell,
           const std::vector<Tensor>& layers, const std::vector<Tensor>& attention,
           const std::optional<Tensor>& mask, const std::optional<Tensor>& powers,
           const std::optional<Tensor>& context, const std::optional<Tensor>& dropout,
           const std::string& cell_type, bool query_after, const std::vector<int64_t>& feedback,
           const std::vector<Tensor>& readout, const std::optional<Tensor>& input_dropout,
           const std::vector<Tensor>& location, const std::vector<int64_t>& accumulates,
           const Tensor& locations, const std::optional<Tensor>& state_dropout) {
  STD_TORCH_CHECK(inputs.scalar_type() == ScalarType::Float,
                  "expected float32: the decoder has a CUDA kernel for nothing else");
  const Cell kind = cell_of(cell_type);
  const Device device(inputs);
  Run run = run_of(inputs, hidden, cell, attention, context, kind, feedback, readout);
  std::optional<Source> source;
  if (!attention.empty()) source.emplace(attention, mask, powers, location.empty());
  std::optional<Place> place;
  if (!location.empty()) place.emplace(device, location, accumulates, source->keys);
  Forward(device, inputs, layers, source, context, dropout, kind, query_after, feedback, readout,
          input_dropout, run, place, locations, state_dropout)
      .run();
  return run;
}

auto attention_decoder(Tensor inputs, Tensor hidden, Tensor cell, std::vector<Tensor> layers,
                       std::vector<Tensor> attention, std::optional<Tensor> mask,
                       std::optional<Tensor> powers, std::optional<Tensor> context,
                       std::optional<Tensor> dropout, std::string cell_type, bool query_after,
                       std::vector<int64_t> feedback, std::vector<Tensor> readout,
                       std::optional<Tensor> input_dropout) {
  return decode(inputs, hidden, cell, layers, attention, mask, powers, context, dropout, cell_type,
                query_after, feedback, readout, input_dropout, {}, {}, inputs, std::nullopt)
      .results();
}

auto extended_decoder(Tensor inputs, Tensor hidden, Tensor cell, std::vector<Tensor> layers,
                      std::vector<Tensor> attention, std::optional<Tensor> mask,
                      std::optional<Tensor> powers, std::optional<Tensor> context,
                      std::optional<Tensor> dropout, std::string cell_type, bool query_after,
                      std::vector<int64_t> feedback, std::vector<Tensor> readout,
                      std::optional<Tensor> input_dropout, std::vector<Tensor> location,
                      std::vector<int64_t> accumulates, std::optional<Tensor> state_dropout) {
  const Tensor locations = locations_of(inputs, attention, location);
  return std::tuple_cat(decode(inputs, hidden, cell, layers, attention, mask, powers, context,
                               dropout, cell_type, query_after, feedback, readout, input_dropout,
                               location, accumulates, locations, state_dropout)
                            .results(),
                        std::tuple(locations));
}

}  // namespace
}  // namespace seq2seq_fast

S2S_CUDA_LIBRARY(m) {
  m.impl("attention_decoder", TORCH_BOX(&seq2seq_fast::attention_decoder));
  m.impl("extended_decoder", TORCH_BOX(&seq2seq_fast::extended_decoder));
}
