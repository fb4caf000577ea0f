// Decoding's logits, and which token is the most probable one.
#pragma once
#include <atomic>
#include <functional>
#include <vector>

#include "sampling.h"
#include "screen.h"

namespace seq2seq_fast {

// The tensors that come from Python: matrix, scales and bias; what the most probable token is
// sought with, empty where it is not: PackedScreen's, and the weights (V, K), of the matrix' type.
struct PackedReadout {
  static constexpr int kTensors = 3 + PackedScreen::kTensors + 1;
  Matrix matrix;
  const float* bias;
  const void* weights;
  int64_t V, chunk_panels, chunks;  // chunks of so many panels
  PackedScreen screen;
  PackedReadout(const PackedTensor* tensors, int64_t V);

  int64_t ld() const { return matrix.panels * matrix.width; }
  int64_t chunk_width() const { return chunk_panels * matrix.width; }
  int64_t count(int64_t chunk) const {  // of tokens
    return std::min(chunk_width(), V - chunk * chunk_width());
  }
  // Calls f with each panel of a chunk, and where its part of the chunk's n logits goes: out (n,
  // chunk_width), ld apart, each to begin at the bias.
  template <typename F>
  void over_panels(int64_t chunk, float* out, int64_t ld, F f) const {
    const int64_t width = matrix.width, first = chunk * chunk_panels;
    for (int64_t p = first; p < std::min(matrix.panels, first + chunk_panels); ++p, out += width)
      f(p, Sums{bias + p * width, 0, out, ld});
  }
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

// What is known of a chunk's near logits, which one thread makes and another asks for: the largest,
// how far each may be off, and those that may be the largest of the row by what was known when the
// chunk was made. Where there are more of those than fit, or one was barred that spoke against
// others, `count` is kMany.
struct alignas(64) Near {
  static constexpr int32_t kMost = 6, kMany = kMost + 1;
  float top, bound;
  int32_t count, tokens[kMost];
  float values[kMost];
};

class Readout {
 public:
  // `most` rows at once; values (B, S, D), null without attention, which may be projected already.
  Readout(const PackedReadout& packed, int64_t most, const Tensor* values,
          const ProjectedValues& projected);

  // Whether the most probable tokens are quicker to seek than all logits are to make; `scored`:
  // which are wanted all the same, but later.
  bool seeks(int64_t rows, bool scored) const;
  // Of n rows, which may be sought; meanwhile, chunk by chunk, what else there is to do.
  void run(const StepRows& rows, int64_t n, bool seek, const StepsLeft& left,
           const std::function<void(int64_t chunk)>& beside);

  // After `run`: whether logits are near theirs, and there are no peaks. Rows whose numbers are not
  // finite are not sought even where asked.
  bool sought() const { return sought_; }
  // Of row m:
  float* logits(int64_t m) const { return logits_ + m * packed_.ld(); }
  const Peak* peaks(int64_t m) const { return peaks_ + m * packed_.chunks; }  // of each chunk
  Normaliser normaliser(int64_t m) const { return {peaks(m), packed_.chunks}; }
  // Whether no logit is +inf or NaN.
  bool finite(int64_t m) const;
  // Its logit becomes -inf. Peaks stay as they were.
  void bar(int64_t m, int64_t token);
  // The first of equals. Of what is not barred, where it is sought.
  int32_t most_probable(int64_t m) const;
  // One of what is not barred, drawn; may change the logits of what it cannot be. As
  // `most_probable` where one is +inf or NaN.
  int32_t drawn(int64_t m, const Sampling& sampling, const Draw& draw);

 private:
  void make_all(int64_t n, const std::function<void(int64_t chunk)>& beside);
  void make_near(int64_t n, const std::function<void(int64_t chunk)>& beside);
  void note(int64_t m, int64_t chunk);
  Near* near(int64_t m) const { return near_ + m * packed_.chunks; }
  float least(int64_t m) const;
  std::vector<int32_t> largest(int64_t m) const;
  int32_t find(int64_t m) const;
  int32_t find_drawn(int64_t m, const Draw& draw) const;
  // Tokens whose logits may be among the k largest.
  std::vector<int32_t> among_largest(int64_t m, int64_t k) const;
  // Adds a chunk's tokens whose values are above a threshold.
  void add_above(const float* values, int64_t chunk, float threshold,
                 std::vector<int32_t>& tokens) const;
  std::vector<float> exact(int64_t m, const std::vector<int32_t>& tokens) const;

  const PackedReadout& packed_;
  const ProjectedValues& projected_;
  Screen screen_;
  Buffer<float> logits_;
  Buffer<Peak> peaks_;
  Buffer<Near> near_;
  std::vector<std::atomic<float>> least_;  // what no row's largest logit is below, so far
  StepRows rows_;                          // of the last step
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
