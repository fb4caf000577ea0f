// What the attention decoder takes and leaves, on any device; see reference_decoder.py. Time comes
// first: a step works on (B, width) rows.
#pragma once
#include <tuple>
#include <vector>

#include "cell.h"
#include "common.h"

namespace seq2seq_fast {

// (B, width) of x (T, B, width) at t, or of x (L, T, B, width) at l, t
inline Tensor at(const Tensor& x, int64_t t) {
  return view(x, {x.size(1), x.size(2)}, {x.stride(1), x.stride(2)}, t * x.stride(0));
}
inline Tensor at(const Tensor& x, int64_t l, int64_t t) {
  return view(x, {x.size(2), x.size(3)}, {x.stride(2), x.stride(3)},
              l * x.stride(0) + t * x.stride(1));
}
inline Tensor columns(const Tensor& x, int64_t first, int64_t count) {
  return view(x, {x.size(0), count}, {x.stride(0), x.stride(1)}, first * x.stride(1));
}

// Of B rows those that each of T steps has, as a PackedSequence has batch_sizes: fewer and fewer,
// so that they are the first ones. Behind its last step a row's state stays, its queries, contexts,
// weights and vectors are 0, and gradients of what it had returned there are taken for 0.
struct BatchSizes {
  std::vector<int64_t> of_steps;  // empty: all rows have all steps
  int64_t B;

  BatchSizes(const std::vector<int64_t>& sizes, int64_t T, int64_t B_) : of_steps(sizes), B(B_) {
    STD_TORCH_CHECK(sizes.empty() || static_cast<int64_t>(sizes.size()) == T,
                    "expected a batch size for each of ", T, " steps");
    for (size_t t = 0; t < sizes.size(); ++t)
      STD_TORCH_CHECK(0 <= sizes[t] && sizes[t] <= (t == 0 ? B : sizes[t - 1]),
                      "expected batch sizes that never grow, of ", B, " at most");
  }
  int64_t at(int64_t t) const { return of_steps.empty() ? B : of_steps[t]; }
  // Those of `count` steps from t on, if not all rows have all
  std::vector<int64_t> of(int64_t t, int64_t count) const {
    if (of_steps.empty()) return {};
    return {of_steps.begin() + t, of_steps.begin() + t + count};
  }
};

// Of a run over T steps, to be filled in but for the states before the first one.
struct Run {
  Tensor hiddens, cells, gates, queries, contexts, weights, tokens, logits;
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> results() const {
    return {hiddens, cells, gates, queries, contexts, weights, tokens, logits};
  }
};

inline Run run_of(const Tensor& inputs, const Tensor& hidden, const Tensor& cell,
                  const std::vector<Tensor>& attention, const std::optional<Tensor>& context,
                  Cell kind, const std::vector<int64_t>& feedback,
                  const std::vector<Tensor>& readout) {
  const int64_t T = inputs.size(0), B = inputs.size(1), L = hidden.size(0), H = hidden.size(2);
  const auto none = [&] { return empty(inputs, {0}); };
  Run run = {empty(inputs, {L, T + 1, B, H}),
             none(),
             empty(inputs, {L, T, B, blocks_of(kind) * H}),
             none(),
             none(),
             none(),
             empty(inputs, {0}, ScalarType::Long),
             none()};
  for (int64_t l = 0; l < L; ++l) copy(at(run.hiddens, l, 0), at(hidden, l));
  if (kind == Cell::kLstm) {
    run.cells = empty(inputs, {L, T + 1, B, H});
    for (int64_t l = 0; l < L; ++l) copy(at(run.cells, l, 0), at(cell, l));
  }
  if (!attention.empty()) {
    const Tensor &keys = attention[3], &values = attention[4], &v = attention[5];
    run.queries = empty(inputs, {T, B, v.size(0)});
    run.weights = empty(inputs, {T, B, keys.size(1)});
    run.contexts = empty(inputs, {T + 1, B, values.size(2)});
    Tensor first = at(run.contexts, 0);
    if (context)
      copy(first, *context);
    else
      torch::stable::zero_(first);
  }
  if (!feedback.empty()) {
    run.tokens = empty(inputs, {static_cast<int64_t>(feedback.size()), B}, ScalarType::Long);
    run.logits = empty(inputs, {B, T + 1, readout[1].size(0)});
  }
  return run;
}

// What a location is before each of T steps and behind the last one (T + 1, B, C, S), to be filled
// in but for the first, which is the last of `location`.
inline Tensor locations_of(const Tensor& inputs, const std::vector<Tensor>& attention,
                           const std::vector<Tensor>& location) {
  if (location.empty()) return empty(inputs, {0});
  STD_TORCH_CHECK(attention.size() == 6 && location.size() == 3,
                  "expected six tensors of attention, and conv, projection and state");
  const Tensor& state = location[2];
  const int64_t B = state.size(0), C = state.size(1), S = state.size(2);
  STD_TORCH_CHECK(B == inputs.size(1) && S == attention[3].size(1) &&
                      state.scalar_type() == inputs.scalar_type(),
                  "expected state (B, C, S) of inputs' dtype");
  const Tensor locations = empty(inputs, {inputs.size(0) + 1, B, C, S});
  copy(view(locations, {B, C, S}, {C * S, S, 1}), state);
  return locations;
}
// Factors of dropout, if any, are (T, B, width).
inline void check_factors(const std::optional<Tensor>& x, const Tensor& inputs, int64_t width) {
  STD_TORCH_CHECK(
      !x || (x->dim() == 3 && x->size(0) == inputs.size(0) && x->size(1) == inputs.size(1) &&
             x->size(2) == width && x->is_contiguous() && x->scalar_type() == inputs.scalar_type()),
      "expected contiguous factors (T, B, width) of inputs' dtype");
}

// Attentional vectors before each of T steps and behind the last one (T + 1, B, O), to be filled in
// but for the first, which is `first` or zeros.
inline Tensor vectors_of(const Tensor& inputs, const Tensor& hidden,
                         const std::vector<Tensor>& attention, const std::vector<Tensor>& vector,
                         const std::optional<Tensor>& first) {
  if (vector.empty()) return empty(inputs, {0});
  STD_TORCH_CHECK(attention.size() == 6 && vector.size() == 2 && vector[0].dim() == 2 &&
                      vector[1].dim() == 1 && vector[1].size(0) == vector[0].size(0) &&
                      vector[0].size(1) == hidden.size(2) + attention[4].size(2) &&
                      attention[0].size(1) == vector[0].size(0) && vector[1].is_contiguous() &&
                      vector[0].scalar_type() == inputs.scalar_type() &&
                      vector[1].scalar_type() == inputs.scalar_type(),
                  "expected six tensors of attention, weight (O, H + D) and bias (O,)");
  const Tensor vectors = empty(inputs, {inputs.size(0) + 1, inputs.size(1), vector[0].size(0)});
  Tensor before = at(vectors, 0);
  if (first)
    copy(before, *first);
  else
    torch::stable::zero_(before);
  return vectors;
}

// (B, C, S), the last of them
inline Tensor last_location(const Tensor& x) {
  return view(x, {x.size(1), x.size(2), x.size(3)}, {x.stride(1), x.stride(2), x.stride(3)},
              (x.size(0) - 1) * x.stride(0));
}

// What backward is given: gradients of the outputs, and what of a run it looks at.
struct Given {
  Tensor outputs, contexts, weights;
};
struct States {
  Tensor hiddens, cells, gates, queries, weights;
};

// To be filled in but for those of the last state, which the loop goes on from.
struct Gradients {
  Tensor gates, queries, scores, contexts, hidden, cell, context, vectors;
  // Those of the state before the first step are empty unless they are needed.
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> results(
      bool need_state) const {
    const Tensor none = empty(gates, {0});
    return {gates,  queries, scores, contexts, need_state ? hidden : none, need_state ? cell : none,
            context};
  }
};

inline Gradients gradients_of(const Given& given, const States& run, const Tensor& grad_hidden,
                              const Tensor& grad_cell, bool attends, bool query_after) {
  const auto like = [](const Tensor& x) { return empty(x, x.sizes()); };
  const int64_t T = run.gates.size(1), B = run.gates.size(2);
  Gradients d = {like(run.gates),
                 like(run.queries),
                 like(run.weights),
                 like(given.contexts),
                 like(grad_hidden),
                 like(grad_cell),
                 attends ? empty(run.gates, {B, given.contexts.size(2)}) : empty(run.gates, {0}),
                 empty(run.gates, {0})};
  copy(d.hidden, grad_hidden);
  copy(d.cell, grad_cell);
  if (!query_after || T == 0) torch::stable::zero_(d.context);
  return d;
}

}  // namespace seq2seq_fast
