// Location-sensitive attention: scores that see where was attended before.
//
// scores[s] = v tanh(query + keys[s] + projection f[:,s]), f = conv * state, where the channels of
// the state are the weights of the step before or the sum of all before. Nothing of (B, S, A) is
// made: a chunk of places is filtered, projected and scored while it is in cache, and once more
// backward, where gradients of keys and filters are added up from step to step.
#pragma once
#include <array>
#include <optional>
#include <vector>

#include "../common.h"
#include "loops.h"

namespace seq2seq_fast {

template <typename A>
class Location {
 public:
  // filters: conv (N, C, K) and projection (A, N); accumulates: of each channel. keys (B, S, A),
  // values (B, S, D), v (A,), mask (B, S).
  Location(const std::vector<Tensor>& filters, const std::vector<int64_t>& accumulates,
           const Tensor& keys, const Tensor& values, const Tensor& v,
           const std::optional<Tensor>& mask);
  int64_t state_numbers() const { return C_ * S_; }

  // A query of source b (A,), the state before it (C, S), the context (D,) and weights (S,) that
  // come of it, and the state behind it, which may be the one before.
  struct Row {
    int64_t b;
    const A *query, *state;
    A *context, *weights, *next;
  };
  // What a thread works in.
  struct Room {
    Buffer<A> padded, features, query;
    explicit Room(const Location& l)
        : padded(l.C_ * l.padded_width()), features(l.N_ * kChunk), query(l.Ap_) {}
  };
  void attend(const Row& row, const Room& room) const;
  // Many of them, shared out.
  void attend(const std::vector<Row>& rows) const;

  // Begins backward, from the gradient of the state after the last step (B, C, S); `detach`: none
  // flows from a state to weights.
  void begin_backward(const Tensor& dstate, bool detach);
  // A step of it, the last one first, each (B, ...), of which the first `rows` have the step.
  // dweights is of the weights as results.
  void attend_backward(int64_t rows, const A* dcontext, const A* dweights, const A* query,
                       const A* state, const A* weights, A* dscores, A* dquery);
  // Gradients of keys, v, conv, projection and the state before the first step.
  std::array<Tensor, 5> results() const;

 private:
  static constexpr int64_t kChunk = 4 * kPad;  // places that are taken together

  int64_t padded_width() const { return Sp_ + K_ - 1 + kPad; }
  void prepare(const Row& row, const Room& room) const;
  PlacesOf<A> places(int64_t b, int64_t s, const Room& room) const;
  void score(const Row& row, int64_t s, const Room& room) const;
  void weigh(const Row& row) const;
  void read_values(const Row& row, int64_t d, int64_t n) const;
  void products_with_values(int64_t b, const A* dcontext, A* out) const;

  const std::vector<int64_t>& accumulates_;
  const Tensor& values_;
  const int64_t B_, S_, A_, Ap_, Sp_, N_, Np_, C_, K_, D_;
  const Tensor like_;
  const bool* mask_;
  const int64_t mask_stride_[2];
  Buffer<A> conv_, flipped_;           // (N, C, K); (C, N, K), each filter backwards
  Buffer<A> projection_, transposed_;  // (N, Ap); (Ap, Np)
  Buffer<A> v_, own_keys_;
  const A* keys_;  // (B, S, Ap)
  // Backward. Gradients of keys, and a copy with whole rows where theirs are not; the others are of
  // each source.
  std::optional<Tensor> dkeys_;
  std::optional<Buffer<A>> padded_dkeys_, dv_, dprojection_, dconv_, dstate_;
  A* at_dkeys_ = nullptr;  // (B, S, Ap)
  bool detach_ = false;
};

extern template class Location<float>;
extern template class Location<double>;

}  // namespace seq2seq_fast
