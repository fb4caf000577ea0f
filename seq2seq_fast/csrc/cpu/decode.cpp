// Greedy decoding, sampling and beam search over DecoderStep, as seq2seq_fast/decoding/stepwise.py
// has them.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../interrupt.h"
#include "decode_step.h"

namespace seq2seq_fast {
namespace {

struct Options {
  int64_t bos, eos, fill, min_length, beam_size, n_best, no_repeat_ngram, n_samples;
  double length_penalty, coverage_penalty;
  bool keep_weights, keep_scores;  // beam search needs scores all the same
  std::optional<Sampling> sampling;
};

// A live hypothesis after a step: its last token and the row of the step that it went on from.
struct Node {
  int32_t token, parent;
};

// A hypothesis that has ended: the step, row and token of its last node.
struct Ended {
  int64_t length;
  int32_t parent, token;
  double log_prob, score;
  bool finished;
};

double length_penalty(int64_t length, double alpha) {
  return std::pow((5 + static_cast<double>(length)) / 6, alpha);
}

struct Candidate {
  double log_prob;
  int32_t row, token;
};

// The hypotheses of one source, or one of its draws.
struct Search {
  int64_t limit;
  int32_t first = 0, count = 1;  // its rows of the step
  std::vector<double> log_probs = {0};
  std::vector<Ended> ended;
  std::vector<Candidate> next;  // what lives on; rows as those of the step
};

class Engine {
 public:
  Engine(const Options& options, const PackedDecoder& model, const DecoderSource& source,
         DecoderStep& step, int64_t B, int64_t max_length, const std::optional<Tensor>& limits,
         const std::optional<Tensor>& prefix, const std::optional<Tensor>& bos)
      : o_(options),
        model_(model),
        source_(source),
        step_(step),
        B_(B * options.n_samples),
        P_(prefix ? prefix->size(1) : 0),
        prefix_(prefix ? static_cast<const int64_t*>(prefix->data_ptr()) : nullptr),
        searches_(B_),
        sums_(B_),
        late_(model.readout, step.features(0).K, sums_) {
    for (int64_t b = 0; b < B_; ++b) {
      const auto source = static_cast<int32_t>(b / o_.n_samples);
      searches_[b].limit =
          limits ? static_cast<const int64_t*>(limits->data_ptr())[source] : max_length;
      most_ = std::max(most_, searches_[b].limit);
      searches_[b].first = static_cast<int32_t>(b);
      const int64_t token = bos ? static_cast<const int64_t*>(bos->data_ptr())[source] : o_.bos;
      STD_TORCH_CHECK(model.has(token), "expected bos of the vocabulary");
      live_.push_back({source, source, static_cast<int32_t>(token)});
    }
    least_ = std::min(o_.min_length, most_);
  }

  void run() {
    std::vector<int32_t> going(B_);
    for (int64_t b = 0; b < B_; ++b) going[b] = static_cast<int32_t>(b);
    while (!live_.empty()) {
      STD_TORCH_CHECK(!interrupted(), "interrupted by a signal");
      const auto rows = static_cast<int64_t>(live_.size());
      step_.run(live_, {least_ - t_, most_ - t_}, wanted(rows));
      keep_weights();
      if (scores_come_late())
        late_.make_room(rows);
      else
        late_.flush();  // sums go on in the order of steps
      parallel(static_cast<int64_t>(going.size()), o_.beam_size * (model_.V / 4 + 1000),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) go_on(going[i]);
               });
      ++t_;
      next_step(going);
    }
    if (greedy_) settle();
  }

  std::vector<Tensor> results(const Tensor& like) const;

 private:
  void go_on(int32_t b);
  void bar(int32_t m) const;
  int32_t choose(int32_t b, int32_t m) const;
  Made wanted(int64_t rows) const;
  bool scores_come_late() const { return o_.keep_scores && step_.readout().made() == Made::kToken; }
  void take(int32_t b);
  void settle();
  void force(Search& search, int32_t token);
  int32_t source(int32_t b) const { return static_cast<int32_t>(b / o_.n_samples); }
  int32_t forced(int32_t b) const { return static_cast<int32_t>(prefix_[source(b) * P_ + t_]); }
  void beam(int32_t b);
  std::vector<Candidate> best(int32_t b) const;
  void end(int32_t b, const Candidate& last, bool finished);
  bool complete(const Search& search) const;
  void keep_weights();
  void next_step(std::vector<int32_t>& going);
  double coverage(int32_t b, int32_t m) const;

  const Options& o_;
  const bool greedy_ = o_.beam_size == 1;  // or it draws: one hypothesis of each source
  const PackedDecoder& model_;
  const DecoderSource& source_;
  DecoderStep& step_;
  const int64_t B_, P_;           // searches
  const int64_t* prefix_;         // (sources, P)
  int64_t t_ = 0;                 // steps that are behind
  int64_t least_ = 0, most_ = 0;  // steps that there are, or may be
  std::vector<Search> searches_;
  std::vector<double> sums_;  // of greedy decoding: each search's log-probability
  LateLogProbs late_;
  std::vector<Live> live_;
  std::vector<std::vector<Node>> nodes_;     // of each step
  std::vector<std::vector<float>> weights_;  // of each step, (rows, S)
};

Made Engine::wanted(int64_t rows) const {
  if (o_.sampling && !o_.sampling->seeks(model_.V)) return Made::kLogits;
  // What reads fewer weights is quicker for few rows, whose scores can come late.
  const bool at_once = !greedy_ || (o_.keep_scores && rows > kFewRows);
  return at_once ? Made::kScores : Made::kToken;
}

// A search's continuations by one token, and whether it goes on: `next` is empty if not.
void Engine::go_on(int32_t b) {
  Search& search = searches_[b];
  search.next.clear();
  if (greedy_)
    take(b);
  else if (t_ < P_)
    force(search, forced(b));
  else
    beam(b);
  if (t_ + 1 == search.limit) {
    for (const Candidate& last : search.next) end(b, last, false);
    search.next.clear();
  }
  if (complete(search)) search.next.clear();
}

// Greedy decoding goes on with a token. What has ended gets its scores from `settle`.
void Engine::take(int32_t b) {
  Search& search = searches_[b];
  const int32_t m = search.first;
  const Readout& readout = step_.readout();
  const bool late = scores_come_late(), now = o_.keep_scores && !late;
  const auto normaliser = now ? std::optional(readout.normaliser(m)) : std::nullopt;
  const int32_t token = t_ < P_ ? forced(b) : choose(b, m);
  if (late) late_.add(m, b, token, step_.features(0), step_.features(1), m);
  if (now) sums_[b] += normaliser->log_prob(readout.logit(m, token));
  const Candidate next = {0, m, token};
  if (token == o_.eos)
    end(b, next, true);
  else
    search.next.push_back(next);
}

void Engine::settle() {
  late_.flush();
  for (int64_t b = 0; b < B_; ++b)
    for (Ended& e : searches_[b].ended) {
      e.log_prob = sums_[b];
      e.score += e.log_prob / length_penalty(e.length, o_.length_penalty);
    }
}

// Beam search goes on with a token of the prefix, which may be impossible.
void Engine::force(Search& search, int32_t token) {
  const int32_t m = search.first;
  const Readout& readout = step_.readout();
  const double log_prob =
      search.log_probs[0] + readout.normaliser(m).log_prob(readout.logit(m, token));
  if (log_prob > -INFINITY) search.next.push_back({log_prob, m, token});
}

// Sets the logits of what must not follow to -inf.
void Engine::bar(int32_t m) const {
  Readout& readout = step_.readout();
  if (t_ + 1 < o_.min_length) readout.bar(m, o_.eos);
  const int64_t n = o_.no_repeat_ngram;
  if (n == 0 || t_ < n) return;
  std::vector<int32_t> history(t_);
  for (int64_t t = t_ - 1, at = m; t >= 0; at = nodes_[t--][at].parent)
    history[t] = nodes_[t][at].token;
  const auto last = history.end() - (n - 1);
  for (auto gram = history.begin(); gram + n <= history.end(); ++gram)
    if (std::equal(last, history.end(), gram)) readout.bar(m, gram[n - 1]);
}

// The most probable token of what may follow, or one that is drawn of it; eos where nothing may.
int32_t Engine::choose(int32_t b, int32_t m) const {
  Readout& readout = step_.readout();
  float* logits = readout.logits(m);
  const float eos = logits[o_.eos];
  bar(m);
  int32_t best;
  if (o_.sampling) {
    best = readout.drawn(m, *o_.sampling,
                         {o_.sampling->seed, static_cast<uint32_t>(b), static_cast<uint32_t>(t_),
                          o_.sampling->scale});
  } else {
    best = readout.most_probable(m);
  }
  if (logits[best] != -INFINITY) return best;  // most often, without another look at all logits
  const Peak left = loops.peak(logits, model_.V);
  if (left.top != -INFINITY) return left.index;
  logits[o_.eos] = eos;
  return o_.eos;
}

// The 2 K best continuations, of K hypotheses: at most K of them end, so that K go on. Among equals
// the first row and the first token come first. Near logits tell which ones may be among them.
std::vector<Candidate> Engine::best(int32_t b) const {
  const Search& search = searches_[b];
  const size_t most = 2 * o_.beam_size;
  const PackedReadout& packed = model_.readout;
  const Readout& readout = step_.readout();
  std::vector<Candidate> may_be;  // log-probabilities as they are at most
  std::vector<double> least;      // the largest of what they are at least, descending
  least.reserve(most + 1);
  std::vector<Normaliser> normalisers;
  std::vector<int32_t> places(packed.chunk_width());
  for (int32_t k = 0; k < search.count; ++k) {
    const int32_t m = search.first + k;
    const float* logits = readout.logits(m);
    const Normaliser& r = normalisers.emplace_back(readout.normaliser(m));
    const double so_far = search.log_probs[k];
    choose(b, m);  // for what it bars: one token at least is left
    for (int64_t chunk = 0; chunk < packed.chunks; ++chunk) {
      const int64_t v = chunk * packed.chunk_width();
      const double off = readout.off(m, chunk);
      double enough = least.size() < most ? -INFINITY : least.back();
      // Below what is enough by more than rounding; `log_prob` decides on what is left.
      const double logit = enough - so_far + r.log_sum + r.top - off;
      const auto threshold =
          static_cast<float>(logit - 1e-6 * (1 + off + std::abs(logit) + std::abs(r.top)));
      if (!(readout.peaks(m)[chunk].top > threshold)) continue;
      const int64_t found = loops.above(logits + v, packed.count(chunk), threshold, places.data());
      for (int64_t i = 0; i < found; ++i) {
        const auto token = static_cast<int32_t>(v + places[i]);
        const double near = so_far + r.log_prob(logits[token]);
        const double margin = off > 0 ? off + 1e-6 * (off + std::abs(near - so_far)) : 0;
        if (!(near + margin >= enough)) continue;
        may_be.push_back({near + margin, m, token});
        auto at = least.end();
        while (at != least.begin() && at[-1] < near - margin) --at;
        least.insert(at, near - margin);
        if (least.size() > most) least.pop_back();
        if (least.size() == most) enough = least.back();
      }
    }
  }
  if (least.size() == most)
    std::erase_if(may_be, [&](const Candidate& c) { return c.log_prob < least.back(); });
  std::vector<int32_t> tokens;
  for (auto at = may_be.begin(), row = at; at != may_be.end(); row = at) {
    tokens.clear();
    for (; at != may_be.end() && at->row == row->row; ++at) tokens.push_back(at->token);
    const std::vector<float> logits = readout.exact(row->row, tokens);
    const int64_t k = row->row - search.first;
    for (const float logit : logits)
      (row++)->log_prob = search.log_probs[k] + normalisers[k].log_prob(logit);
  }
  std::stable_sort(may_be.begin(), may_be.end(),
                   [](const Candidate& a, const Candidate& c) { return a.log_prob > c.log_prob; });
  if (may_be.size() > most) may_be.resize(most);
  return may_be;
}

void Engine::beam(int32_t b) {
  Search& search = searches_[b];
  const std::vector<Candidate> candidates = best(b);
  for (size_t rank = 0; rank < candidates.size(); ++rank) {
    const bool room = rank < static_cast<size_t>(o_.beam_size);
    if (candidates[rank].token != o_.eos) {
      if (search.next.size() < static_cast<size_t>(o_.beam_size))
        search.next.push_back(candidates[rank]);
    } else if (room) {
      end(b, candidates[rank], true);
    }
  }
}

// cp of Wu et al. 2016
double Engine::coverage(int32_t b, int32_t m) const {
  if (o_.coverage_penalty == 0) return 0;
  double sum = 0;
  for (int64_t s = 0; s < source_.S; ++s)
    if (source_.attended(source(b), s)) {
      const float least = 1.17549435e-38f;  // of the normal numbers
      sum += std::log(static_cast<double>(std::clamp(step_.covered(m)[s], least, 1.f)));
    }
  return o_.coverage_penalty * sum;
}

// Among equals those that were there come first, and finished ones before all others.
void Engine::end(int32_t b, const Candidate& last, bool finished) {
  const double score =
      last.log_prob / length_penalty(t_ + 1, o_.length_penalty) + coverage(b, last.row);
  std::vector<Ended>& ended = searches_[b].ended;
  auto at = ended.end();
  while (at != ended.begin() && (at[-1].finished == finished ? at[-1].score < score : finished))
    --at;
  ended.insert(at, {t_ + 1, last.row, last.token, last.log_prob, score, finished});
  if (ended.size() > static_cast<size_t>(o_.n_best)) ended.pop_back();
}

// Whether nothing that lives can come among the best; see stepwise.py.
bool Engine::complete(const Search& search) const {
  const std::vector<Ended>& ended = search.ended;
  if (search.next.empty() || ended.size() < static_cast<size_t>(o_.n_best)) return false;
  const double bound = search.next[0].log_prob / length_penalty(search.limit, o_.length_penalty);
  return ended.back().finished && ended.back().score >= bound;
}

void Engine::keep_weights() {
  if (!o_.keep_weights) return;
  const auto rows = static_cast<int64_t>(live_.size());
  std::vector<float>& kept = weights_.emplace_back(rows * source_.S);
  for (int64_t m = 0; m < rows; ++m)
    std::copy_n(step_.weights(m), source_.S, kept.data() + m * source_.S);
}

// The rows of the next step: those of each search side by side, searches that are over left out.
void Engine::next_step(std::vector<int32_t>& going) {
  std::vector<Live> live;
  std::vector<Node>& nodes = nodes_.emplace_back();
  std::erase_if(going, [&](int32_t b) {
    Search& search = searches_[b];
    search.first = static_cast<int32_t>(live.size());
    search.count = static_cast<int32_t>(search.next.size());
    search.log_probs.clear();
    for (const auto& [log_prob, row, token] : search.next) {
      live.push_back({source(b), row, token});
      nodes.push_back({token, row});
      search.log_probs.push_back(log_prob);
    }
    return search.count == 0;
  });
  live_ = std::move(live);
}

std::vector<Tensor> Engine::results(const Tensor& like) const {
  const int64_t N = o_.n_best, S = source_.S;
  int64_t n = 0;
  for (const Search& search : searches_)
    for (const Ended& e : search.ended) n = std::max(n, e.length);
  // Of beam search (B, N, ...), else (B, ...), with B the searches
  const auto results_of = [&](std::vector<int64_t> sizes, ScalarType type) {
    if (o_.beam_size > 1) sizes.insert(sizes.begin(), N);
    sizes.insert(sizes.begin(), B_);
    return empty(like, sizes, type);
  };
  Tensor tokens = results_of({n}, ScalarType::Long), lengths = results_of({}, ScalarType::Long);
  Tensor log_probs = results_of({}, ScalarType::Float), scores = results_of({}, ScalarType::Float);
  Tensor finished = results_of({}, ScalarType::Bool);
  Tensor weights = o_.keep_weights ? results_of({n, S}, ScalarType::Float) : empty(like, {0});
  auto* token = static_cast<int64_t*>(tokens.data_ptr());
  auto* w = static_cast<float*>(weights.data_ptr());
  std::fill_n(token, B_ * N * n, o_.fill);
  if (o_.keep_weights) std::fill_n(w, B_ * N * n * S, 0.f);
  for (int64_t b = 0; b < B_; ++b)
    for (int64_t i = 0; i < N; ++i, token += n, w += n * S) {
      const std::vector<Ended>& ended = searches_[b].ended;
      const bool there = i < static_cast<int64_t>(ended.size());
      const Ended e = there ? ended[i] : Ended{0, 0, 0, -INFINITY, -INFINITY, false};
      static_cast<int64_t*>(lengths.data_ptr())[b * N + i] = e.length;
      static_cast<float*>(log_probs.data_ptr())[b * N + i] = static_cast<float>(e.log_prob);
      static_cast<float*>(scores.data_ptr())[b * N + i] = static_cast<float>(e.score);
      static_cast<bool*>(finished.data_ptr())[b * N + i] = e.finished;
      Node node = {e.token, e.parent};
      for (int64_t t = e.length - 1; t >= 0; --t) {
        token[t] = node.token;
        if (o_.keep_weights) std::copy_n(weights_[t].data() + node.parent * S, S, w + t * S);
        if (t > 0) node = nodes_[t - 1][node.parent];
      }
    }
  return {tokens, lengths, log_probs, scores, finished, weights};
}

PackedDecoder model_of(const Tensor& packed, const Tensor& layout, const std::string& cell_type,
                       bool query_after, const std::vector<int64_t>& vector, const Tensor& hidden,
                       const DecoderSource& from) {
  STD_TORCH_CHECK(vector.empty() || (vector.size() == 2 && vector[0] > 0),
                  "expected the width of attentional vectors, and whether they are tanh's");
  PackedDecoder model(packed_tensors(packed, layout), cell_type, query_after, vector);
  STD_TORCH_CHECK(model.fits(hidden.size(2), from.D, from.A, from.attends()),
                  "expected states and a source of the decoder's widths");
  return model;
}

Sampling sampling_of(const Tensor& seed, double temperature, int64_t top_k, double top_p) {
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long,
                  "expected a seed of one int64");
  // No temperature makes 0 of a logit of -inf, nor infinity of two that differ.
  const auto scale = static_cast<float>(std::clamp(1 / temperature, 1e-20, 1e20));
  return {static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr())), scale, top_k,
          top_p};
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// whole: bos, eos, fill, min_length, beam_size, n_best, no_repeat_ngram, n_samples; bos (B,) in its
// place. Results of draws are (B * n_samples, ...).
Outputs decode(Tensor packed, Tensor layout, std::string cell_type, bool query_after, Tensor hidden,
               Tensor cell, std::optional<Tensor> context, std::vector<Tensor> source,
               std::optional<Tensor> mask, std::optional<Tensor> limits,
               std::optional<Tensor> prefix, int64_t max_length, std::vector<int64_t> whole,
               double length_penalty, double coverage_penalty, bool return_weights,
               bool return_scores, bool project_values, std::optional<Tensor> seed,
               double temperature, int64_t top_k, double top_p, std::vector<int64_t> accumulates,
               std::vector<int64_t> vector, std::optional<Tensor> bos) {
  const int64_t B = hidden.size(1);
  STD_TORCH_CHECK(whole.size() == 8, "expected 8 numbers");
  for (const auto& x : {limits, prefix, bos})
    STD_TORCH_CHECK(
        !x || (x->scalar_type() == ScalarType::Long && x->is_contiguous() && x->size(0) == B),
        "expected int64 limits (B,), prefix (B, P) and bos (B,)");
  const auto sampling =
      seed ? std::optional(sampling_of(*seed, temperature, top_k, top_p)) : std::nullopt;
  const Options options = {
      whole[0], whole[1],       whole[2],         whole[3],       whole[4],      whole[5], whole[6],
      whole[7], length_penalty, coverage_penalty, return_weights, return_scores, sampling};
  const int64_t each = options.beam_size * options.n_samples;  // rows of a source
  STD_TORCH_CHECK(options.n_samples >= 1 && (options.n_samples == 1 || options.beam_size == 1) &&
                      each <= INT32_MAX / std::max<int64_t>(B, 1),
                  "expected draws or beams of each source, in all less than 2^31");
  const DecoderSource from(source, mask, vector.empty() ? context : std::nullopt, B, accumulates);
  const PackedDecoder model =
      model_of(packed, layout, cell_type, query_after, vector, hidden, from);
  STD_TORCH_CHECK(model.has(options.bos) && model.has(options.eos),
                  "expected bos and eos of the vocabulary");
  STD_TORCH_CHECK(!project_values || from.attends(), "expected values to project");
  // Whether all logits are needed: of beams, which share their sources, and of draws from the best.
  const bool all = (options.beam_size > 1 && !model.readout.makes_scores()) ||
                   (sampling && !sampling->seeks(model.V));
  const Project project = {project_values && !query_after,
                           project_values && all && model.readout.matrix.type != Weights::kInt8};
  DecoderStep step(model, from, hidden, cell, context, B * each, coverage_penalty > 0, project);
  Engine engine(options, model, from, step, B, max_length, limits, prefix, bos);
  engine.run();
  const auto r = engine.results(hidden);
  return {r[0], r[1], r[2], r[3], r[4], r[5]};
}

// One step of B rows, their tokens (B,): all logits (B, V), states, context or attentional vector,
// weights and location after it.
Outputs decoder_step(Tensor packed, Tensor layout, std::string cell_type, bool query_after,
                     Tensor tokens, Tensor hidden, Tensor cell, std::optional<Tensor> context,
                     std::vector<Tensor> source, std::optional<Tensor> mask,
                     std::vector<int64_t> accumulates, std::vector<int64_t> vector) {
  const int64_t B = hidden.size(1);
  const DecoderSource from(source, mask, vector.empty() ? context : std::nullopt, B, accumulates);
  const PackedDecoder model =
      model_of(packed, layout, cell_type, query_after, vector, hidden, from);
  STD_TORCH_CHECK(tokens.scalar_type() == ScalarType::Long && tokens.is_contiguous() &&
                      tokens.numel() == B && model.context.panels == 0,
                  "expected int64 tokens (B,), and weights that project no values");
  std::vector<Live> live;
  for (int32_t b = 0; b < B; ++b) {
    const int64_t token = static_cast<const int64_t*>(tokens.data_ptr())[b];
    STD_TORCH_CHECK(model.has(token), "expected token ids of the vocabulary");
    live.push_back({b, b, static_cast<int32_t>(token)});
  }
  DecoderStep step(model, from, hidden, cell, context, B, false, {});
  step.run(live, {1, 1}, Made::kLogits);
  const Operand fed = model.O > 0 ? step.vectors() : step.contexts();  // in the next step
  const Tensor logits = empty(hidden, {B, model.V}), after = empty(hidden, {B, fed.K}),
               attention = empty(hidden, {B, from.S}), h = empty(hidden, hidden.sizes()),
               c = empty(cell, cell.sizes()),
               place = from.location ? empty(hidden, from.place.sizes()) : empty(hidden, {0});
  const auto to = [](const Tensor& x) { return static_cast<float*>(x.data_ptr()); };
  parallel(B, model.V / 16, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      std::copy_n(step.readout().logits(b), model.V, to(logits) + b * model.V);
  });
  for (int64_t b = 0; b < B; ++b) {
    std::copy_n(fed.x + b * fed.ld, fed.K, to(after) + b * fed.K);
    std::copy_n(step.weights(b), from.S, to(attention) + b * from.S);
    if (!from.location) continue;
    const int64_t numbers = from.location->state_numbers();
    std::copy_n(step.location(b), numbers, to(place) + b * numbers);
  }
  step.copy_states(B, to(h), to(c));
  return {logits, h, c, after, attention, place};
}

}  // namespace
}  // namespace seq2seq_fast

STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast, CPU, m) {
  m.impl("decode", TORCH_BOX(&seq2seq_fast::decode));
  m.impl("decoder_step", TORCH_BOX(&seq2seq_fast::decoder_step));
}
