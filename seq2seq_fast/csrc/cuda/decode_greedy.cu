// The launch of decode_greedy.cuh.
#include <torch/csrc/stable/library.h>

#include "decode_greedy.cuh"
#include "decoder.h"
#include "team.h"

namespace seq2seq_fast {
namespace {

// Tokens (B, steps), lengths, log_probs, scores and finished (B,), and the weights (steps, B, S)
// if they are kept; all of them without elements where a block has too little memory for it, or the
// blocks do not fit the GPU together.
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// weights: embedding (V, E); of each layer weights (G, its input's width + H, filled up to
// multiples of 16 bytes) and bias (G,); the query's weight and bias, if there is attention; the
// readout's weight (V, D + H), over [context | hidden state], and bias. All but weights of products
// are float32. source: keys, powers, values, v. whole: bos, eos, fill, min_length; bos (B,) in its
// place.
Results decode_greedy_op(Tensor hidden, Tensor cell, std::optional<Tensor> context,
                         std::vector<Tensor> weights, std::string cell_type, bool query_after,
                         std::vector<Tensor> source, std::optional<Tensor> mask,
                         std::optional<Tensor> limits, Tensor prefix, std::vector<int64_t> whole,
                         double length_penalty, bool return_weights, int64_t steps,
                         std::optional<Tensor> bos) {
  const Device device(hidden);
  const Cell kind = cell_of(cell_type);
  const bool attends = !source.empty();
  GreedyArguments a{};
  a.cell_type = kind;
  a.T = static_cast<int>(steps), a.P = size_of(prefix, 1);
  a.L = size_of(hidden, 0), a.B = size_of(hidden, 1), a.H = size_of(hidden, 2);
  a.V = size_of(weights.at(0), 0), a.E = size_of(weights[0], 1);
  a.D = attends ? size_of(source[2], 2) : size_of(*context, 1);
  a.attends = attends, a.query_after = query_after;
  a.by_four = a.H % 4 == 0 && a.D % 4 == 0 && a.E % 4 == 0 && aligned(hidden);
  if (context) a.by_four = a.by_four && aligned(*context);
  a.bos = static_cast<int>(whole.at(0)), a.eos = static_cast<int>(whole.at(1));
  a.fill = static_cast<int>(whole.at(2)), a.min_length = static_cast<int>(whole.at(3));
  a.length_penalty = length_penalty;

  const auto none = [&](ScalarType type) { return empty(hidden, {0}, type); };
  const auto nothing = [&]() -> Results {
    return {none(ScalarType::Long),  none(ScalarType::Long), none(ScalarType::Float),
            none(ScalarType::Float), none(ScalarType::Bool), none(ScalarType::Float)};
  };
  if (a.L > kMostLoopLayers) return nothing();
  a.embedding = floats_of(weights[0]);
  std::vector<TeamProduct*> products;
  for (int l = 0; l < a.L; ++l) {
    a.layers[l] = team_product_of(weights.at(1 + 2 * l), blocks_of(kind));
    STD_TORCH_CHECK(a.layers[l].units == a.H, "expected weights of layers with hidden's units");
    a.bias[l] = floats_of(weights.at(2 + 2 * l));
    products.push_back(&a.layers[l]);
  }
  a.readout = team_product_of(weights.at(weights.size() - 2), 1);
  STD_TORCH_CHECK(a.readout.units == a.V, "expected a readout of as many tokens as are embedded");
  a.b_readout = floats_of(weights.back());
  products.push_back(&a.readout);
  int64_t floats = 0;
  const int A = attends ? size_of(source[0], 2) : 0, S = attends ? size_of(source[0], 1) : 0;
  const Tensor queries = empty(hidden, {a.B, 1, A});
  if (attends) {
    a.A = A;
    a.query = team_product_of(weights.at(weights.size() - 4), 1);
    a.b_query = floats_of(weights.at(weights.size() - 3));
    products.push_back(&a.query);
    a.attention = attention_arguments(device, queries, source[0], source[2], source[3],
                                      softmax_over(mask), source[1]);
    floats = one_query_shared_floats(A, a.attention.keys_of_range);
  }
  TeamPlan plan;
  if (!plan_teams(plan, device, products, a.B, floats)) return nothing();
  if (!device.fits_together(decode_greedy, plan.blocks(), dim3(kTeamThreads), plan.shared_floats))
    return nothing();

  const int64_t B = a.B, L = a.L, H = a.H;
  a.hidden = floats_of(hidden);
  if (kind == Cell::kLstm) a.cell = floats_of(cell);
  if (context) a.context = floats_of(*context);
  // What steps hand on, in one piece: `found` first, whose parts are aligned.
  const int64_t of_found = B * plan.team.size * (sizeof(Found) / sizeof(float));
  const int64_t of_cells = kind == Cell::kLstm ? L * B * H : 0;
  const int64_t sizes[] = {of_found,
                           2 * L * B * H,
                           of_cells,
                           attends ? B * a.D : 0,
                           B * a.E,
                           B * a.V,
                           2 * B,  // log_prob
                           B,      // live
                           attends && !return_weights ? B * S : 0};
  int64_t total = 0;
  for (const int64_t n : sizes) total += round_up(n, 4);
  const Tensor memory = empty(hidden, {total}, ScalarType::Float);
  float* next = floats_of(memory);
  size_t i = 0;
  const auto take = [&] {
    float* const at = next;
    next += round_up(sizes[i++], 4);
    return at;
  };
  a.found = reinterpret_cast<Found*>(take());
  a.hiddens = take(), a.cells = take(), a.contexts = take(), a.inputs = take(), a.logits = take();
  a.log_prob = reinterpret_cast<double*>(take());
  a.live = reinterpret_cast<int*>(take());
  Tensor kept = none(ScalarType::Float), parts = none(ScalarType::Float);
  if (attends) {
    parts = share_parts(device, a.attention, queries);
    if (return_weights) kept = empty(hidden, {steps, B, S}, ScalarType::Float);
    a.keeps_weights = return_weights;
    a.queries = floats_of(queries);
    a.attention.context = a.contexts;
    a.attention.weights = return_weights ? floats_of(kept) : take();
  }
  Tensor tokens = empty(hidden, {B, steps}, ScalarType::Long);
  Tensor lengths = empty(hidden, {B}, ScalarType::Long);
  Tensor log_probs = empty(hidden, {B}), scores = empty(hidden, {B});
  Tensor finished = empty(hidden, {B}, ScalarType::Bool);
  a.tokens = static_cast<int64_t*>(tokens.data_ptr());
  a.lengths = static_cast<int64_t*>(lengths.data_ptr());
  a.log_probs = floats_of(log_probs), a.scores = floats_of(scores);
  a.finished = static_cast<bool*>(finished.data_ptr());
  if (limits) a.limits = static_cast<const int64_t*>(limits->data_ptr());
  if (bos) a.bos_of_rows = static_cast<const int64_t*>(bos->data_ptr());
  a.prefix = static_cast<const int64_t*>(prefix.data_ptr());

  const Tensor counts = counts_of(device, plan, hidden);
  a.team = plan.team;
  if (!device.launch_together(decode_greedy, plan.blocks(), dim3(kTeamThreads), plan.shared_floats,
                              a))
    return nothing();
  return {tokens, lengths, log_probs, scores, finished, kept};
}

}  // namespace
}  // namespace seq2seq_fast

S2S_CUDA_LIBRARY(m) { m.impl("decode_greedy", TORCH_BOX(&seq2seq_fast::decode_greedy_op)); }
