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
#include "location.h"
#include "projected_values.h"
#include "readout.h"

namespace seq2seq_fast {

// A decoder's weights as they come from Python, in this order: embedding (V, E), or each token's
// part of the first layer's gates with their bias (V, panels, gates of a panel); of each layer the
// matrix over [input; hidden], or over the input alone and over the hidden state, and the bias
// (panels, gates, units); query matrix and bias; the first layer's matrix over the context, where
// its input has none; matrix and bias of the attentional vector, where there is one; what
// PackedReadout takes.
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
  int64_t panels_of_tokens;
  std::vector<Layer> layers;
  Matrix query;
  const float* b_query;
  Matrix context, vector;
  const float* b_vector;
  int64_t O;  // width of attentional vectors, which layers and readout read; 0 for none
  bool tanh;
  PackedReadout readout;
  // vector: O and whether its activation is tanh, or nothing
  PackedDecoder(const std::vector<PackedTensor>& tensors, const std::string& cell_type,
                bool query_after, const std::vector<int64_t>& vector);
  // Whether its matrices are those of these widths, and it attends or not.
  bool fits(int64_t H, int64_t D, int64_t A, bool attends) const;
  bool has(int64_t token) const { return token >= 0 && token < V; }
};

struct DecoderSource {
  std::optional<Keys> keys;  // none where there is a location, or no attention
  Tensor values, v_;
  Buffer<float> v;
  float max_v = 0;
  const bool* mask = nullptr;
  int64_t S = 0, D = 0, A = 0, mask_stride[2] = {};
  // Where the scores see it: what it was before the first step (B, C, S), and how they do.
  Tensor place;
  std::vector<int64_t> accumulates;
  std::optional<Location<float>> location;
  // tensors: none without attention, else keys, powers, values and v, and then those of a location:
  // conv, projection, state. context: (B, D) of a decoder without attention, or what the first step
  // reads.
  DecoderSource(const std::vector<Tensor>& tensors, const std::optional<Tensor>& mask,
                const std::optional<Tensor>& context, int64_t B,
                const std::vector<int64_t>& accumulates);
  bool attends() const { return S > 0; }
  std::vector<int64_t> lengths;  // of each source, up to the last position that is attended to
  bool attended(int64_t b, int64_t s) const {
    return !mask || mask[b * mask_stride[0] + s * mask_stride[1]];
  }
};

// A live hypothesis: whose source, which row of the step before, and the token it is fed.
struct Live {
  int32_t source, parent, token;
};

// Which products values meet the context's weights of before the first step; of logits where all
// of them are made, and weights are not of int8.
struct Project {
  bool gates, logits;
};

class DecoderStep {
 public:
  // States (L, B, H), context (B, D), or the attentional vector (B, O), or none; `most` rows at
  // once. Where `cover`, the weights of each hypothesis are added up. `project`: the values, where
  // that can be done.
  DecoderStep(const PackedDecoder& model, const DecoderSource& source, const Tensor& hidden_state,
              const Tensor& cell_state, const std::optional<Tensor>& context, int64_t most,
              bool cover, Project project);

  // The first of the steps that are left, and what is wanted of the readout.
  void run(const std::vector<Live>& live, const StepsLeft& left, Made wanted);

  // After `run`:
  // Copies the states of all layers, (L, rows, H) each.
  void copy_states(int64_t rows, float* hidden, float* cell) const;
  Readout& readout() { return readout_; }
  Operand outputs() const { return {hidden(now_, L_ - 1), Hp_, H_}; }
  Operand contexts() const { return {contexts_[kept_], source_.D, source_.D}; }
  Operand vectors() const { return {vectors_[kept_], vectors_ld_, model_.O}; }
  // What the readout reads, side by side.
  Operand features(int i) const {
    if (model_.O > 0) return i == 0 ? vectors() : Operand();
    return i == 0 ? outputs() : contexts();
  }
  const float* weights(int64_t m) const { return weights_[kept_] + m * weights_ld_; }  // (S,)
  const float* covered(int64_t m) const { return covered_[kept_] + m * source_.S; }
  // (C, S), of a source that has one
  const float* location(int64_t m) const { return located_[kept_] + m * of_location_; }

 private:
  void follow(const std::vector<Live>& live);
  void attend(const std::vector<Live>& live);
  void attend_row(int64_t m, int32_t source, int64_t query_row, int into, float* scratch);
  Location<float>::Row located(int64_t m, int32_t source, int64_t query_row, int into) const;
  void cover(int64_t row);
  Buffer<float> attention_scratch() const;
  void advance(int64_t layer, int64_t rows);
  Factor query_factor(int64_t rows) const;
  void query(const Factor& states, int64_t panel, int64_t rows);
  void query_all(int64_t rows);
  void make_vectors(int64_t rows);
  void read_out(int64_t rows, const StepsLeft& left, Made wanted);
  Attended attended() const { return {weights_[kept_], weights_ld_, sources_}; }
  float* hidden(int which, int64_t layer) const { return hidden_[which] + layer * most_ * Hp_; }
  float* cell(int which, int64_t layer) const { return cell_[which] + layer * most_ * Hp_; }

  const PackedDecoder& model_;
  const DecoderSource& source_;
  const int64_t most_, L_, H_, unit_, Hp_;
  const bool lstm_, cover_;
  const int64_t query_ld_, weights_ld_, vectors_ld_, of_location_;
  int now_ = 0;   // which of two buffers holds the states before the step, and then those after it
  int kept_ = 0;  // the same for what a step need not change
  // One row's steps go through the weights forwards and backwards by turns: what was read last is
  // still in the second level of the cache.
  bool backwards_ = false;
  Buffer<int32_t> tokens_, sources_;
  // Whether the rows of the last step have been attended for already, as for the next one: into the
  // buffers that are not the kept ones.
  bool ahead_ = false;
  Buffer<float> inputs_, queries_, weights_[2];
  ProjectedValues of_gates_, of_logits_;
  Readout readout_;
  Buffer<float> hidden_[2], cell_[2], contexts_[2], vectors_[2], covered_[2], located_[2];
};

}  // namespace seq2seq_fast
