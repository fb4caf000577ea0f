// See readout.h.
#include "readout.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace seq2seq_fast {

// The first of the largest, perturbed.
static int32_t drawn_of(const std::vector<int32_t>& tokens, std::vector<float> values,
                        const Draw& draw) {
  loops.perturb_some(draw, tokens.data(), values.data(), static_cast<int64_t>(tokens.size()),
                     values.data());
  return tokens[std::max_element(values.begin(), values.end()) - values.begin()];
}

constexpr int64_t kMostChunk = 4;  // panels

// What rounding can add to a difference of such numbers.
static float slack(float a, float b) { return 1e-6f * (std::abs(a) + b); }

PackedReadout::PackedReadout(const PackedTensor* x, int64_t V)
    : matrix(x[0], x[1]),
      bias(floats(x[2])),
      weights(x[kTensors - 1].data),
      V(V),
      chunk_panels(matrix.panels >= 64 ? kMostChunk : 1),
      chunks((matrix.panels + chunk_panels - 1) / chunk_panels),
      six(x + 3, chunk_panels),
      sixteen(x + 3 + PackedScreen::kTensors, chunk_panels) {
  const PackedTensor& w = x[kTensors - 1];
  for (const PackedScreen* screen : {&six, &sixteen})
    STD_TORCH_CHECK(
        screen->panels == 0 ||
            (screen->panels == matrix.panels && screen->parts[0].width == matrix.width &&
             w.numel() == V * matrix.K && w.type == x[0].type && matrix.type != Weights::kInt8),
        "expected few bits, bounds and rows of the readout's weights");
  STD_TORCH_CHECK(
      sixteen.panels == 0 ||
          (sixteen.parts[0].of_sixteen() &&
           sixteen.parts[0].rows_of_numbers() == round_up(matrix.K, 2) && six.panels > 0),
      "expected sixteen bits of all of the readout's weights");
}

void PackedReadout::logits_at(const Operand* operands, int64_t row, const int32_t* tokens,
                              int64_t n, float* out) const {
  if (matrix.type == Weights::kFloat)
    loops.dots(operands, row, static_cast<const float*>(weights), matrix.K, tokens, n, bias, out);
  else
    loops.dots_half(operands, row, static_cast<const uint16_t*>(weights), matrix.K, tokens, n, bias,
                    out);
}

float PackedReadout::excess(const Operand* operands, int64_t row,
                            const std::vector<int32_t>& tokens, const float* near,
                            float top) const {
  const auto n = static_cast<int64_t>(tokens.size());
  if (matrix.type == Weights::kFloat)
    return loops.excess(operands, row, static_cast<const float*>(weights), matrix.K, tokens.data(),
                        n, bias, near, top);
  return loops.excess_half(operands, row, static_cast<const uint16_t*>(weights), matrix.K,
                           tokens.data(), n, bias, near, top);
}

Normaliser::Normaliser(const Peak* peaks, int64_t chunks) : top(-INFINITY), log_sum(0) {
  double sum = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    if (peaks[i].top != peaks[i].top) {
      top = log_sum = NAN;
      return;
    }
    top = std::max(top, double{peaks[i].top});
  }
  for (int64_t i = 0; i < chunks; ++i)
    if (peaks[i].top > -INFINITY) sum += peaks[i].sum * std::exp(peaks[i].top - top);
  log_sum = std::log(sum);
}

Readout::Readout(const PackedReadout& packed, int64_t most, const Tensor* values,
                 const ProjectedValues& projected)
    : packed_(packed),
      projected_(projected),
      six_(packed.six, most, values),
      sixteen_(packed.sixteen, most, nullptr),
      logits_(most * packed.ld()),
      peaks_(most * packed.chunks),
      near_(packed.six.panels > 0 ? most * packed.chunks : 0),
      least_(most),
      near_rows_(most) {}

void Readout::run(const StepRows& rows, int64_t n, Made wanted, const StepsLeft& left,
                  const std::function<void(int64_t chunk)>& beside) {
  rows_ = rows, made_ = wanted, screen_ = nullptr;
  if (wanted == Made::kToken && packed_.six.panels > 0 && loops.bytes.seek) screen_ = &six_;
  if (wanted == Made::kScores && packed_.makes_scores()) screen_ = &sixteen_;
  if (!screen_) {
    made_ = Made::kLogits;
    return make_all(n, beside);
  }
  screen_->prepare(left);
  if (!make_near(n, beside)) make_all(n, beside);
}

void Readout::make_all(int64_t n, const std::function<void(int64_t chunk)>& beside) {
  const int64_t ld = packed_.ld();
  const Factor features(packed_.matrix, n, rows_.hidden, projected_ ? Operand() : rows_.context);
  over_chunks(n, [&](int64_t chunk) {
    const int64_t v = chunk * packed_.chunk_width();
    packed_.over_panels(chunk, logits_ + v, ld, [&](int64_t p, Sums to) {
      if (projected_) to.soon = projected_.of_panel(p);
      features.multiply(p, 0, n, to);
      if (projected_) projected_.add(rows_.to, p, 0, n, {to.out, ld, to.out, ld});
    });
    for (int64_t m = 0; m < n; ++m) meet(m, chunk);
    beside(chunk);
  });
}

// All logits of the rows whose near ones do not tell; values are projected for no near ones.
void Readout::make_others(int64_t n) {
  std::vector<int64_t> others;
  for (int64_t m = 0; m < n; ++m)
    if (!near_rows_[m]) others.push_back(m);
  const auto count = static_cast<int64_t>(others.size());
  if (count == 0) return;
  const int64_t K = packed_.matrix.K, width = packed_.chunk_width();
  const Buffer<float> rows(count * K);
  for (int64_t i = 0; i < count; ++i) {
    float* to = rows + i * K;
    for (const Operand* x : {&rows_.hidden, &rows_.context})
      to = std::copy_n(x->x + others[i] * x->ld, x->K, to);
  }
  const Factor features(packed_.matrix, count, {rows, K, K});
  over_chunks(count, [&](int64_t chunk) {
    const Buffer<float> made(count * width);
    packed_.over_panels(chunk, made, width,
                        [&](int64_t p, const Sums& to) { features.multiply(p, 0, count, to); });
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(made + i * width, packed_.count(chunk), logits(others[i]) + chunk * width);
      meet(others[i], chunk);
    }
  });
}

void Readout::meet(int64_t m, int64_t chunk) {
  peaks_[m * packed_.chunks + chunk] =
      loops.peak(logits(m) + chunk * packed_.chunk_width(), packed_.count(chunk));
}

void Readout::over_chunks(int64_t rows, const std::function<void(int64_t chunk)>& f) const {
  over_pieces(packed_.chunks, packed_.chunk_panels * packed_.matrix.operations(rows), rows, false,
              f);
}

// Whether they tell of any row.
bool Readout::make_near(int64_t n, const std::function<void(int64_t chunk)>& beside) {
  const ScreenStep step(*screen_, rows_, n);
  bool any = false;
  for (int64_t m = 0; m < n; ++m) {
    near_rows_[m] = screen_->tells(m);
    any |= near_rows_[m] != 0;
    least_[m] = -INFINITY;
  }
  if (!any) {
    made_ = Made::kLogits;
    return false;
  }
  const int64_t work = packed_.chunk_panels * packed_.matrix.operations(n);
  parallel_in_turns(packed_.chunks, work, [&](int64_t chunk) {
    const int64_t v = chunk * packed_.chunk_width();
    packed_.over_panels(chunk, logits_ + v, packed_.ld(),
                        [&](int64_t p, const Sums& to) { step.panel(p, to); });
    for (int64_t m = 0; m < n; ++m) note(m, chunk);
    beside(chunk);
  });
  for (int64_t m = 0; m < n; ++m) {
    const float most = least(m);
    if (!(most > -INFINITY && most < INFINITY)) near_rows_[m] = 0;
  }
  make_others(n);
  return true;
}

// A chunk's logits are made, and still in the cache.
void Readout::note(int64_t m, int64_t chunk) {
  const int64_t first = chunk * packed_.chunk_width(), count = packed_.count(chunk);
  const float* x = logits(m) + first;
  Near& to = near(m)[chunk];
  if (made_ == Made::kScores) {
    Peak& peak = peaks_[m * packed_.chunks + chunk];
    peak = loops.peak(x, count);
    to.top = peak.top;
  } else {
    to.top = loops.top(x, count);
  }
  to.bound = screen_->bound(m, chunk);
  // Another thread's may come in between: any of them is one that the largest is not below.
  float least = least_[m].load(std::memory_order_relaxed);
  if (to.top - to.bound > least)
    least_[m].store(least = to.top - to.bound, std::memory_order_relaxed);
  const float threshold = least - to.bound - slack(least, to.bound);
  int32_t places[kMostChunk * kPanel];
  // A bound that is not finite is found out later.
  const int64_t n = to.top > threshold ? loops.above(x, count, threshold, places) : 0;
  to.count = static_cast<int32_t>(std::min<int64_t>(n, Near::kMany));
  for (int64_t i = 0; i < n && n <= Near::kMost; ++i)
    to.tokens[i] = static_cast<int32_t>(first + places[i]), to.values[i] = x[places[i]];
}

// What the largest logit is not below.
float Readout::least(int64_t m) const {
  float least = -INFINITY;
  for (int64_t i = 0; i < packed_.chunks; ++i)
    least = std::max(least, near(m)[i].top - near(m)[i].bound);
  return least;
}

// The smallest part of the sum of exp(logit) that a token may have and be made of floats. What
// rounding takes from a near logit is some three sqrt(K) times less than its bound, which all of it
// would have to point one way for; a sum of parts p that each are off by that is off by
// sqrt(sum p^2) of it. Where that is little, so is what is left.
float Readout::small_part(int64_t m) const {
  constexpr float kLeast = 0x1p-11f, kMost = 0x1p-9f, kOff = 1.5e-6f;
  float bound = 0;
  for (int64_t i = 0; i < packed_.chunks; ++i) bound = std::max(bound, near(m)[i].bound);
  const float part = kOff * 3 / bound;
  return std::clamp(part * part * static_cast<float>(packed_.matrix.K), kLeast, kMost);
}

// The sum of exp(logit) over all tokens, most of which have their near logits. How far each is off
// has little to do with how far another is, and the sum over many hides it; those that are no small
// part of it are made of floats, large ones to the very bits that they have where they are chosen,
// so that a certain token is certain.
Normaliser Readout::normaliser(int64_t m) const {
  constexpr float kLargePart = 0x1p-5f;
  const Normaliser near(peaks(m), packed_.chunks);
  if (made_ != Made::kScores || !sought(m)) return near;
  const auto above = [&](float part) {
    const auto least = static_cast<float>(near.top + near.log_sum + std::log(part));
    std::vector<int32_t> tokens;
    for (int64_t i = 0; i < packed_.chunks; ++i)
      if (peaks(m)[i].top > least) add_above(logits(m), i, least, tokens);
    return tokens;
  };
  std::vector<int32_t> tokens = above(small_part(m));
  if (tokens.empty()) return near;
  const std::vector<int32_t> large = above(kLargePart);
  const std::vector<float> values = exact(m, large);
  std::erase_if(
      tokens, [&](int32_t token) { return std::binary_search(large.begin(), large.end(), token); });
  const Operand operands[kOperands] = {rows_.hidden, rows_.context};
  double sum = std::exp(near.log_sum) +
               packed_.excess(operands, m, tokens, logits(m), static_cast<float>(near.top));
  for (size_t i = 0; i < large.size(); ++i) {
    const double before = logits(m)[large[i]];
    sum += std::exp(before - near.top) * std::expm1(values[i] - before);
  }
  const double log_sum = std::log(sum);
  if (large.empty()) return {near.top, log_sum};
  const double top = *std::max_element(values.begin(), values.end());
  return {top, std::max(log_sum + near.top - top, 0.)};  // exp(top) itself is in it
}

bool Readout::finite(int64_t m) const {
  return std::all_of(peaks(m), peaks(m) + packed_.chunks,
                     [](const Peak& p) { return p.top < INFINITY; });
}

void Readout::bar(int64_t m, int64_t token) {
  float& logit = logits(m)[token];
  const float before = std::exchange(logit, -INFINITY);
  if (!sought(m)) return;
  const int64_t chunk = token / packed_.chunk_width();
  Near& of = near(m)[chunk];
  if (before == of.top) {  // others were left out for it
    of.top = loops.top(logits(m) + chunk * packed_.chunk_width(), packed_.count(chunk));
    for (int64_t i = 0; i < packed_.chunks; ++i) near(m)[i].count = Near::kMany;
  }
  for (int32_t i = 0; i < std::min(of.count, Near::kMost); ++i)
    if (of.tokens[i] == token) of.values[i] = -INFINITY;
}

int32_t Readout::most_probable(int64_t m) const {
  if (sought(m)) return find(m);
  Peak best = peaks(m)[0];
  for (int64_t i = 1; i < packed_.chunks; ++i) {
    Peak p = peaks(m)[i];
    p.index += static_cast<int32_t>(i * packed_.chunk_width());
    if (best.top == best.top && !(p.top <= best.top)) best = p;
  }
  return best.index;
}

void Readout::add_above(const float* values, int64_t chunk, float threshold,
                        std::vector<int32_t>& tokens) const {
  const int64_t first = chunk * packed_.chunk_width(), count = packed_.count(chunk);
  const auto before = static_cast<int64_t>(tokens.size());
  tokens.resize(before + count);
  int32_t* const added = tokens.data() + before;
  const int64_t n = loops.above(values + first, count, threshold, added);
  for (int64_t i = 0; i < n; ++i) added[i] += static_cast<int32_t>(first);
  tokens.resize(before + n);
}

std::vector<int32_t> Readout::largest(int64_t m) const {
  const float most = least(m);
  std::vector<int32_t> found;
  for (int64_t i = 0; i < packed_.chunks; ++i) {
    const Near& of = near(m)[i];
    // Either all are barred, or numbers are so large that any may be the largest.
    const float threshold = most == -INFINITY ? most : most - of.bound - slack(most, of.bound);
    if (!(of.top > threshold)) continue;
    if (of.count == Near::kMany) add_above(logits(m), i, threshold, found);
    for (int32_t j = 0; j < of.count && of.count <= Near::kMost; ++j)
      if (of.values[j] > threshold) found.push_back(of.tokens[j]);
  }
  return found.empty() ? std::vector<int32_t>{0} : found;
}

std::vector<float> Readout::exact(int64_t m, const std::vector<int32_t>& tokens) const {
  std::vector<float> found(tokens.size());
  if (!sought(m)) {
    for (size_t i = 0; i < tokens.size(); ++i) found[i] = logits(m)[tokens[i]];
    return found;
  }
  const Operand operands[kOperands] = {rows_.hidden, rows_.context};
  packed_.logits_at(operands, m, tokens.data(), static_cast<int64_t>(tokens.size()), found.data());
  return found;
}

int32_t Readout::find(int64_t m) const {
  const std::vector<int32_t> tokens = largest(m);
  if (tokens.size() == 1) return tokens[0];
  const std::vector<float> values = exact(m, tokens);
  return tokens[std::max_element(values.begin(), values.end()) - values.begin()];
}

// A block's logits are off by the larger bound of its chunks, and perturbed ones by scale times
// that and by roundings of numbers as large as kMostPerturbed.
int32_t Readout::find_drawn(int64_t m, const Draw& draw) const {
  const int64_t V = packed_.V, width = packed_.chunk_width();
  const int64_t blocks = (V + kRandomBlock - 1) / kRandomBlock;
  std::vector<float> values(V), tops(blocks), off(blocks);
  float most = -INFINITY;  // what the largest is not below
  const auto threshold = [&](int64_t i) {
    return most == -INFINITY ? most : most - off[i] - slack(most, off[i] + kMostPerturbed);
  };
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = i * kRandomBlock, count = std::min(kRandomBlock, V - first);
    for (int64_t chunk = first / width; chunk <= (first + count - 1) / width; ++chunk)
      off[i] = std::max(off[i], draw.scale * near(m)[chunk].bound);
    tops[i] = loops.perturb(draw, i, logits(m) + first, count, threshold(i), &values[first]);
    most = std::max(most, tops[i] - off[i]);
  }
  std::vector<int32_t> tokens, places(kRandomBlock);
  for (int64_t i = 0; i < blocks; ++i) {
    if (!(tops[i] > threshold(i))) continue;
    const int64_t first = i * kRandomBlock;
    const int64_t n =
        loops.above(&values[first], std::min(kRandomBlock, V - first), threshold(i), places.data());
    for (int64_t j = 0; j < n; ++j) tokens.push_back(static_cast<int32_t>(first + places[j]));
  }
  if (tokens.size() <= 1) return tokens.empty() ? 0 : tokens[0];
  return drawn_of(tokens, exact(m, tokens), draw);
}

int32_t Readout::drawn(int64_t m, const Sampling& sampling, const Draw& draw) {
  const int64_t V = packed_.V;
  if (!sought(m) && !finite(m)) {  // though what is not may have been barred
    const Peak first = loops.peak(logits(m), V);
    if (!(first.top < INFINITY)) return first.index;
  }
  if (sought(m) && !sampling.cuts(V)) return find_drawn(m, draw);
  if (sought(m)) {
    const std::vector<int32_t> tokens = among_largest(m, sampling.top_k);
    std::vector<float> values = exact(m, tokens);
    cut(sampling, values.data(), static_cast<int64_t>(values.size()));
    return drawn_of(tokens, values, draw);
  }
  if (sampling.cuts(V)) cut(sampling, logits(m), V);
  return seq2seq_fast::drawn(logits(m), V, draw);
}

std::vector<int32_t> Readout::among_largest(int64_t m, int64_t k) const {
  const int64_t V = packed_.V, width = packed_.chunk_width();
  const float* x = logits(m);
  std::vector<float> lowest(V);  // what the logits are not below
  for (int64_t i = 0; i < packed_.chunks; ++i) {
    const float off = near(m)[i].bound;
    for (int64_t v = i * width; v < i * width + packed_.count(i); ++v) lowest[v] = x[v] - off;
  }
  const float kth = kth_largest(lowest.data(), V, k);
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < packed_.chunks; ++i) {
    const float off = near(m)[i].bound;
    add_above(x, i, kth - off - slack(kth, off), tokens);
  }
  return tokens.empty() ? std::vector<int32_t>{0} : tokens;
}

}  // namespace seq2seq_fast
