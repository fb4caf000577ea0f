// The recurrence of the attention decoder backward. It is one launch, see
// decoder_backward_loop.cuh, or for each step of L layers 2 L + 2 of them: for each layer its cell
// and the product of the gates' gradient with [w_input | w_hidden], whose parts the next kernels
// add up; attention, and the query's product. Gradients of weights, keys and values are products
// over all steps, which are left to the caller.
#include <torch/csrc/stable/library.h>

#include "decoder.h"
#include "decoder_backward_loop.cuh"
#include "decoder_loop.h"
#include "location.h"
#include "team.h"

namespace seq2seq_fast {

static __global__ void __launch_bounds__(kQueryBackwardThreads, 1)
    one_query_backward(OneQueryBackwardArguments a) {
  retreat_one_query<kQueryBackwardWarps>(a, blockIdx.x, blockIdx.x, shared_memory());
}

namespace {

class Backward {
 public:
  Backward(const Device& device, const Given& given, const States& run,
           const std::vector<Tensor>& layers, const std::optional<Source>& source,
           const std::optional<Tensor>& dropout, Cell cell, bool query_after, bool need_state,
           const Gradients& d, PlaceBackward* place, const std::optional<Tensor>& state_dropout)
      : device_(device),
        given_(given),
        run_(run),
        source_(source),
        dropout_(dropout),
        cell_(cell),
        query_after_(query_after),
        need_state_(need_state),
        d_(d),
        place_(place),
        state_dropout_(state_dropout),
        L_(run.gates.size(0)),
        T_(run.gates.size(1)),
        B_(run.gates.size(2)),
        H_(run.hiddens.size(3)),
        of_query_(empty(run.gates, {B_, H_})) {
    for (int64_t l = 0; l < L_; ++l) {
      const Tensor* w_x = l > 0 ? &layers[3 * l] : source ? &source->w_context : nullptr;
      weights_.push_back(side_by_side(w_x, layers[3 * l + 1], run.gates.size(3)));
      products_.push_back(empty(run.gates, {B_, weights_[l].size(1)}));
    }
  }

  void run() {
    if (T_ == 0) return;
    if (!run_together()) run_steps();
    for (int64_t l = 0; l < L_ && need_state_; ++l) {
      const Tensor to = hidden(l);
      SumArguments a{later(l, 0), float_rows(to)};
      if (source_ && !query_after_ && l == L_ - 1) a.grad.query = float_rows(of_query_);
      a.B = static_cast<int>(B_), a.H = static_cast<int>(H_);
      launch_sum(device_, a);
    }
    if (source_ && query_after_) copy(d_.context, columns(products_[0], 0, width(0)));
  }

 private:
  void run_steps() {
    for (int64_t t = T_ - 1; t >= 0; --t) {
      if (source_ && query_after_) attend(t);
      for (int64_t l = L_ - 1; l >= 0; --l) retreat(l, t);
      if (source_ && !query_after_) attend(t);
    }
  }

  // All steps in one launch; false if that is not wanted, what a block needs exceeds its shared
  // memory, or the blocks do not fit the GPU together.
  bool run_together() {
    if (!runs_together() || !source_ || place_ != nullptr || state_dropout_ ||
        L_ > kMostLoopLayers || B_ == 0)
      return false;
    if (T_ * B_ >= int64_t{1} << 30) return false;  // rows, which the kernel counts in 32 bits
    std::vector<Tensor> kept;                       // until it is launched
    const auto flat = [&](const Tensor& x) {
      kept.push_back(torch::stable::contiguous(x));
      return FloatRows{floats_of(kept.back()), x.size(x.dim() - 1)};
    };
    DecoderBackwardLoopArguments a{};
    a.cell = cell_;
    a.T = static_cast<int>(T_), a.B = static_cast<int>(B_), a.L = static_cast<int>(L_);
    a.H = static_cast<int>(H_), a.G = size_of(run_.gates, 3);
    a.grad_outputs = flat(given_.outputs).data;
    a.hiddens = flat(run_.hiddens).data, a.gates = flat(run_.gates).data;
    if (cell_ == Cell::kLstm) a.cells = flat(run_.cells).data;
    if (dropout_) a.dropout = flat(*dropout_).data;
    a.grad_gates = floats_of(d_.gates), a.grad_queries = floats_of(d_.queries);
    a.grad_hidden = floats_of(d_.hidden), a.grad_cell = floats_of(d_.cell);
    a.attention = attention();
    a.attention.grad_context = flat(given_.contexts), a.attention.weights = flat(run_.weights);
    a.attention.grad_weights = flat(given_.weights), a.attention.query = flat(run_.queries);
    a.attention.to_context = flat(d_.contexts), a.attention.to_scores = flat(d_.scores);
    a.attention.to_query = flat(d_.queries);
    a.attention.carried = a.lowest = float_rows(products_[0]);
    a.of_query = float_rows(of_query_);
    a.A = a.attention.A;
    a.query_after = query_after_, a.by_four = a.G % 4 == 0 && a.A % 4 == 0;
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
    if (query_after_) torch::stable::zero_(products_[0]);
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
    if (last || cell_ == Cell::kGru) grad.passed = float_rows(hidden(l));
    if (!last) grad.self = float_rows(products_[l], width(l));
    return grad;
  }

  void retreat(int64_t l, int64_t t) {
    CellBackwardArguments a{later(l, t + 1)};
    if (l + 1 < L_) {
      a.grad.next = float_rows(products_[l + 1]);
      if (dropout_) a.grad.factors = float_rows(at(*dropout_, l, t));
    } else {
      a.grad.output = float_rows(at(given_.outputs, t));
      // The query of this step, or, if it comes before, of the next one.
      if (source_ && (query_after_ || t + 1 < T_)) a.grad.query = float_rows(of_query_);
    }
    a.gates = float_rows(at(run_.gates, l, t));
    a.hidden_before = float_rows(at(run_.hiddens, l, t));
    if (cell_ == Cell::kLstm) {
      a.cell_before = float_rows(at(run_.cells, l, t));
      a.cell = float_rows(at(run_.cells, l, t + 1));
      a.grad_cell = float_rows(at(d_.cell, l));
    }
    const Tensor grad_gates = at(d_.gates, l, t);
    a.grad_gates = float_rows(grad_gates);
    a.passed = float_rows(hidden(l));
    if (state_dropout_) a.kept = float_rows(at(*state_dropout_, l, t));
    a.B = static_cast<int>(B_), a.H = static_cast<int>(H_);
    launch_retreat(device_, cell_, a);
    product(products_[l], grad_gates, transposed(weights_[l]));
  }

  // What does not depend on the step.
  OneQueryBackwardArguments attention() const {
    const Source& s = *source_;
    OneQueryBackwardArguments a{};
    a.keys = view_of(s.keys), a.values = view_of(s.values), a.v = view_of(s.v);
    if (place_ == nullptr) a.powers = powers_of(s.powers, s.keys);
    a.S = size_of(s.keys, 1), a.A = size_of(s.keys, 2), a.D = size_of(s.values, 2);
    return a;
  }

  // From the context's gradient to the query's, and on to the top layer's hidden state.
  void attend(int64_t t) {
    OneQueryBackwardArguments a = attention();
    a.grad_context = float_rows(at(given_.contexts, t));
    if (!query_after_ || t + 1 < T_) a.carried = float_rows(products_[0]);
    a.grad_weights = float_rows(at(given_.weights, t)), a.weights = float_rows(at(run_.weights, t));
    a.query = float_rows(at(run_.queries, t));
    const Tensor grad_query = at(d_.queries, t);
    a.to_context = float_rows(at(d_.contexts, t)), a.to_scores = float_rows(at(d_.scores, t));
    a.to_query = float_rows(grad_query);
    if (place_ != nullptr)
      place_->attend(t, a);
    else
      device_.launch(one_query_backward, B_, dim3(kQueryBackwardThreads),
                     one_query_backward_shared_floats(a.S, a.D, kQueryBackwardWarps), a);
    product(of_query_, grad_query, transposed(source_->w_query));
  }

  const Device& device_;
  const Given& given_;
  const States& run_;
  const std::optional<Source>& source_;
  const std::optional<Tensor>& dropout_;
  const Cell cell_;
  const bool query_after_, need_state_;
  const Gradients& d_;
  PlaceBackward* const place_;
  const std::optional<Tensor>& state_dropout_;  // (L, T, B, H)
  const int64_t L_, T_, B_, H_;
  const Tensor of_query_;  // (B, H)
  // Of each layer: (G, width + H), and gates' gradient times it (B, width + H)
  std::vector<Tensor> weights_, products_;
};

void check_float(const Tensor& gates) {
  STD_TORCH_CHECK(gates.scalar_type() == ScalarType::Float,
                  "expected float32: the decoder has a CUDA kernel for nothing else");
}

auto attention_decoder_backward(Tensor grad_outputs, Tensor grad_contexts, Tensor grad_weights,
                                Tensor grad_hidden, Tensor grad_cell, Tensor hiddens, Tensor cells,
                                Tensor gates, Tensor queries, Tensor weights,
                                std::vector<Tensor> layers, std::vector<Tensor> attention,
                                std::optional<Tensor> powers, std::optional<Tensor> dropout,
                                std::string cell_type, bool query_after, bool need_state) {
  check_float(gates);
  const Device device(gates);
  std::optional<Source> source;
  if (!attention.empty()) source.emplace(attention, std::nullopt, powers);
  const Given given = {grad_outputs, grad_contexts, grad_weights};
  const States run = {hiddens, cells, gates, queries, weights};
  const Gradients d =
      gradients_of(given, run, grad_hidden, grad_cell, source.has_value(), query_after);
  Backward(device, given, run, layers, source, dropout, cell_of(cell_type), query_after, need_state,
           d, nullptr, std::nullopt)
      .run();
  return d.results(need_state);
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
  check_float(gates);
  const Device device(gates);
  std::optional<Source> source;
  if (!attention.empty()) source.emplace(attention, std::nullopt, powers, location.empty());
  std::optional<Place> place;
  std::optional<PlaceBackward> of_place;
  if (!location.empty()) {
    const std::vector<Tensor> last = {location[0], location[1], last_location(location[2])};
    place.emplace(device, last, accumulates, source->keys);
    of_place.emplace(device, *place, *source, location[2], grad_location, detach);
  }
  const Given given = {grad_outputs, grad_contexts, grad_weights};
  const States run = {hiddens, cells, gates, queries, weights};
  const Gradients d =
      gradients_of(given, run, grad_hidden, grad_cell, source.has_value(), query_after);
  Backward(device, given, run, layers, source, dropout, cell_of(cell_type), query_after, need_state,
           d, of_place ? &*of_place : nullptr, state_dropout)
      .run();
  const auto none = [&] { return empty(gates, {0}); };
  return std::tuple_cat(d.results(need_state),
                        of_place ? of_place->results(queries, d.scores)
                                 : std::tuple(none(), none(), none(), none(), none()));
}

}  // namespace
}  // namespace seq2seq_fast

S2S_CUDA_LIBRARY(m) {
  m.impl("attention_decoder_backward", TORCH_BOX(&seq2seq_fast::attention_decoder_backward));
  m.impl("extended_decoder_backward", TORCH_BOX(&seq2seq_fast::extended_decoder_backward));
}
