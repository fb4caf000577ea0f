// Attention of few queries in one launch. See one_query.cuh.
#pragma once
#include <optional>

#include "launch.h"
#include "softmax.cuh"

namespace seq2seq_fast {

// So few queries each read the source on their own; more of them share it in tiles.
constexpr int64_t kFewQueries = 4;
// Rows that a block holds in shared memory, 4 bytes each: one or two of keys, three of features.
constexpr int64_t kMostKeysInShared = 4096, kMostFeaturesInShared = 4096;

inline bool goes_one_by_one(const Tensor& query) {
  return query.size(1) <= kFewQueries && query.size(2) <= kMostFeaturesInShared;
}

// Into context (B, T, D) and weights (B, T, S), contiguous, with a T axis or without.
struct OneQueryOptions {
  float* also = nullptr;  // rows of float32, ld_also apart, that the context goes to as well
  int64_t ld_also = 0;
  bool keys_of_queries = false;  // see one_query.cuh
  const int* live = nullptr;     // (B,), so many queries of each source are wanted, the first ones
  // What `share_parts` made for an earlier call of the same shapes, which must have ended; made
  // where there is none yet.
  std::optional<Tensor>* parts = nullptr;
};
void one_query_attention(const Device& device, const Tensor& query, const Tensor& keys,
                         const Tensor& values, const Tensor& v, const Softmax& softmax,
                         const std::optional<Tensor>& powers, const Tensor& context,
                         const Tensor& weights, const OneQueryOptions& options = {});

// The arguments of its kernel, see one_query.cuh, but for where the results go, and what blocks
// leave for the last one of a row.
struct OneQueryArguments;
OneQueryArguments attention_arguments(const Device& device, const Tensor& query, const Tensor& keys,
                                      const Tensor& values, const Tensor& v, const Softmax& softmax,
                                      const std::optional<Tensor>& powers);

// Makes the memory for the latter, unless it has been made; without elements where the source is
// not split. Its counts are zero before a launch and after it.
Tensor share_parts(const Device& device, OneQueryArguments& a, const Tensor& query,
                   const std::optional<Tensor>& made = std::nullopt);

// Scores (B, T, S) alone.
void one_query_scores(const Device& device, const Tensor& query, const Tensor& keys,
                      const Tensor& v, const Tensor& scores);

}  // namespace seq2seq_fast
