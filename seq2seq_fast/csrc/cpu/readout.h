// Decoding's logits, and which token is the most probable one.
#pragma once
#include <atomic>
#include <functional>
#include <vector>

#include "sampling.h"
#include "screen.h"

namespace seq2seq_fast {

// The tensors that come from Python: matrix, scales and bias; what the most probable token is
// sought with, empty where it is not: PackedScreen's, of six bits and of sixteen, and the weights
// (V, K), of the matrix' type.
struct PackedReadout {
  static constexpr int kTensors = 3 + 2 * PackedScreen::kTensors + 1;
  Matrix matrix;
  const float* bias;
  const void* weights;
  int64_t V, chunk_panels, chunks;  // chunks of so many panels
  PackedScreen six, sixteen;
  PackedReadout(const PackedTensor* tensors, int64_t V);

  // Whether there are near logits to make log-probabilities of, see Made.
  bool makes_scores() const { return sixteen.panels > 0 && loops.bytes.sixteen; }
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
  // What the sum of exp(logit - top) lacks where some tokens have near logits; see Loops.
  float excess(const Operand* operands, int64_t row, const std::vector<int32_t>& tokens,
               const float* near, float top) const;
};

// What makes logits log-probabilities.
struct Normaliser {
  double top, log_sum;
  Normaliser(const Peak* peaks, int64_t chunks);
  Normaliser(double top, double log_sum) : top(top), log_sum(log_sum) {}
  double log_prob(float logit) const { return (logit - top) - log_sum; }
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

// What is made of a step's rows: all logits, or near ones. Of six bits, which tell the most
// probable token, or of sixteen, which tell the most probable ones and log-probabilities.
enum class Made : uint8_t { kLogits, kToken, kScores };

class Readout {
 public:
  // `most` rows at once; values (B, S, D), null without attention, which may be projected already.
  Readout(const PackedReadout& packed, int64_t most, const Tensor* values,
          const ProjectedValues& projected);

  // Of n rows; meanwhile, chunk by chunk, what else there is to do. All logits are made where what
  // is wanted cannot be had: of loops that do not seek, and of rows whose numbers are not finite.
  void run(const StepRows& rows, int64_t n, Made wanted, const StepsLeft& left,
           const std::function<void(int64_t chunk)>& beside);

  // After `run`:
  Made made() const { return made_; }
  // Of row m:
  float* logits(int64_t m) const { return logits_ + m * packed_.ld(); }
  // How far those of a chunk may be off.
  float off(int64_t m, int64_t chunk) const { return sought(m) ? near(m)[chunk].bound : 0.f; }
  // The logits of some tokens as products of floats have them.
  std::vector<float> exact(int64_t m, const std::vector<int32_t>& tokens) const;
  float logit(int64_t m, int32_t token) const { return exact(m, {token})[0]; }
  // Of each chunk, unless tokens alone were sought.
  const Peak* peaks(int64_t m) const { return peaks_ + m * packed_.chunks; }
  // The same, before anything is barred.
  Normaliser normaliser(int64_t m) const;
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
  bool make_near(int64_t n, const std::function<void(int64_t chunk)>& beside);
  void make_others(int64_t n);
  void meet(int64_t m, int64_t chunk);
  void over_chunks(int64_t rows, const std::function<void(int64_t chunk)>& f) const;
  bool sought(int64_t m) const { return made_ != Made::kLogits && near_rows_[m]; }
  void note(int64_t m, int64_t chunk);
  Near* near(int64_t m) const { return near_ + m * packed_.chunks; }
  float least(int64_t m) const;
  float small_part(int64_t m) const;
  std::vector<int32_t> largest(int64_t m) const;
  int32_t find(int64_t m) const;
  int32_t find_drawn(int64_t m, const Draw& draw) const;
  // Tokens whose logits may be among the k largest.
  std::vector<int32_t> among_largest(int64_t m, int64_t k) const;
  // Adds a chunk's tokens whose values are above a threshold.
  void add_above(const float* values, int64_t chunk, float threshold,
                 std::vector<int32_t>& tokens) const;

  const PackedReadout& packed_;
  const ProjectedValues& projected_;
  Screen six_, sixteen_;
  Screen* screen_ = nullptr;  // of the last step
  Buffer<float> logits_;
  Buffer<Peak> peaks_;
  Buffer<Near> near_;
  std::vector<std::atomic<float>> least_;  // what no row's largest logit is below, so far
  std::vector<uint8_t> near_rows_;         // whether a row's near logits tell
  StepRows rows_;                          // of the last step
  Made made_ = Made::kLogits;
};

// Log-probabilities of tokens that have been chosen, which nothing else waits for: those of many
// steps are made together, which reads the weights once.
class LateLogProbs {
 public:
  // Adds them to the sum of each source. of_first: the first operand's part of a row.
  LateLogProbs(const PackedReadout& packed, int64_t of_first, std::vector<double>& sums);

  // Room for n tokens more, which `add` then fills, 0 <= i < n, in any order and by any thread.
  void make_room(int64_t n);
  void add(int64_t i, int32_t source, int32_t token, const Operand& hidden, const Operand& context,
           int64_t row);
  void flush();

 private:
  const PackedReadout& packed_;
  const std::vector<int64_t> nothing_;
  const ProjectedValues no_values_;
  std::optional<Readout> readout_;
  std::vector<double>& sums_;
  const int64_t of_first_, most_;  // numbers, tokens
  int64_t begin_ = 0, end_ = 0;    // the last ones that there is room for
  std::vector<int32_t> sources_, tokens_;
  std::vector<float> rows_;  // (tokens, K)
};

}  // namespace seq2seq_fast
