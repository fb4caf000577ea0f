// The recurrence of the attention decoder backward. It is one launch, see
// decoder_backward_loop.cuh, or for each step of L layers 2 L + 2 of them: for each layer its cell
// and the product of the gates' gradient with [w_input | w_hidden], whose parts the next kernels
// add up; attention, which is two where blocks share rows, three with a location; and the query's
// product. Gradients of weights, keys and values are products
// over all steps, which are left to the caller.
#include <torch/csrc/stable/library.h>

#include "../decoder_ops.h"
#include "decoder.h"
#include "decoder_backward_loop.cuh"
#include "decoder_loop.h"
#include "location.h"
#include "team.h"

namespace seq2seq_fast {

// Grid: so many blocks as a row has parts in this stage, for each row.
static __global__ void __launch_bounds__(kQueryBackwardThreads, 1)
    one_query_backward(OneQueryBackwardArguments a, Stage stage, int parts) {
  const int b = blockIdx.x / parts;
  retreat_one_query<kQueryBackwardWarps>(a, stage, b, b, blockIdx.x % parts, shared_memory());
}

namespace {

class Backward {
 public:
  Backward(const Device& device, const DecoderBackwardCall& call,
           const std::optional<Source>& source, const Gradients& d, PlaceBackward* place)
      : device_(device),
        call_(call),
        run_(call.run),
        source_(source),
        d_(d),
        place_(place),
        L_(run_.gates.size(0)),
        T_(run_.gates.size(1)),
        B_(run_.gates.size(2)),
        H_(run_.hiddens.size(3)),
        of_query_(empty(run_.gates, {B_, H_})) {
    for (int64_t l = 0; l < L_; ++l) {
      const Tensor* w_x = l > 0 ? &call.layers[3 * l] : source ? &source->w_context : nullptr;
      weights_.push_back(side_by_side(w_x, call.layers[3 * l + 1], run_.gates.size(3)));
      products_.push_back(empty(run_.gates, {B_, weights_[l].size(1)}));
    }
    if (has_vectors()) grad_features_.emplace(empty(run_.gates, {B_, call.vector[0].size(1)}));
  }

  void run() {
    if (T_ == 0) return;
    if (!run_together()) run_steps();
    for (int64_t l = 0; l < L_ && call_.need_state; ++l) {
      const Tensor to = hidden(l);
      SumArguments a{later(l, 0), float_rows(to)};
      if (source_ && !call_.query_after && l == L_ - 1) a.grad.query = float_rows(of_query_);
      a.B = static_cast<int>(B_), a.H = static_cast<int>(H_);
      launch_sum(device_, a);
    }
    if (source_ && call_.query_after) copy(d_.context, columns(products_[0], 0, width(0)));
  }

 private:
  void run_steps() {
    if (source_) check_source();
    for (int64_t t = T_ - 1; t >= 0; --t) {
      if (has_vectors()) retreat_vector(t);
      if (source_ && call_.query_after) attend(t);
      for (int64_t l = L_ - 1; l >= 0; --l) retreat(l, t);
      if (source_ && !call_.query_after) attend(t);
    }
  }

  // All steps in one launch; false if that is not wanted, what a block needs exceeds its shared
  // memory, or the blocks do not fit the GPU together.
  bool run_together() {
    if (!runs_together() || !source_ || place_ != nullptr || call_.state_dropout || has_vectors() ||
        call_.context_dropout || L_ > kMostLoopLayers || B_ == 0)
      return false;
    if (T_ * B_ >= int64_t{1} << 30) return false;  // rows, which the kernel counts in 32 bits
    std::vector<Tensor> kept;                       // until it is launched
    const auto flat = [&](const Tensor& x) {
      kept.push_back(torch::stable::contiguous(x));
      return FloatRows{floats_of(kept.back()), x.size(x.dim() - 1)};
    };
    DecoderBackwardLoopArguments a{};
    a.cell = call_.kind;
    a.T = static_cast<int>(T_), a.B = static_cast<int>(B_), a.L = static_cast<int>(L_);
    a.H = static_cast<int>(H_), a.G = size_of(run_.gates, 3);
    a.grad_outputs = flat(call_.given.outputs).data;
    a.hiddens = flat(run_.hiddens).data, a.gates = flat(run_.gates).data;
    if (call_.kind == Cell::kLstm) a.cells = flat(run_.cells).data;
    if (call_.dropout) a.dropout = flat(*call_.dropout).data;
    a.grad_gates = floats_of(d_.gates), a.grad_queries = floats_of(d_.queries);
    a.grad_hidden = floats_of(d_.hidden), a.grad_cell = floats_of(d_.cell);
    a.attention = attention(kLeastShared);
    a.attention.grad_context = flat(call_.given.contexts), a.attention.weights = flat(run_.weights);
    a.attention.grad_weights = flat(call_.given.weights), a.attention.query = flat(run_.queries);
    a.attention.to_context = flat(d_.contexts), a.attention.to_scores = flat(d_.scores);
    a.attention.to_query = flat(d_.queries);
    a.attention.carried = a.lowest = float_rows(products_[0]);
    a.of_query = float_rows(of_query_);
    a.A = a.attention.A;
    a.query_after = call_.query_after, a.by_four = a.G % 4 == 0 && a.A % 4 == 0;
    kept.push_back(turned(source_->w_query));
    a.query = team_product_of(kept.back(), 1);
    std::vector<TeamProduct*> products{&a.query};
    for (int64_t l = 0; l < L_; ++l) {
      kept.push_back(turned(weights_[l]));
      a.layers[l] = team_product_of(kept.back(), l > 0 ? 2 : 1);
      a.self[l] = float_rows(products_[l], width(l));
      products.push_back(&a.layers[l]);
    }
    TeamPlan plan;
    const int64_t floats =
        one_query_backward_shared_floats(a.attention.S, a.attention.D, kTeamWarps);
    if (!plan_teams(plan, device_, products, B_, floats)) return false;
    const dim3 threads(kTeamThreads);
    if (!device_.fits_together(decoder_backward_loop, plan.blocks(), threads, plan.shared_floats))
      return false;
    const Tensor counts = counts_of(device_, plan, run_.gates);
    a.team = plan.team;
    // Nothing is carried to the context of the last step.
    if (call_.query_after) torch::stable::zero_(products_[0]);
    return device_.launch_together(decoder_backward_loop, plan.blocks(), threads,
                                   plan.shared_floats, a);
  }

  int64_t width(int64_t l) const { return weights_[l].size(1) - H_; }
  Tensor hidden(int64_t l) const {  // first the gradient of the last state, then what is passed on
    return view(d_.hidden, {B_, H_}, {H_, 1}, l * B_ * H_);
  }

  // What comes to the state of layer l from the steps after it, `step` being the next one.
  HiddenGradient later(int64_t l, int64_t step) const {
    HiddenGradient grad{};
    const bool last = step == T_;
    if (last || call_.kind == Cell::kGru) grad.passed = float_rows(hidden(l));
    if (!last) grad.self = float_rows(products_[l], width(l));
    return grad;
  }

  void retreat(int64_t l, int64_t t) {
    CellBackwardArguments a{later(l, t + 1)};
    if (l + 1 < L_) {
      a.grad.next = float_rows(products_[l + 1]);
      if (call_.dropout) a.grad.factors = float_rows(at(*call_.dropout, l, t));
    } else {
      if (has_vectors()) a.grad.next = float_rows(*grad_features_);
      a.grad.output = float_rows(at(call_.given.outputs, t));
      // The query of this step, or, if it comes before, of the next one.
      if (source_ && (call_.query_after || t + 1 < T_)) a.grad.query = float_rows(of_query_);
    }
    a.gates = float_rows(at(run_.gates, l, t));
    a.hidden_before = float_rows(at(run_.hiddens, l, t));
    if (call_.kind == Cell::kLstm) {
      a.cell_before = float_rows(at(run_.cells, l, t));
      a.cell = float_rows(at(run_.cells, l, t + 1));
      a.grad_cell = float_rows(at(d_.cell, l));
    }
    const Tensor grad_gates = at(d_.gates, l, t);
    a.grad_gates = float_rows(grad_gates);
    a.passed = float_rows(hidden(l));
    if (call_.state_dropout) a.kept = float_rows(at(*call_.state_dropout, l, t));
    a.B = static_cast<int>(B_), a.H = static_cast<int>(H_);
    launch_retreat(device_, call_.kind, a);
    product(products_[l], grad_gates, transposed(weights_[l]));
    if (l == 0 && call_.context_dropout)
      launch_scale(device_, {float_rows(products_[0]), float_rows(at(*call_.context_dropout, t)),
                             static_cast<int>(B_), static_cast<int>(width(0))});
  }

  bool has_vectors() const { return !call_.vector.empty(); }

  // From the attentional vector's gradient to that before its activation, and on to the output and
  // the context that it was made of.
  void retreat_vector(int64_t t) {
    const Tensor grad = at(d_.vectors, t);
    VectorBackwardArguments a{float_rows(at(call_.grad_vectors, t))};
    if (t + 1 < T_) a.carried = float_rows(products_[0]);
    if (call_.vector_dropout) a.factors = float_rows(at(*call_.vector_dropout, t));
    a.vector = float_rows(at(call_.vectors, t + 1)), a.grad = float_rows(grad);
    a.B = static_cast<int>(B_), a.O = size_of(grad, 1), a.tanh = call_.tanh;
    launch_vector_backward(device_, a);
    product(*grad_features_, grad, transposed(call_.vector[0]));
    if (call_.features_dropout)
      launch_scale(device_,
                   {float_rows(*grad_features_), float_rows(at(*call_.features_dropout, t)),
                    static_cast<int>(B_), size_of(*grad_features_, 1)});
  }

  // A block of attention has a whole row's gradients of scores and context in shared memory; with a
  // location, of the context alone.
  void check_source() const {
    const int S = size_of(source_->keys, 1), D = size_of(source_->values, 2);
    const int64_t floats =
        place_ != nullptr ? D : one_query_backward_shared_floats(S, D, kQueryBackwardWarps);
    STD_TORCH_CHECK(floats <= device_.shared_floats_of_block, "attention backward over S = ", S,
                    " positions of width ", D, " takes ", 4 * floats,
                    " bytes of a block's shared memory, expected at most ",
                    4 * device_.shared_floats_of_block);
  }

  // Elements of a row from which another meeting of a team is worth its time, and a launch, which a
  // host takes ten times as long for where it is not captured.
  static constexpr int64_t kLeastShared = 1 << 16, kLeastLaunched = 1 << 18;

  // What does not depend on the step.
  OneQueryBackwardArguments attention(int64_t least_shared) {
    const Source& s = *source_;
    OneQueryBackwardArguments a{};
    a.keys = view_of(s.keys), a.values = view_of(s.values), a.v = view_of(s.v);
    a.S = size_of(s.keys, 1), a.A = size_of(s.keys, 2), a.D = size_of(s.values, 2);
    a.values_by_four = by_four(s.values);
    if (place_ != nullptr) return a;
    a.powers = powers_of(s.powers, s.keys);
    if (!share_rows(a, B_, device_.multiprocessors, least_shared)) {
      a.ranges = a.slices = 1, a.keys_of_range = a.S, a.pairs_of_slice = a.powers.Hp / 2;
      return a;
    }
    if (!of_weights_) of_weights_.emplace(empty(run_.gates, {B_, s.keys.size(1)}));
    a.of_weights = float_rows(*of_weights_);
    return a;
  }

  // From the context's gradient to the query's, and on to the top layer's hidden state.
  void attend(int64_t t) {
    OneQueryBackwardArguments a = attention(kLeastLaunched);
    a.grad_context = float_rows(at(call_.given.contexts, t));
    if (has_vectors())
      a.carried = float_rows(*grad_features_, H_);
    else if (!call_.query_after || t + 1 < T_)
      a.carried = float_rows(products_[0]);
    a.grad_weights = float_rows(at(call_.given.weights, t)),
    a.weights = float_rows(at(run_.weights, t));
    a.query = float_rows(at(run_.queries, t));
    const Tensor grad_query = at(d_.queries, t);
    a.to_context = float_rows(at(d_.contexts, t)), a.to_scores = float_rows(at(d_.scores, t));
    a.to_query = float_rows(grad_query);
    const auto launch = [&](Stage stage, int parts) {
      device_.launch(one_query_backward, B_ * parts, dim3(kQueryBackwardThreads),
                     one_query_backward_shared_floats(a.S, a.D, kQueryBackwardWarps), a, stage,
                     parts);
    };
    if (place_ != nullptr)
      place_->attend(t, a);
    else if (a.of_weights.data != nullptr)
      launch(Stage::kValues, a.ranges), launch(Stage::kSlopes, a.slices);
    else
      launch(Stage::kAll, 1);
    product(of_query_, grad_query, transposed(source_->w_query));
  }

  const Device& device_;
  const DecoderBackwardCall& call_;
  const States& run_;
  const std::optional<Source>& source_;
  const Gradients& d_;
  PlaceBackward* const place_;
  const int64_t L_, T_, B_, H_;
  const Tensor of_query_;  // (B, H)
  // Of each layer: (G, width + H), and gates' gradient times it (B, width + H)
  std::vector<Tensor> weights_, products_;
  std::optional<Tensor> of_weights_;     // (B, S), see OneQueryBackwardArguments
  std::optional<Tensor> grad_features_;  // gradient of [output | context] that a vector is made of
};

std::pair<Gradients, OfLocation> retreat(const DecoderBackwardCall& call) {
  const Tensor& gates = call.run.gates;
  STD_TORCH_CHECK(gates.scalar_type() == ScalarType::Float,
                  "expected float32: the decoder has a CUDA kernel for nothing else");
  STD_TORCH_CHECK(call.batch_sizes.empty(), "expected no batch_sizes: kernels read all rows");
  const Device device(gates);
  std::optional<Source> source;
  if (!call.attention.empty())
    source.emplace(call.attention, std::nullopt, call.powers, call.location.empty());
  std::optional<Place> place;
  std::optional<PlaceBackward> of_place;
  if (!call.location.empty()) {
    const Tensor &conv = call.location[0], &projection = call.location[1],
                 &states = call.location[2];
    place.emplace(device, std::vector<Tensor>{conv, projection, last_location(states)},
                  call.accumulates, source->keys);
    of_place.emplace(device, *place, *source, states, call.grad_location, call.detach);
  }
  const Gradients d = gradients_of(call);
  Backward(device, call, source, d, of_place ? &*of_place : nullptr).run();
  return {d, of_place ? of_place->results(call.run.queries, d.scores) : of_no_location(gates)};
}

}  // namespace
}  // namespace seq2seq_fast

S2S_CUDA_LIBRARY(m) {
  using Ops = seq2seq_fast::DecoderBackwardOps<seq2seq_fast::retreat>;
  m.impl("attention_decoder_backward", TORCH_BOX(&Ops::plain));
  m.impl("extended_decoder_backward", TORCH_BOX(&Ops::extended));
}
