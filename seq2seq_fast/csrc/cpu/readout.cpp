// See readout.h.
#include "readout.h"

#include <cmath>

namespace seq2seq_fast {

PackedReadout::PackedReadout(const PackedTensor* x, int64_t V)
    : matrix(x[0], x[1]),
      bias(floats(x[2])),
      weights(x[kTensors - 1].data),
      V(V),
      chunk_panels(matrix.panels >= 64 ? 4 : 1),
      chunks((matrix.panels + chunk_panels - 1) / chunk_panels),
      screen(x + 3, chunk_panels) {
  const PackedTensor& w = x[kTensors - 1];
  STD_TORCH_CHECK(
      screen.panels == 0 ||
          (screen.panels == matrix.panels && screen.parts[0].width == matrix.width &&
           w.numel() == V * matrix.K && w.type == x[0].type && matrix.type != Weights::kInt8),
      "expected int8, bounds and rows of the readout's weights");
}

void PackedReadout::logits_at(const Operand* operands, int64_t row, const int32_t* tokens,
                              int64_t n, float* out) const {
  if (matrix.type == Weights::kFloat)
    loops.dots(operands, row, static_cast<const float*>(weights), matrix.K, tokens, n, bias, out);
  else
    loops.dots_half(operands, row, static_cast<const uint16_t*>(weights), matrix.K, tokens, n, bias,
                    out);
}

Normaliser::Normaliser(const Peak* peaks, int64_t chunks) : top(-INFINITY), log_sum(0) {
  float sum = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    if (peaks[i].top != peaks[i].top) {
      top = log_sum = NAN;
      return;
    }
    top = std::max(top, peaks[i].top);
  }
  for (int64_t i = 0; i < chunks; ++i)
    if (peaks[i].top > -INFINITY) sum += peaks[i].sum * std::exp(peaks[i].top - top);
  log_sum = std::log(sum);
}

Readout::Readout(const PackedReadout& packed, int64_t most, const Tensor* values,
                 const ProjectedValues& projected)
    : packed_(packed),
      projected_(projected),
      screen_(packed.screen, most, values),
      logits_(most * packed.ld()),
      peaks_(most * packed.chunks) {}

bool Readout::seeks(int64_t rows, bool scored) const {
  return packed_.screen.panels > 0 && loops.bytes.seek && (!scored || rows <= kFewRows);
}

void Readout::run(const StepRows& rows, int64_t n, int64_t steps_sought,
                  const std::function<void(int64_t chunk)>& beside) {
  rows_ = rows, sought_ = steps_sought > 0;
  if (!sought_) return make_all(n, beside);
  screen_.prepare(steps_sought);
  make_near(n, beside);
  for (int64_t m = 0; m < n; ++m) sought_ &= screen_.finite(m) && least(m) > -INFINITY;
  if (!sought_) make_all(n, [](int64_t) {});
}

void Readout::make_all(int64_t n, const std::function<void(int64_t chunk)>& beside) {
  const int64_t ld = packed_.ld();
  const Factor features(packed_.matrix, n, rows_.hidden, projected_ ? Operand() : rows_.context);
  const int64_t work = packed_.chunk_panels * packed_.matrix.operations(n);
  over_pieces(packed_.chunks, work, n, false, [&](int64_t chunk) {
    const int64_t v = chunk * packed_.chunk_width();
    packed_.over_panels(chunk, logits_ + v, ld, [&](int64_t p, Sums to) {
      if (projected_) to.soon = projected_.of_panel(p);
      features.multiply(p, 0, n, to);
      if (projected_) projected_.add(rows_.to, p, 0, n, {to.out, ld, to.out, ld});
    });
    for (int64_t m = 0; m < n; ++m)
      peaks_[m * packed_.chunks + chunk] = loops.peak(logits(m) + v, packed_.count(chunk));
    beside(chunk);
  });
}

void Readout::make_near(int64_t n, const std::function<void(int64_t chunk)>& beside) {
  const ScreenStep step(screen_, rows_, n);
  const int64_t work = packed_.chunk_panels * packed_.matrix.operations(n);
  over_pieces(packed_.chunks, work, n, false, [&](int64_t chunk) {
    const int64_t v = chunk * packed_.chunk_width();
    packed_.over_panels(chunk, logits_ + v, packed_.ld(),
                        [&](int64_t p, const Sums& to) { step.panel(p, to); });
    for (int64_t m = 0; m < n; ++m)
      peaks_[m * packed_.chunks + chunk].top = loops.top(logits(m) + v, packed_.count(chunk));
    beside(chunk);
  });
}

// What the largest logit is not below.
float Readout::least(int64_t m) const {
  float least = -INFINITY;
  for (int64_t i = 0; i < packed_.chunks; ++i)
    least = std::max(least, peaks(m)[i].top - screen_.bound(m, i));
  return least;
}

void Readout::bar(int64_t m, int64_t token) {
  logits(m)[token] = -INFINITY;
  if (!sought_) return;
  const int64_t chunk = token / packed_.chunk_width();
  peaks_[m * packed_.chunks + chunk].top =
      loops.top(logits(m) + chunk * packed_.chunk_width(), packed_.count(chunk));
}

int32_t Readout::most_probable(int64_t m) const {
  if (sought_) return find(m);
  Peak best = peaks(m)[0];
  for (int64_t i = 1; i < packed_.chunks; ++i) {
    Peak p = peaks(m)[i];
    p.index += static_cast<int32_t>(i * packed_.chunk_width());
    if (best.top == best.top && !(p.top <= best.top)) best = p;
  }
  return best.index;
}

int32_t Readout::find(int64_t m) const {
  const float most = least(m);
  if (most == -INFINITY) return 0;  // all are barred
  std::vector<int32_t> places(packed_.chunk_width());
  std::vector<int32_t> left;
  for (int64_t i = 0; i < packed_.chunks; ++i) {
    const float off = screen_.bound(m, i), threshold = most - off - 1e-6f * (std::abs(most) + off);
    if (!(peaks(m)[i].top > threshold)) continue;
    const int64_t v = i * packed_.chunk_width();
    const int64_t found = loops.above(logits(m) + v, packed_.count(i), threshold, places.data());
    for (int64_t j = 0; j < found; ++j) left.push_back(static_cast<int32_t>(v + places[j]));
  }
  if (left.size() == 1) return left[0];
  std::vector<float> exact(left.size());
  const Operand operands[kOperands] = {rows_.hidden, rows_.context};
  packed_.logits_at(operands, m, left.data(), static_cast<int64_t>(left.size()), exact.data());
  return left[std::max_element(exact.begin(), exact.end()) - exact.begin()];
}

}  // namespace seq2seq_fast
