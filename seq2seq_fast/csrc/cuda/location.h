// Host side of location.cuh.
#pragma once
#include <vector>

#include "decoder.h"
#include "filters.cuh"

namespace seq2seq_fast {

// How scores see where was attended before.
struct Place {
  Tensor conv, projection;  // (N, C, K), (N, A), contiguous
  Filters filters;
  Place(const Device& device, const std::vector<Tensor>& location,
        const std::vector<int64_t>& accumulates, const Tensor& keys);
  // A block's, of shared memory; forward's is checked already.
  void check_room(const Device& device, int64_t floats) const;
};

// The location before step t, from that of the step before it, both of `states` (T + 1, B, C, S),
// and weights (T, B, S); and with what it adds, the keys of step t, into `placed` if that is given.
void launch_place_keys(const Device& device, const Place& place, int64_t t, const Tensor& states,
                       const Tensor& weights, const Tensor& keys,
                       const std::optional<Tensor>& placed);

// The same of a search, for so many rows.
void launch_place_keys(const Device& device, const PlaceKeysArguments& a, int64_t rows);

struct OneQueryBackwardArguments;

// What attention backward is where scores see where was attended before.
class PlaceBackward {
 public:
  // dstate is of the last of the states (T + 1, B, C, S).
  PlaceBackward(const Device& device, const Place& place, const Source& source,
                const Tensor& states, const Tensor& dstate, bool detach);
  // Step t, of all whose rows are this step's.
  void attend(int64_t t, const OneQueryBackwardArguments& attention);
  // Gradients of keys, v, conv, projection and the state before the first step, given queries and
  // the scores' gradients of all steps (T, B, ...).
  std::array<Tensor, 5> results(const Tensor& queries, const Tensor& dscores) const;

 private:
  float* state(int64_t t) const { return floats_of(states_) + t * states_.stride(0); }

  const Device& device_;
  const Place& place_;
  const Source& source_;
  const Tensor& states_;
  const int64_t T_, B_;
  const bool detach_;
  const Tensor parts_, features_, of_weights_;  // of a step
  Tensor dconv_, dstate_;                       // (B, N, C K), a sum over steps; (B, C, S)
};

}  // namespace seq2seq_fast
