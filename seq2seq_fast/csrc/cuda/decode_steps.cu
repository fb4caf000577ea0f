// Steps of greedy decoding, sampling and beam search on a GPU, and their results.
//
// A step of L layers is 2 L + 5 launches, 2 L + 6 of beam search: what rows go on from, the query's
// product, attention, for each layer a product and its cell, the readout's product, and the search.
// A location is one more, an attentional vector two.
// All that steps hand on lies in `state`, and nothing waits for the GPU: a CUDA graph of some steps
// can be replayed until all searches are over.
#include <torch/csrc/stable/library.h>

#include "decode_search.cuh"
#include "decoder.h"
#include "location.h"

namespace seq2seq_fast {
namespace {

template <typename T>
T* data_of(const Tensor& x, ScalarType type) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.is_contiguous(),
                  "expected contiguous tensors of the types that decoding/graphed.py makes");
  return static_cast<T*>(x.data_ptr());
}
int* ints(const Tensor& x) { return data_of<int>(x, ScalarType::Int); }
double* doubles(const Tensor& x) { return data_of<double>(x, ScalarType::Double); }
float* floats(const Tensor& x) { return data_of<float>(x, ScalarType::Float); }

// What steps hand on, in the order of decoding/graphed.py.
struct State {
  Tensor hidden, cell, context, covered, counters, counts, rows, log_probs, nodes, kept, ended,
      ended_scores, locations, attended;
  explicit State(const std::vector<Tensor>& x)
      : hidden(x.at(0)),
        cell(x.at(1)),
        context(x.at(2)),
        covered(x.at(3)),
        counters(x.at(4)),
        counts(x.at(5)),
        rows(x.at(6)),
        log_probs(x.at(7)),
        nodes(x.at(8)),
        kept(x.at(9)),
        ended(x.at(10)),
        ended_scores(x.at(11)),
        locations(x.at(12)),
        attended(x.at(13)) {}

  int64_t B() const { return counts.size(1); }

  Search search() const {
    const int64_t M = rows.size(1), T = nodes.size(1), N = ended.size(2), BN = B() * N;
    int *counter = ints(counters), *count = ints(counts), *row = ints(rows), *node = ints(nodes);
    int* const e = ints(ended);
    double* const score = doubles(ended_scores);
    return {counter,
            counter + 1,
            count,
            count + B(),
            row,
            row + M,
            doubles(log_probs),
            node,
            node + T * M,
            {e, e + BN, e + 2 * BN, e + 3 * BN, score, score + BN},
            static_cast<int>(M),
            static_cast<int>(M / B()),
            static_cast<int>(N),
            static_cast<int>(T)};
  }
};

// A decoder's weights, in the order of decoding/graphed.py: embedding (V, E); of each layer weights
// (G, its input's width + H) and bias (G,); the query's weight and bias, if there is attention; the
// attentional vector's weight (O, D + H), over [context | hidden state], and bias, if there is one;
// the readout's weight (V, D + H), over the same, or (V, O), and bias.
struct Weights {
  Tensor embedding, readout, b_readout;
  std::vector<Tensor> layers;
  std::optional<Tensor> query, b_query, vector, b_vector;
  Weights(const std::vector<Tensor>& x, bool attends, bool has_vectors)
      : embedding(x.at(0)),
        readout(x.at(x.size() - 2)),
        b_readout(x.back()),
        layers(x.begin() + 1, x.end() - (has_vectors ? 6
                                         : attends   ? 4
                                                     : 2)) {
    if (has_vectors) vector = x[x.size() - 4], b_vector = x[x.size() - 3];
    const size_t last = x.size() - (has_vectors ? 2 : 0);
    if (attends) query = x[last - 4], b_query = x[last - 3];
    STD_TORCH_CHECK(readout.size(0) == embedding.size(0),
                    "expected a readout of as many tokens as are embedded");
  }
};

// Keys, powers, values, v and a mask; how a location is seen in it may follow.
struct Attended {
  Tensor keys, powers, values, v;
  Softmax softmax;
  Attended(const std::vector<Tensor>& x, const Tensor& mask)
      : keys(x.at(0)), powers(x.at(1)), values(x.at(2)), v(x.at(3)), softmax(softmax_over(mask)) {
    STD_TORCH_CHECK(keys.size(2) <= kMostFeaturesInShared, "attention of width ", keys.size(2),
                    " is too wide, expected at most ", kMostFeaturesInShared);
  }
};

class Steps {
 public:
  Steps(const Device& device, const State& state, const Weights& weights, Cell cell,
        bool query_after, const std::optional<Attended>& source, const std::optional<Place>& place,
        bool tanh, const SearchRules& rules, const Draw& draw)
      : device_(device),
        state_(state),
        weights_(weights),
        cell_(cell),
        query_after_(query_after),
        source_(source),
        place_(place),
        tanh_(tanh),
        search_(state.search()),
        L_(state.hidden.size(0)),
        M_(state.hidden.size(1)),
        H_(state.hidden.size(2)),
        E_(weights.embedding.size(1)),
        F_(state.context.size(1)),
        S_(source ? source->keys.size(1) : 0),
        V_(weights.readout.size(0)),
        lowest_(empty(state.hidden, {M_, E_ + F_ + H_})),
        upper_(empty(state.hidden, {L_ - 1, M_, 2 * H_})),
        cell_before_(empty(state.hidden, {cell == Cell::kLstm ? L_ : 0, M_, H_})),
        product_(empty(state.hidden, {M_, blocks_of(cell) * H_})),
        logits_(empty(state.hidden, {M_, V_})),
        queries_(empty(state.hidden, {M_, source ? source->keys.size(2) : 0})),
        attended_(place ? state.attended : empty(state.hidden, {M_, S_})),
        placed_(empty(state.hidden, {place ? M_ : 0, S_, queries_.size(1)})),
        covered_before_(empty(state.hidden, {M_, state.covered.numel() > 0 ? S_ : 0})),
        candidates_(empty(state.hidden, {M_, 2 * search_.K + 1}, ScalarType::Int)),
        candidate_log_probs_(empty(state.hidden, {M_, 2 * search_.K}, ScalarType::Double)),
        coverage_(empty(state.hidden, {M_}, ScalarType::Double)),
        path_(empty(state.hidden, {M_, rules.ngram > 0 ? search_.T : 0}, ScalarType::Int)) {
    if (weights.vector) {
      features_.emplace(empty(state.hidden, {M_, weights.vector->size(1)}));
      context_.emplace(empty(state.hidden, {M_, source->values.size(2)}));
      vector_product_.emplace(empty(state.hidden, {M_, F_}));
    }
    rank_.search = search_, rank_.rules = rules, rank_.draw = draw;
    rank_.logits = floats_of(logits_), rank_.bias = floats(weights.b_readout);
    rank_.V = size_of(weights.readout, 0);
    rank_.path = ints(path_);
    rank_.candidate_log_probs = doubles(candidate_log_probs_);
    rank_.candidates = ints(candidates_), rank_.found = rank_.candidates + M_ * 2 * search_.K;
    const bool keeps = state.kept.numel() > 0, covers = state.covered.numel() > 0;
    if (!keeps && !covers) return;
    rank_.weights = floats_of(attended_), rank_.covered_before = floats_of(covered_before_);
    rank_.kept = keeps ? floats(state.kept) : nullptr;
    rank_.covered = covers ? floats(state.covered) : nullptr;
    rank_.coverage = doubles(coverage_);
    rank_.mask = source->softmax.mask;
    rank_.mask_stride[0] = source->softmax.mask_stride[0];
    rank_.mask_stride[1] = source->softmax.mask_stride[2];
    rank_.S = static_cast<int>(S_);
  }

  // Of two locations the i-th is the last step's, and the other one this step's.
  void step(int64_t i) {
    follow_parents();
    if (place_) place(i);
    if (source_ && !query_after_) attend(hidden_columns(L_ - 1));
    for (int64_t l = 0; l < L_; ++l) advance(l);
    if (source_ && query_after_) attend(hidden_columns(0));
    if (features_) make_vector();
    product(logits_, features_ ? state_.context : columns(lowest_, E_, F_ + H_), weights_.readout);
    search();
  }

 private:
  // [x | hidden state] of a layer, whose product with its weights are the gates. When layer 0's has
  // been made, the top layer's new state takes the place of its old one there, beside the context.
  Tensor operand(int64_t l) const {
    return l == 0 ? lowest_ : view(upper_, {M_, 2 * H_}, {2 * H_, 1}, (l - 1) * M_ * 2 * H_);
  }
  Tensor hidden_columns(int64_t l) const { return columns(operand(l), l == 0 ? E_ + F_ : H_, H_); }
  FloatRows layer(const Tensor& states, int64_t l) const {
    return {floats_of(states) + l * M_ * H_, H_};
  }

  void follow_parents() {
    const bool moves = query_after_ || !source_, covers = state_.covered.numel() > 0;
    FollowArguments a{search_, view_of(weights_.embedding), float_rows(lowest_)};
    a.context = float_rows(state_.context), a.to = float_rows(lowest_, E_);
    a.hidden = floats(state_.hidden);
    if (cell_ == Cell::kLstm) a.cell = floats(state_.cell), a.cell_before = floats(cell_before_);
    a.lowest = float_rows(lowest_, E_ + F_);
    a.upper = {floats_of(upper_) + H_, 2 * H_}, a.upper_stride = M_ * 2 * H_;
    a.covered = floats(state_.covered), a.covered_before = floats(covered_before_);
    a.L = static_cast<int>(L_), a.H = static_cast<int>(H_), a.E = static_cast<int>(E_);
    a.D = moves ? static_cast<int>(F_) : 0, a.S = covers ? static_cast<int>(S_) : 0;
    const int64_t numbers = a.E + a.D + L_ * H_ + a.S;
    device_.launch(follow, M_ * ceil_div(numbers, kFollowThreads), dim3(kFollowThreads), 0, a);
  }

  void place(int64_t i) {
    PlaceKeysArguments a{place_->filters};
    float* const locations = floats(state_.locations);
    const int64_t of_step = state_.locations.stride(0);
    a.before = locations + i * of_step, a.state = locations + (1 - i) * of_step;
    a.weights = floats(attended_);
    a.keys = view_of(source_->keys), a.placed = floats_of(placed_);
    a.parent = search_.parent, a.live = search_.live, a.step = search_.step;
    a.rows_of_source = search_.K;
    launch_place_keys(device_, a, M_);
  }

  void attend(const Tensor& states) {
    linear(queries_, states, *weights_.query, *weights_.b_query);
    const int64_t A = queries_.size(1), K = search_.K, B = state_.B();
    const Tensor query = view(queries_, {B, K, A}, {K * A, A, 1});
    const FloatRows to = features_ ? float_rows(*features_) : float_rows(lowest_, E_);
    OneQueryOptions options{to.data, to.ld, place_.has_value(), search_.live, &parts_};
    one_query_attention(device_, query, place_ ? placed_ : source_->keys, source_->values,
                        source_->v, source_->softmax,
                        place_ ? std::nullopt : std::optional(source_->powers),
                        features_ ? *context_ : state_.context, attended_, options);
  }

  void make_vector() {
    product(*vector_product_, *features_, *weights_.vector);
    VectorArguments a{float_rows(*vector_product_), {floats(*weights_.b_vector), 0}};
    a.vector = float_rows(state_.context);  // from where it follows rows
    a.B = static_cast<int>(M_), a.O = static_cast<int>(F_), a.tanh = tanh_;
    launch_vector(device_, a);
  }

  void advance(int64_t l) {
    product(product_, operand(l), weights_.layers[2 * l]);
    CellArguments a{float_rows(product_)};
    a.bias = {floats(weights_.layers[2 * l + 1]), 0};
    a.hidden_before = float_rows(hidden_columns(l));
    a.hidden = layer(state_.hidden, l);
    if (cell_ == Cell::kLstm) {
      a.cell_before = layer(cell_before_, l);
      a.cell = layer(state_.cell, l);
    }
    if (l + 1 < L_)
      a.to_next = float_rows(operand(l + 1));
    else
      a.to_self = float_rows(hidden_columns(0));
    if (l + 1 == L_ && features_) a.to_next = float_rows(*features_, features_->size(1) - H_);
    a.B = static_cast<int>(M_), a.H = static_cast<int>(H_);
    launch_advance(device_, cell_, a);
  }

  void search() {
    constexpr int64_t scratch = 2 * kRankWarps;
    const bool greedy = search_.K == 1;
    const auto kernel = !greedy                      ? rank<false>
                        : rank_.draw.seed == nullptr ? rank<true>
                                                     : rank<true, true>;
    device_.launch(kernel, M_, dim3(kRankThreads), scratch, rank_);
    if (!greedy) device_.launch(join_rows, state_.B(), dim3(kWarp), search_.K, rank_);
  }

  const Device& device_;
  const State& state_;
  const Weights& weights_;
  const Cell cell_;
  const bool query_after_;
  const std::optional<Attended>& source_;
  const std::optional<Place>& place_;
  const bool tanh_;
  const Search search_;
  // F is the width of what is fed beside the token: of a context, or of an attentional vector.
  const int64_t L_, M_, H_, E_, F_, S_, V_;
  const Tensor lowest_, upper_, cell_before_, product_, logits_, queries_, attended_;
  const Tensor placed_;  // (M, S, A), keys of a step with its location
  // Of attentional vectors: [context | hidden state], the former, and the former's product.
  std::optional<Tensor> features_, context_, vector_product_;
  const Tensor covered_before_, candidates_, candidate_log_probs_, coverage_, path_;
  std::optional<Tensor> parts_;  // of attention to sources that are split
  RankArguments rank_{};
};

// whole: bos, eos, fill, min_length, beam_size, n_best, no_repeat_ngram, as of `decode`; vector and
// accumulates as of it too, the filters of a location and their projection behind the source.
void decode_steps(std::vector<Tensor> state_, std::vector<Tensor> weights_, std::string cell_type,
                  bool query_after, std::vector<Tensor> source_, std::optional<Tensor> mask,
                  Tensor limits, Tensor prefix, Tensor penalties, std::optional<Tensor> seed,
                  std::vector<int64_t> whole, double coverage_penalty, double temperature,
                  int64_t top_k, double top_p, std::vector<int64_t> accumulates,
                  std::vector<int64_t> vector, int64_t steps) {
  STD_TORCH_CHECK(whole.size() == 7, "expected 7 numbers");
  const State state(state_);
  const Device device(state.hidden);
  const Weights weights(weights_, !source_.empty(), !vector.empty());
  std::optional<Attended> source;
  if (!source_.empty()) source.emplace(source_, *mask);
  std::optional<Place> place;
  if (!accumulates.empty()) {
    STD_TORCH_CHECK(steps % 2 == 0, "expected an even number of steps");
    place.emplace(device, std::vector<Tensor>{source_.at(4), source_.at(5), state.locations},
                  accumulates, source->keys);
  }
  const SearchRules rules = {static_cast<int>(whole[1]),
                             static_cast<int>(whole[3]),
                             static_cast<int>(whole[6]),
                             size_of(prefix, 1),
                             doubles(penalties),
                             coverage_penalty,
                             data_of<int64_t>(limits, ScalarType::Long),
                             data_of<int64_t>(prefix, ScalarType::Long)};
  const Draw draw = {seed ? data_of<int64_t>(*seed, ScalarType::Long) : nullptr,
                     static_cast<float>(1 / temperature), static_cast<int>(top_k), top_p};
  STD_TORCH_CHECK(!seed || whole[4] == 1, "expected one hypothesis of each row that is drawn");
  const bool tanh = !vector.empty() && vector.at(1) != 0;
  Steps loop(device, state, weights, cell_of(cell_type), query_after, source, place, tanh, rules,
             draw);
  for (int64_t i = 0; i < steps; ++i) loop.step(i % 2);
}

// Tokens and rows (B, N, T), lengths, log_probs, scores and finished (B, N) of what has ended.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> decode_results(
    std::vector<Tensor> state_, int64_t fill) {
  const State state(state_);
  const Device device(state.hidden);
  const Search search = state.search();
  const int64_t B = state.B(), N = search.N, T = search.T;
  const auto of = [&](ScalarType type) { return empty(state.hidden, {B, N}, type); };
  Tensor tokens = empty(state.hidden, {B, N, T}, ScalarType::Long);
  Tensor rows = empty(state.hidden, {B, N, T}, ScalarType::Long);
  Tensor lengths = of(ScalarType::Long), log_probs = of(ScalarType::Float);
  Tensor scores = of(ScalarType::Float), finished = of(ScalarType::Bool);
  const TraceArguments a = {search,
                            static_cast<int>(B),
                            static_cast<int>(fill),
                            data_of<int64_t>(tokens, ScalarType::Long),
                            data_of<int64_t>(rows, ScalarType::Long),
                            data_of<int64_t>(lengths, ScalarType::Long),
                            floats(log_probs),
                            floats(scores),
                            data_of<bool>(finished, ScalarType::Bool)};
  device.launch(trace, ceil_div(B * N, kTraceThreads), dim3(kTraceThreads), 0, a);
  return {tokens, rows, lengths, log_probs, scores, finished};
}

}  // namespace
}  // namespace seq2seq_fast

S2S_CUDA_LIBRARY(m) {
  m.impl("decode_steps", TORCH_BOX(&seq2seq_fast::decode_steps));
  m.impl("decode_results", TORCH_BOX(&seq2seq_fast::decode_results));
}
