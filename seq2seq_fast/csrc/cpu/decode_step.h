// One step of decoding: all live hypotheses of all sources, from their tokens to their logits.
//
// A row is a hypothesis. Its arithmetic does not depend on what stands beside it nor on the number
// of threads, so that a source is decoded alike alone and in any batch. Hypotheses of one source
// share its keys and values.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "additive_scores.h"

namespace seq2seq_fast {

// Packed weights, see loops.h; scales are of kInt8 alone. Made by seq2seq_fast/decoding/packing.py.
struct Matrix {
  Tensor data, scales;
  Weights type;
  int64_t panels, K, width;
  Matrix(const Tensor& data, const Tensor& scales);
  int64_t operations(int64_t rows) const { return rows * K * width / 2; }
  // From one digit of a row to the next; vectors are stored past its end.
  int64_t quantised_ld() const { return K + kBlock; }
};

// The left factor of products with a matrix: rows of operands side by side.
class Factor {
 public:
  Factor(const Matrix& matrix, int64_t rows, Operand a, Operand b = {}, Operand c = {});
  // out (rows, width), ldo apart, += rows from `first` on times panel i
  void multiply(int64_t i, int64_t first, int64_t rows, float* out, int64_t ldo) const;

 private:
  const Matrix& matrix_;
  const Operand operands_[kOperands];
  Buffer<float> scales_;
  Buffer<int32_t> offsets_;
  Buffer<int8_t> digits_;
  const QuantisedRows quantised_;
};

// A decoder's weights as they come from Python, in this order: embedding (V, E), or each token's
// part of the first layer's gates with their bias (V, panels, gates of a panel); of each layer the
// matrix over [input; hidden], or over the input alone and over the hidden state, and the bias
// (panels, gates, units); query matrix and bias; readout matrix and bias.
struct PackedDecoder {
  struct Layer {
    Matrix input, hidden;  // `hidden` is empty where `input` has both
    const float* bias;
  };
  Cell cell;
  bool query_after;
  int64_t V, E;            // E is 0 where tokens have gates
  const float* embedding;  // (V, E)
  const float* gates_of_tokens;
  std::vector<Layer> layers;
  Matrix query, readout;
  const float *b_query, *b_readout;
  std::vector<Tensor> tensors;
  PackedDecoder(std::vector<Tensor> tensors, const std::string& cell_type, bool query_after);
};

struct DecoderSource {
  std::optional<Keys> keys;  // none of a decoder without attention
  Tensor values, v_;
  Buffer<float> v;
  float max_v = 0;
  const bool* mask = nullptr;
  int64_t S = 0, D = 0, A = 0, mask_stride[2] = {};
  DecoderSource(const std::vector<Tensor>& tensors, const std::optional<Tensor>& mask,
                int64_t context_width);
  bool attended(int64_t b, int64_t s) const {
    return !mask || mask[b * mask_stride[0] + s * mask_stride[1]];
  }
};

// A live hypothesis: whose source, which row of the step before, and the token it is fed.
struct Live {
  int32_t source, parent, token;
};

class DecoderStep {
 public:
  // States (L, B, H), context (B, D) or none; `most` rows at once. Where `cover`, the
  // weights of each hypothesis are added up.
  DecoderStep(const PackedDecoder& model, const DecoderSource& source, const Tensor& hidden_state,
              const Tensor& cell_state, const std::optional<Tensor>& context, int64_t most,
              bool cover);

  void run(const std::vector<Live>& live);

  // Of row m after `run`:
  float* logits(int64_t m) const { return logits_ + m * logits_ld_; }
  const Peak* peaks(int64_t m) const { return peaks_ + m * chunks_; }  // of each chunk
  int64_t chunks() const { return chunks_; }
  int64_t chunk_width() const { return chunk_panels_ * kPanel; }
  const float* weights(int64_t m) const { return weights_ + m * weights_ld_; }  // (S,)
  const float* covered(int64_t m) const { return covered_[kept_] + m * source_.S; }

 private:
  void follow(const std::vector<Live>& live);
  void attend(const std::vector<Live>& live);
  void attend_row(int64_t m, const Live& to, int64_t query_row, float* scratch);
  void advance(int64_t layer, int64_t rows);
  Factor query_factor(int64_t rows) const;
  void query(const Factor& states, int64_t panel, int64_t rows);
  void query_all(int64_t rows);
  void read_out(int64_t rows);
  float* hidden(int which, int64_t layer) const { return hidden_[which] + layer * most_ * Hp_; }
  float* cell(int which, int64_t layer) const { return cell_[which] + layer * most_ * Hp_; }

  const PackedDecoder& model_;
  const DecoderSource& source_;
  const int64_t most_, L_, H_, unit_, Hp_;
  const bool lstm_, cover_;
  const int64_t query_ld_, logits_ld_, weights_ld_, chunk_panels_, chunks_;
  int now_ = 0;   // which of two buffers holds the states before the step, and then those after it
  int kept_ = 0;  // the same for what changes places only with its hypothesis
  // One row's steps go through the weights forwards and backwards by turns: what was read last is
  // still in the second level of the cache.
  bool backwards_ = false;
  Buffer<int32_t> tokens_;
  Buffer<float> inputs_, queries_, logits_, weights_;
  Buffer<Peak> peaks_;
  Buffer<float> hidden_[2], cell_[2], contexts_[2], covered_[2];
};

}  // namespace seq2seq_fast
