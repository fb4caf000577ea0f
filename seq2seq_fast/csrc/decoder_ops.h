// The attention decoder's ops as they are called, for any device: a device has a function of what
// they take, in one piece.
#pragma once
#include <array>
#include <string>
#include <utility>

#include "checks.h"
#include "decoder_run.h"

namespace seq2seq_fast {

// See reference_decoder.py.
struct DecoderCall {
  Tensor inputs, hidden, cell;
  std::vector<Tensor> layers, attention;
  std::optional<Tensor> mask, powers, context, dropout;
  Cell kind;
  bool query_after;
  std::vector<int64_t> feedback;
  std::vector<Tensor> readout;
  std::optional<Tensor> input_dropout;
  std::vector<int64_t> batch_sizes;  // see BatchSizes
  // What extended_decoder has beside. location: nothing, or conv, projection and the state before
  // the first step; locations are the states before all steps and behind the last one (T + 1, B, C,
  // S), of which the first is there already.
  std::vector<Tensor> location = {};
  std::vector<int64_t> accumulates = {};
  std::optional<Tensor> state_dropout = std::nullopt;
  Tensor locations = inputs;
  // vector: nothing, or weight and bias; vectors (T + 1, B, O), of which the first is there
  // already.
  std::vector<Tensor> vector = {};
  bool tanh = true;
  std::optional<Tensor> vector_dropout = std::nullopt;
  Tensor vectors = inputs;
  std::optional<Tensor> context_dropout = std::nullopt;   // (T, B, D or O)
  std::optional<Tensor> features_dropout = std::nullopt;  // (T, B, H + D)

  // What the first layer reads of attention, each step's at the step that it is of (T + 1, B, ...)
  const Tensor& fed(const Run& run) const { return vector.empty() ? run.contexts : vectors; }
};

struct DecoderBackwardCall {
  Given given;
  Tensor grad_hidden, grad_cell;
  States run;
  std::vector<Tensor> layers, attention;
  std::optional<Tensor> powers, dropout;
  Cell kind;
  bool query_after, need_state;
  std::vector<int64_t> batch_sizes;
  // location: nothing, or conv, projection and `locations`.
  Tensor grad_location = grad_hidden;
  std::vector<Tensor> location = {};
  std::vector<int64_t> accumulates = {};
  bool detach = false;
  std::optional<Tensor> state_dropout = std::nullopt;
  Tensor grad_vectors = grad_hidden, vectors = grad_hidden;
  std::vector<Tensor> vector = {};
  bool tanh = true;
  std::optional<Tensor> vector_dropout = std::nullopt;
  std::optional<Tensor> context_dropout = std::nullopt, features_dropout = std::nullopt;
};

inline Gradients gradients_of(const DecoderBackwardCall& call) {
  Gradients d = gradients_of(call.given, call.run, call.grad_hidden, call.grad_cell,
                             !call.attention.empty(), call.query_after);
  const Tensor& contexts = call.given.contexts;
  check_factors(call.context_dropout, contexts,
                call.attention.empty() ? 0 : call.attention[0].size(1));
  if (call.vector.empty()) return d;
  const auto like_contexts = [&](const Tensor& x, int64_t more) {
    return x.dim() == 3 && x.size(0) == contexts.size(0) + more && x.size(1) == contexts.size(1) &&
           x.size(2) == call.vector[0].size(0) && x.scalar_type() == contexts.scalar_type();
  };
  STD_TORCH_CHECK(call.vector.size() == 2 && call.attention.size() == 6 && call.query_after &&
                      like_contexts(call.grad_vectors, 0) && like_contexts(call.vectors, 1) &&
                      call.vectors.is_contiguous() &&
                      (call.vector[0].size(0) == 1 || call.grad_vectors.stride(2) == 1) &&
                      call.vector[0].size(1) == call.run.hiddens.size(3) + contexts.size(2) &&
                      call.attention[0].size(1) == call.vector[0].size(0),
                  "expected vectors (T + 1, B, O), their gradient (T, B, O) and weight (O, H + D)");
  check_factors(call.vector_dropout, contexts, call.vector[0].size(0));
  check_factors(call.features_dropout, contexts, call.vector[0].size(1));
  d.vectors = empty(call.grad_vectors, call.grad_vectors.sizes());
  d.context = empty(d.gates, {d.vectors.size(1), d.vectors.size(2)});
  if (d.vectors.size(0) == 0) torch::stable::zero_(d.context);
  return d;
}

// Of an attentional vector
inline bool is_tanh(const std::string& activation) {
  STD_TORCH_CHECK(activation == "tanh" || activation == "none", "expected activation tanh or none");
  return activation == "tanh";
}

// Gradients of keys, v, conv, projection and the state before the first step; empty tensors where
// there is no location.
using OfLocation = std::array<Tensor, 5>;
inline OfLocation of_no_location(const Tensor& like) {
  const auto none = [&] { return empty(like, {0}); };  // one each: outputs may not alias
  return {none(), none(), none(), none(), none()};
}

template <Run (*decode)(const DecoderCall&)>
struct DecoderOps {
  static auto plain(Tensor inputs, Tensor hidden, Tensor cell, std::vector<Tensor> layers,
                    std::vector<Tensor> attention, std::optional<Tensor> mask,
                    std::optional<Tensor> powers, std::optional<Tensor> context,
                    std::optional<Tensor> dropout, std::string cell_type, bool query_after,
                    std::vector<int64_t> feedback, std::vector<Tensor> readout,
                    std::optional<Tensor> input_dropout, std::vector<int64_t> batch_sizes) {
    return decode({inputs, hidden, cell, layers, attention, mask, powers, context, dropout,
                   cell_of(cell_type), query_after, feedback, readout, input_dropout, batch_sizes})
        .results();
  }
  static auto extended(Tensor inputs, Tensor hidden, Tensor cell, std::vector<Tensor> layers,
                       std::vector<Tensor> attention, std::optional<Tensor> mask,
                       std::optional<Tensor> powers, std::optional<Tensor> context,
                       std::optional<Tensor> dropout, std::string cell_type, bool query_after,
                       std::vector<int64_t> feedback, std::vector<Tensor> readout,
                       std::optional<Tensor> input_dropout, std::vector<Tensor> location,
                       std::vector<int64_t> accumulates, std::optional<Tensor> state_dropout,
                       std::vector<Tensor> vector, std::string activation,
                       std::optional<Tensor> vector_dropout, std::optional<Tensor> context_dropout,
                       std::optional<Tensor> features_dropout, std::vector<int64_t> batch_sizes) {
    const Tensor locations = locations_of(inputs, attention, location);
    const Tensor vectors = vectors_of(inputs, hidden, attention, vector, context);
    STD_TORCH_CHECK(vector.empty() || query_after, "expected query_after of attentional vectors");
    check_factors(vector_dropout, inputs, vector.empty() ? 0 : vectors.size(2));
    check_factors(context_dropout, inputs, attention.empty() ? 0 : attention[0].size(1));
    check_factors(features_dropout, inputs, vector.empty() ? 0 : vector[0].size(1));
    if (!vector.empty()) context = std::nullopt;
    const Run run = decode({inputs,
                            hidden,
                            cell,
                            layers,
                            attention,
                            mask,
                            powers,
                            context,
                            dropout,
                            cell_of(cell_type),
                            query_after,
                            feedback,
                            readout,
                            input_dropout,
                            batch_sizes,
                            location,
                            accumulates,
                            state_dropout,
                            locations,
                            vector,
                            is_tanh(activation),
                            vector_dropout,
                            vectors,
                            context_dropout,
                            features_dropout});
    return std::tuple_cat(run.results(), std::tuple(locations, vectors));
  }
};

template <std::pair<Gradients, OfLocation> (*retreat)(const DecoderBackwardCall&)>
struct DecoderBackwardOps {
  static auto plain(Tensor grad_outputs, Tensor grad_contexts, Tensor grad_weights,
                    Tensor grad_hidden, Tensor grad_cell, Tensor hiddens, Tensor cells,
                    Tensor gates, Tensor queries, Tensor weights, std::vector<Tensor> layers,
                    std::vector<Tensor> attention, std::optional<Tensor> powers,
                    std::optional<Tensor> dropout, std::string cell_type, bool query_after,
                    bool need_state, std::vector<int64_t> batch_sizes) {
    return retreat({{grad_outputs, grad_contexts, grad_weights},
                    grad_hidden,
                    grad_cell,
                    {hiddens, cells, gates, queries, weights},
                    layers,
                    attention,
                    powers,
                    dropout,
                    cell_of(cell_type),
                    query_after,
                    need_state,
                    batch_sizes})
        .first.results(need_state);
  }
  static auto extended(Tensor grad_outputs, Tensor grad_contexts, Tensor grad_weights,
                       Tensor grad_hidden, Tensor grad_cell, Tensor hiddens, Tensor cells,
                       Tensor gates, Tensor queries, Tensor weights, std::vector<Tensor> layers,
                       std::vector<Tensor> attention, std::optional<Tensor> powers,
                       std::optional<Tensor> dropout, std::string cell_type, bool query_after,
                       bool need_state, Tensor grad_location, std::vector<Tensor> location,
                       std::vector<int64_t> accumulates, bool detach,
                       std::optional<Tensor> state_dropout, Tensor grad_vectors, Tensor vectors,
                       std::vector<Tensor> vector, std::string activation,
                       std::optional<Tensor> vector_dropout, std::optional<Tensor> context_dropout,
                       std::optional<Tensor> features_dropout, std::vector<int64_t> batch_sizes) {
    const auto [d, of_location] = retreat({{grad_outputs, grad_contexts, grad_weights},
                                           grad_hidden,
                                           grad_cell,
                                           {hiddens, cells, gates, queries, weights},
                                           layers,
                                           attention,
                                           powers,
                                           dropout,
                                           cell_of(cell_type),
                                           query_after,
                                           need_state,
                                           batch_sizes,
                                           grad_location,
                                           location,
                                           accumulates,
                                           detach,
                                           state_dropout,
                                           grad_vectors,
                                           vectors,
                                           vector,
                                           is_tanh(activation),
                                           vector_dropout,
                                           context_dropout,
                                           features_dropout});
    const auto& [dkeys, dv, dconv, dprojection, dstate] = of_location;
    return std::tuple_cat(d.results(need_state),
                          std::tuple(dkeys, dv, dconv, dprojection, dstate, d.vectors));
  }
};

}  // namespace seq2seq_fast
