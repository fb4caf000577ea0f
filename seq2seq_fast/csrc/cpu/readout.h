// Decoding's logits, and which token is the most probable one.
//
// Greedy decoding wants one logit of each row, the largest. It is sought with weights in bytes, a
// quarter of what floats are to read and to multiply, and found exactly. With weights w = w' + r,
// w' of int8, and a row x = x' + d, x' of one digit,
//   |w x - w' x'| <= |r| |x| + |w'| |d|
// in Euclidean norms (Cauchy-Schwarz), and what rounding may add is known too. A token with w' x' +
// bound below the greatest w' x' - bound is not the one. Of those that are left, one to a few, the
// product of floats is made, to the same bits that the product of all floats has: the token is the
// same, ties included.
#pragma once
#include <array>
#include <functional>
#include <vector>

#include "packed_product.h"
#include "projected_values.h"

namespace seq2seq_fast {

// The tensors that come from Python: matrix, scales and bias; what the most probable token is
// sought with, empty where it is not: matrix and scales of int8, bounds (kBounds, panels), the
// largest of each panel's columns, and the weights (V, K), of the matrix' type.
struct PackedReadout {
  enum Bound { kRounded, kOfBytes, kOfBias, kBounds };  // |r| and rounding; |w'|; rounding again
  static constexpr int kTensors = 7;
  Matrix matrix;
  const float* bias;
  Matrix screen;
  const void* weights;
  int64_t V, chunk_panels, chunks;                 // chunks of so many panels
  std::vector<std::array<float, kBounds>> bounds;  // of each chunk
  PackedReadout(const Tensor* tensors, int64_t V);

  int64_t ld() const { return matrix.panels * matrix.width; }
  int64_t chunk_width() const { return chunk_panels * matrix.width; }
  int64_t count(int64_t chunk) const {  // of tokens
    return std::min(chunk_width(), V - chunk * chunk_width());
  }
  // Logits of a chunk of n rows, ld apart, by `matrix` or by `screen`, whose left factor it takes.
  void logits_of(int64_t chunk, const Matrix& by, const Factor& rows, int64_t n, float* out,
                 int64_t ld) const;
  // Logits of n tokens in a row [operands side by side].
  void logits_at(const Operand* operands, int64_t row, const int32_t* tokens, int64_t n,
                 float* out) const;
};

// What makes logits log-probabilities, in the two roundings of torch's log_softmax.
struct Normaliser {
  float top, log_sum;
  Normaliser(const Peak* peaks, int64_t chunks);
  float log_prob(float logit) const { return (logit - top) - log_sum; }
};

class Readout {
 public:
  Readout(const PackedReadout& packed, int64_t most);  // rows at once

  // Whether the most probable tokens are quicker to seek than all logits are to make; `scored`:
  // which are wanted all the same, but later.
  bool seeks(int64_t rows, bool scored) const;
  // Of rows [hidden, context]; meanwhile, chunk by chunk, what else there is to do. Where there are
  // projected values, they give the context's part of logits that are not sought.
  void run(int64_t rows, const Operand& hidden, const Operand& context,
           const ProjectedValues& values, const Attended& attended, bool seek,
           const std::function<void(int64_t chunk)>& beside);

  // After `run`: whether logits are near theirs, and peaks have tops alone. Rows whose numbers are
  // not finite are not sought even where asked.
  bool sought() const { return sought_; }
  // Of row m:
  float* logits(int64_t m) const { return logits_ + m * packed_.ld(); }
  const Peak* peaks(int64_t m) const { return peaks_ + m * packed_.chunks; }  // of each chunk
  Normaliser normaliser(int64_t m) const { return {peaks(m), packed_.chunks}; }
  // Its logit becomes -inf. Peaks stay as they were but where they are sought by.
  void bar(int64_t m, int64_t token);
  // The first of equals. Of what is not barred, where it is sought.
  int32_t most_probable(int64_t m) const;

 private:
  float bound(int64_t m, int64_t chunk) const;
  float least(int64_t m) const;
  bool decides(int64_t m) const;
  int32_t find(int64_t m) const;

  const PackedReadout& packed_;
  Buffer<float> logits_, norms_;
  Buffer<Peak> peaks_;
  Operand operands_[kOperands];
  bool sought_ = false;
};

// Log-probabilities of tokens that have been chosen, which nothing else waits for: those of many
// steps are made in one product, which reads the weights once.
class LateLogProbs {
 public:
  // Adds them to the sum of each source.
  LateLogProbs(const PackedReadout& packed, std::vector<double>& sums);

  // Room for n tokens more, which `add` then fills, 0 <= i < n, in any order and by any thread.
  void make_room(int64_t n);
  void add(int64_t i, int32_t source, int32_t token, const Operand& hidden, const Operand& context,
           int64_t row);
  void flush();

 private:
  const PackedReadout& packed_;
  std::vector<double>& sums_;
  int64_t begin_ = 0, end_ = 0;  // the last ones that there is room for
  std::vector<int32_t> sources_, tokens_;
  std::vector<float> rows_;  // (tokens, K)
};

}  // namespace seq2seq_fast
