// Which token is the most probable one, told by a few bits of each weight.
//
// Greedy decoding wants one logit of each row, the largest. It is sought with rounded weights, of
// six bits over the hidden state and eight over the context, a fifth of what floats are to read,
// and found exactly; an attentional vector stands for both, and is read as the hidden state is.
// With weights w = w' + r, w' a whole number and a scale, and numbers x = x' + d, x' of one digit,
//   |w x - w' x'| <= |r| |x| + |w'| |d|
// in Euclidean norms (Cauchy-Schwarz), for the hidden state and for the context apart, and what
// rounding may add is known too. A token with w' x' + bound below the greatest w' x' - bound is not
// the one. Of those that are left, one to a few, the product of floats is made, to the same bits
// that the product of all floats has: the token is the same, ties included.
//
// The context is a sum of a source's values, so where few and short sources are decoded for long,
// the values meet the context's bytes once, and attention weights their products, in bytes too: S
// numbers of each token to read and not D. What rounding may have taken there is bounded alike, by
// the length of all values, which are longer together than any context: eight bits pay there.
//
// Where log-probabilities are wanted too, and of many rows, all tokens' logits are made, of weights
// and numbers of sixteen bits: those that take part in choosing are made again of floats, as above.
// The others are summed up as they are; see Readout::normaliser.
#pragma once
#include <array>
#include <optional>
#include <vector>

#include "projected_values.h"

namespace seq2seq_fast {

// Bounds of a product by bits, for factors of norm 1: |r| with all rounding, and |w'|.
struct BitBounds {
  float rounded = 0, of_bits = 0;
};

// The tensors that come from Python: matrix and scales, of kInt6 over the hidden state and of kInt8
// over the context, or of kInt16 over both; the bounds of both parts, and of the bias' rounding,
// (5, panels), the largest of each panel's columns; mean and directions of kInt16, see SixteenRows.
// Empty where nothing is sought; the context's part alone where another has both, or readouts read
// attentional vectors.
struct PackedScreen {
  static constexpr int kTensors = 7;
  enum Part { kHidden, kContext, kParts };
  Matrix parts[kParts];
  int64_t panels, chunk_panels, chunks;
  std::vector<std::array<BitBounds, kParts>> bounds;  // of each chunk of panels
  std::vector<float> bias_bounds;
  float most_of_bits[kParts] = {};  // of all chunks
  PackedScreen(const PackedTensor* tensors, int64_t chunk_panels);
  bool reads_context() const { return parts[kContext].panels > 0; }
};

// How many steps there may be from one on, itself among them.
struct StepsLeft {
  int64_t least, most;
};

// What a step's rows are read out from.
struct StepRows {
  Operand hidden, context;
  Attended to;  // what the context is a sum of, where there is attention
};

// The values' products with the context's bytes, rounded to bytes themselves.
class ScreenedValues {
 public:
  // values (B, S, D)
  ScreenedValues(const PackedScreen& packed, const Tensor& values);
  const Matrix& matrix() const { return matrix_; }  // (panels B, S / 4, width, 4)
  int64_t positions() const { return S_; }
  int64_t place(int64_t panel, int64_t source) const { return panel * B_ + source; }
  const BitBounds& bounds(int64_t chunk, int64_t source) const {
    return bounds_[chunk * B_ + source];
  }
  float most_of_bits(int64_t source) const { return most_of_bits_[source]; }

 private:
  int64_t B_, S_;
  Tensor bytes_, scales_;
  Matrix matrix_;
  std::vector<BitBounds> bounds_;    // (chunks, B)
  std::vector<float> most_of_bits_;  // (B,)
};

class Screen {
 public:
  // values (B, S, D); null without attention
  Screen(const PackedScreen& packed, int64_t most, const Tensor* values);
  // Before a step by bits, the first of those left: the values' products where they will pay.
  void prepare(const StepsLeft& left);
  // How far a logit of a chunk may be from that of the product of floats, in row m of the last
  // step.
  float bound(int64_t m, int64_t chunk) const;
  // Whether all of that is finite: norms of rows that are not are NaN. Of sixteen bits, whether
  // logits are near enough to be summed up.
  bool tells(int64_t m) const;

 private:
  friend class ScreenStep;
  const BitBounds& context_bounds(int64_t m, int64_t chunk) const;
  const float* norms(int64_t m, int64_t part) const {
    return norms_ + 2 * (m * PackedScreen::kParts + part);
  }

  const PackedScreen& packed_;
  const Tensor* const values_;
  std::optional<ScreenedValues> screened_;
  int64_t steps_ = 0;                 // that were prepared for
  const int32_t* sources_ = nullptr;  // of the last step's rows
  Buffer<float> norms_;               // of the last step's numbers, (rows, kParts, 2)
};

// The products of a step's n rows.
class ScreenStep {
 public:
  ScreenStep(Screen& screen, const StepRows& rows, int64_t n);
  // out = init + near logits of a panel
  void panel(int64_t p, const Sums& to) const;

 private:
  const ScreenedValues* const values_;
  const int32_t* const sources_;
  const int64_t n_;
  const bool reads_context_;
  const Factor hidden_, context_;
};

}  // namespace seq2seq_fast
