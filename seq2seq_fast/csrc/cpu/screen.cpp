// See screen.h.
#include "screen.h"

#include <cmath>

namespace seq2seq_fast {
namespace {

constexpr float kSlack = 1.001f;      // for sums of squares in float32
constexpr float kUnderflow = 1e-28f;  // more than products of 2^16 tiny numbers can lose
constexpr float kFurthest = 1e30f;    // numbers that no sum of theirs overflows
constexpr float kRounding = 0x1p-24f;
constexpr float kNear = 0.125f;
// Numbers of a byte that are read while one is made of the values' products, and rounded.
constexpr int64_t kReadMeanwhile = 7;

// The larger one, or a NaN if there is one.
float larger(float a, float b) { return a != a || b <= a ? a : b; }

}  // namespace

PackedScreen::PackedScreen(const PackedTensor* x, int64_t chunk_panels_)
    : parts{Matrix(x[0], x[1], 1), Matrix(x[2], x[3], 1)},
      panels(parts[kHidden].panels),
      chunk_panels(chunk_panels_),
      chunks((panels + chunk_panels - 1) / chunk_panels),
      bounds(chunks),
      bias_bounds(chunks) {
  if (panels == 0) return;
  parts[kHidden].mean = floats(x[5]), parts[kHidden].directions = floats(x[6]);
  const int64_t numbers = parts[0].of_sixteen() ? parts[0].sixteen_ld() - kSixteenBlock : 0;
  STD_TORCH_CHECK((!reads_context() ||
                   (parts[kContext].panels == panels && parts[kContext].width == parts[0].width)) &&
                      x[4].numel() == (2 * kParts + 1) * panels && x[5].numel() == numbers &&
                      x[6].numel() == kCommon * numbers,
                  "expected few bits of both parts of the readout's weights, and their bounds");
  for (int64_t p = 0; p < panels; ++p) {
    const auto raise = [&](float& most, int64_t i) {
      most = larger(most, floats(x[4])[i * panels + p]);
    };
    const int64_t chunk = p / chunk_panels;
    for (int part = 0; part < kParts; ++part) {
      raise(bounds[chunk][part].rounded, 2 * part);
      raise(bounds[chunk][part].of_bits, 2 * part + 1);
      raise(most_of_bits[part], 2 * part + 1);
    }
    raise(bias_bounds[chunk], 2 * kParts);
  }
}

ScreenedValues::ScreenedValues(const PackedScreen& packed, const Tensor& values)
    : B_(values.size(0)),
      S_(values.size(1)),
      bytes_(empty(values, {packed.panels * B_, (S_ + 3) / 4, packed.parts[0].width, 4},
                   ScalarType::Byte)),
      scales_(empty(values, {packed.panels * B_, packed.parts[0].width}, ScalarType::Float)),
      matrix_(PackedTensor(bytes_), PackedTensor(scales_), 1),
      bounds_(packed.chunks * B_),
      most_of_bits_(B_) {
  const Matrix& part = packed.parts[PackedScreen::kContext];
  const int64_t S = S_, D = values.size(2), width = part.width, fours = (S + 3) / 4;
  const int64_t n = packed.panels * B_;
  auto* bytes = static_cast<uint8_t*>(bytes_.data_ptr());
  auto* scales = static_cast<float*>(scales_.data_ptr());
  const Factor rows(part, B_ * S, {floats(values), D, D});
  const Buffer<float> lengths(2 * n);
  parallel(n, S * D * width, [&](int64_t begin, int64_t end) {
    alignas(64) const float nothing[kPanel] = {};
    alignas(64) float of_columns[2][kPanel];
    const Buffer<float> products(S * width);
    for (int64_t i = begin; i < end; ++i) {
      rows.multiply(i / B_, i % B_ * S, S, {nothing, 0, products, width});
      loops.to_bytes(products, S, width, bytes + i * fours * 4 * width, scales + i * width,
                     of_columns[0], of_columns[1]);
      for (int j = 0; j < 2; ++j) lengths[2 * i + j] = loops.largest(of_columns[j], width);
    }
  });
  for (int64_t b = 0; b < B_; ++b) {
    double squares[2] = {};  // of the values, and of what rounding has taken from them
    for (int64_t s = 0; s < S; ++s)
      for (int j = 0; j < 2; ++j) squares[j] += std::pow(double{rows.norms(b * S + s)[j]}, 2);
    const auto length = static_cast<float>(std::sqrt(squares[0])),
               taken = static_cast<float>(std::sqrt(squares[1]));
    // The context itself, and the sum of S products in its place, are rounded too.
    const float rounding = 2 * kRounding * static_cast<float>(S + 12);
    for (int64_t chunk = 0; chunk < packed.chunks; ++chunk) {
      const BitBounds& of = packed.bounds[chunk][PackedScreen::kContext];
      BitBounds& to = bounds_[chunk * B_ + b];
      const int64_t first = chunk * packed.chunk_panels;
      for (int64_t p = first; p < std::min(packed.panels, first + packed.chunk_panels); ++p) {
        to.rounded = larger(to.rounded, lengths[2 * place(p, b)]);
        to.of_bits = larger(to.of_bits, lengths[2 * place(p, b) + 1]);
      }
      most_of_bits_[b] = larger(most_of_bits_[b], to.of_bits);
      to.rounded +=
          length * of.rounded + taken * of.of_bits + rounding * length * (of.rounded + of.of_bits);
    }
  }
}

Screen::Screen(const PackedScreen& packed, int64_t most, const Tensor* values)
    : packed_(packed),
      values_(values),
      norms_(packed.panels > 0 ? 2 * PackedScreen::kParts * most : 0) {}

void Screen::prepare(const StepsLeft& left) {
  ++steps_;
  if (screened_ || !values_ || !packed_.reads_context()) return;
  const int64_t B = values_->size(0), S = values_->size(1), D = values_->size(2);
  const int64_t saved = D - B * round_up(S, 4);  // bytes of each token, in a step
  if (saved <= 0) return;
  const int64_t pays = B * S * D / (kReadMeanwhile * saved);  // steps
  // Where nobody knows when the tokens will end, half of that has to be behind.
  if (left.least > pays || (steps_ > pays / 2 && left.most > pays))
    screened_.emplace(packed_, *values_);
}

const BitBounds& Screen::context_bounds(int64_t m, int64_t chunk) const {
  return screened_ ? screened_->bounds(chunk, sources_[m])
                   : packed_.bounds[chunk][PackedScreen::kContext];
}

float Screen::bound(int64_t m, int64_t chunk) const {
  const BitBounds &hidden = packed_.bounds[chunk][PackedScreen::kHidden],
                  &context = context_bounds(m, chunk);
  const float *h = norms(m, PackedScreen::kHidden), *c = norms(m, PackedScreen::kContext);
  return kSlack * (h[0] * hidden.rounded + h[1] * hidden.of_bits + c[0] * context.rounded +
                   c[1] * context.of_bits + packed_.bias_bounds[chunk]) +
         kUnderflow;
}

bool Screen::tells(int64_t m) const {
  for (int64_t chunk = 0; packed_.parts[0].of_sixteen() && chunk < packed_.chunks; ++chunk)
    if (!(bound(m, chunk) < kNear)) return false;
  const float of_context = screened_ ? screened_->most_of_bits(sources_[m])
                                     : packed_.most_of_bits[PackedScreen::kContext];
  return norms(m, PackedScreen::kHidden)[0] * packed_.most_of_bits[PackedScreen::kHidden] <
             kFurthest &&
         norms(m, PackedScreen::kContext)[0] * of_context < kFurthest;
}

ScreenStep::ScreenStep(Screen& screen, const StepRows& rows, int64_t n)
    : values_(screen.screened_ ? &*screen.screened_ : nullptr),
      sources_(rows.to.sources),
      n_(n),
      reads_context_(screen.packed_.reads_context()),
      hidden_(screen.packed_.parts[PackedScreen::kHidden], n, rows.hidden,
              reads_context_ ? Operand() : rows.context),
      context_(
          values_ ? values_->matrix() : screen.packed_.parts[PackedScreen::kContext],
          reads_context_ ? n : 0,
          values_ ? Operand{rows.to.weights, rows.to.ld, values_->positions()} : rows.context) {
  screen.sources_ = sources_;
  for (int64_t m = 0; m < n; ++m)
    for (int part = 0; part < PackedScreen::kParts; ++part) {
      float* const norms = screen.norms_ + 2 * (m * PackedScreen::kParts + part);
      if (part == PackedScreen::kHidden || reads_context_)
        std::copy_n((part == PackedScreen::kHidden ? hidden_ : context_).norms(m), 2, norms);
      else
        norms[0] = norms[1] = 0;
    }
}

void ScreenStep::panel(int64_t p, const Sums& to) const {
  hidden_.multiply(p, 0, n_, to);
  if (!reads_context_) return;
  const Sums onto = {to.out, to.ld, to.out, to.ld};
  if (!values_) return context_.multiply(p, 0, n_, onto);
  for (int64_t m = 0; m < n_; ++m)
    context_.multiply(values_->place(p, sources_[m]), m, 1, onto.from(m, 0));
}

}  // namespace seq2seq_fast
