// See readout.h.
#include "readout.h"

#include <cmath>

namespace seq2seq_fast {
namespace {

constexpr float kSlack = 1.001f;      // for sums of squares in float32
constexpr float kUnderflow = 1e-28f;  // more than products of 2^16 tiny numbers can lose
constexpr float kFurthest = 1e30f;    // numbers that no sum of theirs overflows

}  // namespace

PackedReadout::PackedReadout(const Tensor* x, int64_t V)
    : matrix(x[0], x[1]),
      bias(floats(x[2])),
      screen(x[3], x[4], 1),
      weights(x[6].data_ptr()),
      V(V),
      chunk_panels(matrix.panels >= 64 ? 4 : 1),
      chunks((matrix.panels + chunk_panels - 1) / chunk_panels),
      bounds(screen.panels > 0 ? chunks : 0) {
  const int64_t panels = screen.panels;
  if (panels == 0) return;
  STD_TORCH_CHECK(panels == matrix.panels && screen.width == matrix.width &&
                      screen.K == round_up(matrix.K, 4) && x[5].numel() == kBounds * panels &&
                      x[6].numel() == V * matrix.K && x[6].is_contiguous() &&
                      x[6].scalar_type() == x[0].scalar_type() && matrix.type != Weights::kInt8,
                  "expected int8, bounds and rows of the readout's weights");
  for (int64_t p = 0; p < panels; ++p)
    for (int i = 0; i < kBounds; ++i) {
      float& most = bounds[p / chunk_panels][i];
      most = std::max(most, floats(x[5])[i * panels + p]);
    }
}

void PackedReadout::logits_of(int64_t chunk, const Matrix& by, const Factor& rows, int64_t n,
                              float* out, int64_t ld) const {
  const int64_t width = by.width, first = chunk * chunk_panels;
  for (int64_t p = first; p < std::min(by.panels, first + chunk_panels); ++p, out += width)
    rows.multiply(p, 0, n, {bias + p * width, 0, out, ld});
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

Readout::Readout(const PackedReadout& packed, int64_t most)
    : packed_(packed),
      logits_(most * packed.ld()),
      norms_(packed.screen.panels > 0 ? 2 * most : 0),
      peaks_(most * packed.chunks) {}

bool Readout::seeks(int64_t rows, bool scored) const {
  return packed_.screen.panels > 0 && loops.bytes.seek && (!scored || rows <= kFewRows);
}

void Readout::run(int64_t rows, const Operand& hidden, const Operand& context,
                  const ProjectedValues& values, const Attended& attended, bool seek,
                  const std::function<void(int64_t chunk)>& beside) {
  sought_ = seek;
  operands_[0] = hidden, operands_[1] = context;
  const Matrix& by = sought_ ? packed_.screen : packed_.matrix;
  const bool projected = values && !sought_;
  const Factor features(by, rows, hidden, projected ? Operand() : context);
  if (sought_) std::copy_n(features.norms(0), 2 * rows, +norms_);
  over_pieces(packed_.chunks, packed_.chunk_panels * by.operations(rows), rows, false,
              [&](int64_t chunk) {
                const int64_t v = chunk * packed_.chunk_width(), n = packed_.count(chunk);
                packed_.logits_of(chunk, by, features, rows, logits_ + v, packed_.ld());
                for (int64_t p = v / by.width; projected && p * by.width < v + n; ++p) {
                  float* out = logits_ + p * by.width;
                  values.add(attended, p, 0, rows, {out, packed_.ld(), out, packed_.ld()});
                }
                for (int64_t m = 0; m < rows; ++m) {
                  Peak& peak = peaks_[m * packed_.chunks + chunk];
                  if (sought_)
                    peak.top = loops.top(logits(m) + v, n);
                  else
                    peak = loops.peak(logits(m) + v, n);
                }
                beside(chunk);
              });
  for (int64_t m = 0; sought_ && m < rows; ++m)
    if (!decides(m)) return run(rows, hidden, context, values, attended, false, [](int64_t) {});
}

// How far a logit of a chunk may be from that of the product of floats.
float Readout::bound(int64_t m, int64_t chunk) const {
  const std::array<float, PackedReadout::kBounds>& of = packed_.bounds[chunk];
  return kSlack * (norms_[2 * m] * of[PackedReadout::kRounded] +
                   norms_[2 * m + 1] * of[PackedReadout::kOfBytes] + of[PackedReadout::kOfBias]) +
         kUnderflow;
}

// What the largest logit is not below.
float Readout::least(int64_t m) const {
  float least = -INFINITY;
  for (int64_t i = 0; i < packed_.chunks; ++i)
    least = std::max(least, peaks(m)[i].top - bound(m, i));
  return least;
}

// Whether all of that is finite: norms of rows that are not are NaN.
bool Readout::decides(int64_t m) const {
  for (const auto& of : packed_.bounds)
    if (!(norms_[2 * m] * of[PackedReadout::kOfBytes] < kFurthest)) return false;
  return least(m) > -INFINITY;
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
    const float off = bound(m, i), threshold = most - off - 1e-6f * (std::abs(most) + off);
    if (!(peaks(m)[i].top > threshold)) continue;
    const int64_t v = i * packed_.chunk_width();
    const int64_t found = loops.above(logits(m) + v, packed_.count(i), threshold, places.data());
    for (int64_t j = 0; j < found; ++j) left.push_back(static_cast<int32_t>(v + places[j]));
  }
  if (left.size() == 1) return left[0];
  std::vector<float> exact(left.size());
  packed_.logits_at(operands_, m, left.data(), static_cast<int64_t>(left.size()), exact.data());
  return left[std::max_element(exact.begin(), exact.end()) - exact.begin()];
}

}  // namespace seq2seq_fast
