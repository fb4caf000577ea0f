// A recurrent decoder with attention inside its recurrence, over T steps.
//
// Steps that follow each other without one being fed another's argmax are one launch, see
// decoder_loop.cuh, or 2 L + 2 launches each: the query's product, attention, and for each layer
// the product of [x | hidden state] with its weights side by side, then its cell; attentional
// vectors take two more. Everything is allocated before the first step and nothing waits for the
// GPU, so that a CUDA graph can hold it.
#include <torch/csrc/stable/library.h>

#include "../decoder_ops.h"
#include "decoder.h"
#include "decoder_loop.h"
#include "feedback.cuh"
#include "location.h"

namespace seq2seq_fast {
namespace {

class Forward {
 public:
  Forward(const Device& device, const DecoderCall& call, const std::optional<Source>& source,
          const std::optional<Place>& place, const Run& run)
      : device_(device),
        call_(call),
        source_(source),
        place_(place),
        run_(run),
        T_(call.inputs.size(0)),
        B_(call.inputs.size(1)),
        L_(run.hiddens.size(0)),
        H_(run.hiddens.size(3)),
        G_(run.gates.size(3)),
        fed_(empty(call.inputs, {B_, call.feedback.empty() ? 0 : call.inputs.size(2)})),
        together_(place || call.state_dropout || !call.vector.empty() || call.context_dropout
                      ? nullptr
                      : TogetherForward::make(device, call.layers, source, call.dropout, call.kind,
                                              call.query_after, run)) {
    if (place) placed_.emplace(empty(call.inputs, source->keys.sizes()));
    if (has_vectors()) {
      vector_features_.emplace(empty(call.inputs, {B_, call.vector[0].size(1)}));
      vector_product_.emplace(empty(call.inputs, {B_, call.vector[0].size(0)}));
    }
    if (!call.feedback.empty() && !has_vectors())
      features_.emplace(empty(call.inputs, {B_, call.readout[1].size(1)}));
  }

  void run() {
    const int64_t E = call_.inputs.size(2), n_input = call_.layers[0].size(0);
    // The input's part of all gates, where the gates themselves will lie.
    product(view(run_.gates, {T_ * B_, n_input}, {G_, 1}), view(call_.inputs, {T_ * B_, E}, {E, 1}),
            call_.layers[0]);
    int64_t begin = 0;
    for (size_t i = 0; i < call_.feedback.size(); begin = call_.feedback[i++]) {
      steps(begin, call_.feedback[i]);
      feed(call_.feedback[i], i);
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
      if (source_ && !call_.query_after) attend(t, t);
      for (int64_t l = 0; l < L_; ++l) advance(l, t);
      if (source_ && call_.query_after) attend(t, t + 1);
      if (has_vectors()) make_vector(t);
    }
  }

  bool has_vectors() const { return !call_.vector.empty(); }

  // The attentional vector after step t, of what the top layer and attention have left.
  void make_vector(int64_t t) {
    if (call_.features_dropout)
      launch_scale(device_,
                   {float_rows(*vector_features_), float_rows(at(*call_.features_dropout, t)),
                    static_cast<int>(B_), size_of(*vector_features_, 1)});
    product(*vector_product_, *vector_features_, call_.vector[0]);
    VectorArguments a{float_rows(*vector_product_), {floats_of(call_.vector[1]), 0}};
    if (call_.vector_dropout) a.factors = float_rows(at(*call_.vector_dropout, t));
    a.vector = float_rows(at(call_.vectors, t + 1)), a.to_input = float_rows(operands_[0]);
    a.B = static_cast<int>(B_), a.O = size_of(*vector_product_, 1), a.tanh = call_.tanh;
    launch_vector(device_, a);
  }

  // For launches of steps, step t the first one.
  void prepare(int64_t t) {
    product_.emplace(empty(call_.inputs, {B_, G_}));
    for (int64_t l = 0; l < L_; ++l) {
      const Tensor* w_x = l > 0 ? &call_.layers[3 * l] : source_ ? &source_->w_context : nullptr;
      weights_.push_back(side_by_side(w_x, call_.layers[3 * l + 1], G_));
      biases_.push_back(torch::stable::contiguous(call_.layers[3 * l + 2]));
      operands_.push_back(empty(call_.inputs, {B_, weights_.back().size(1)}));
      copy(columns(operands_[l], width(l), H_), at(run_.hiddens, l, t));
    }
    if (source_ && call_.query_after)
      copy(columns(operands_[0], 0, width(0)), at(call_.fed(run_), t));
  }

  int64_t width(int64_t l) const { return weights_[l].size(1) - H_; }

  // The argmax of what step t - 1 made in place of step t's input.
  void feed(int64_t t, size_t i) {
    if (!has_vectors()) {
      const Tensor context = source_ ? at(run_.contexts, t) : *call_.context;
      copy(columns(*features_, 0, H_), at(run_.hiddens, L_ - 1, t));
      copy(columns(*features_, H_, context.size(1)), context);
    }
    const int64_t V = call_.readout[1].size(0), E = call_.inputs.size(2),
                  ld = run_.logits.stride(0);
    const Tensor logits = view(run_.logits, {B_, V}, {ld, 1}, t * V);
    product(logits, has_vectors() ? at(call_.vectors, t) : *features_, call_.readout[1]);
    FeedbackArguments a{floats_of(logits), ld, view_of(call_.readout[2]),
                        view_of(call_.readout[0])};
    if (call_.input_dropout) a.factors = floats_of(at(*call_.input_dropout, t));
    a.tokens = static_cast<int64_t*>(run_.tokens.data_ptr()) + static_cast<int64_t>(i) * B_;
    a.x = floats_of(fed_);
    a.V = static_cast<int>(V), a.E = static_cast<int>(E);
    device_.launch(feed_back, B_, dim3(kFeedbackThreads), 2 * kFeedbackThreads, a);
    product(columns(at(run_.gates, 0, t), 0, call_.layers[0].size(0)), fed_, call_.layers[0]);
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
                        weights, {to_context().data, to_context().ld, false, nullptr, &parts_});
  }

  // Where else a context goes, to be read.
  FloatRows to_context() const {
    return has_vectors() ? float_rows(*vector_features_, H_) : float_rows(operands_[0]);
  }

  // The location before step t, and where it is wanted what step t has for keys.
  void follow(int64_t t, bool wanted) {
    launch_place_keys(device_, *place_, t, call_.locations, run_.weights, source_->keys,
                      wanted ? placed_ : std::nullopt);
  }

  void advance(int64_t l, int64_t t) {
    if (l == 0 && call_.context_dropout)
      launch_scale(device_, {float_rows(operands_[0]), float_rows(at(*call_.context_dropout, t)),
                             static_cast<int>(B_), static_cast<int>(width(0))});
    product(*product_, operands_[l], weights_[l]);
    CellArguments a{float_rows(*product_)};
    const Tensor& bias = biases_[l];
    a.bias = {floats_of(bias), bias.dim() == 1 ? 0 : bias.stride(0)};
    a.gates = float_rows(at(run_.gates, l, t));
    if (l == 0) a.input = a.gates;
    a.hidden_before = float_rows(at(run_.hiddens, l, t));
    a.hidden = float_rows(at(run_.hiddens, l, t + 1));
    if (call_.kind == Cell::kLstm) {
      a.cell_before = float_rows(at(run_.cells, l, t));
      a.cell = float_rows(at(run_.cells, l, t + 1));
    }
    a.to_self = float_rows(operands_[l], width(l));
    if (call_.state_dropout) a.kept = float_rows(at(*call_.state_dropout, l, t));
    if (l + 1 < L_) {
      a.to_next = float_rows(operands_[l + 1]);
      if (call_.dropout) a.factors = float_rows(at(*call_.dropout, l, t));
    } else if (has_vectors()) {
      a.to_next = float_rows(*vector_features_);
    }
    a.B = static_cast<int>(B_), a.H = static_cast<int>(H_);
    launch_advance(device_, call_.kind, a);
  }

  const Device& device_;
  const DecoderCall& call_;
  const std::optional<Source>& source_;
  const std::optional<Place>& place_;
  const Run& run_;
  const int64_t T_, B_, L_, H_, G_;
  std::optional<Tensor> placed_;              // keys (B, S, A) of a step
  std::optional<Tensor> parts_;               // of attention to a source that is split
  const Tensor fed_;                          // (B, E)
  std::optional<Tensor> features_, product_;  // (B, H + D), (B, G)
  std::optional<Tensor> vector_features_,
      vector_product_;  // [output | context], and its product (B, O)
  std::unique_ptr<TogetherForward> together_;
  // Of each layer: (G, width + H), (G,) or (B, G), and [x | hidden state] (B, width + H)
  std::vector<Tensor> weights_, biases_, operands_;
};

Run decode(const DecoderCall& call) {
  STD_TORCH_CHECK(call.inputs.scalar_type() == ScalarType::Float,
                  "expected float32: the decoder has a CUDA kernel for nothing else");
  STD_TORCH_CHECK(call.batch_sizes.empty(), "expected no batch_sizes: kernels read all rows");
  const Device device(call.inputs);
  Run run = run_of(call.inputs, call.hidden, call.cell, call.attention, call.context, call.kind,
                   call.feedback, call.readout);
  std::optional<Source> source;
  if (!call.attention.empty())
    source.emplace(call.attention, call.mask, call.powers, call.location.empty());
  std::optional<Place> place;
  if (!call.location.empty()) place.emplace(device, call.location, call.accumulates, source->keys);
  Forward(device, call, source, place, run).run();
  return run;
}

}  // namespace
}  // namespace seq2seq_fast

S2S_CUDA_LIBRARY(m) {
  using Ops = seq2seq_fast::DecoderOps<seq2seq_fast::decode>;
  m.impl("attention_decoder", TORCH_BOX(&Ops::plain));
  m.impl("extended_decoder", TORCH_BOX(&Ops::extended));
}
