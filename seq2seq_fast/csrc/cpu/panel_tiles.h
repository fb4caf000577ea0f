// How products with packed weights divide a panel into tiles.
#pragma once
#include "vec.h"

namespace seq2seq_fast {
namespace {

constexpr int64_t kLineBytes = 64;

// What is read after a panel of `steps` steps of `bytes` bytes: `soon`, and then the panel behind
// it. Every tile of rows asks for as many lines as it makes steps.
class Ahead {
 public:
  Ahead(const void* panel, int64_t steps, int64_t bytes, const Soon& soon = {})
      : tile_(steps * kLineBytes),
        behind_(static_cast<const char*>(panel) + (steps * bytes)),
        end_behind_(behind_ + (steps * bytes)),
        at_(soon.bytes > 0 ? static_cast<const char*>(soon.first) : behind_),
        end_(soon.bytes > 0 ? at_ + soon.bytes : end_behind_) {}
  const char* next() {
    const char* from = at_;
    if (at_ + tile_ < end_)
      at_ += tile_;
    else if (end_ != end_behind_)
      at_ = behind_, end_ = end_behind_;
    return from;
  }

 private:
  int64_t tile_;
  const char *behind_, *end_behind_, *at_, *end_;
};

// Calls f<M> of the M that is m.
template <int kMost, typename F>
S2S_INLINE void of_rows(int64_t m, F f) {
  if constexpr (kMost > 1) {
    if (m < kMost) return of_rows<kMost - 1>(m, f);
  }
  f.template operator()<kMost>();
}

// Calls f<M> for tiles of rows, of at most kMost and all about as many: sums of few rows would wait
// for their last additions.
template <int kMost, typename F>
S2S_INLINE void over_rows(int64_t rows, F f) {
  for (int64_t tiles = (rows + kMost - 1) / kMost; tiles > 0; --tiles) {
    const int64_t m = (rows + tiles - 1) / tiles;
    of_rows<kMost>(m, f);
    rows -= m;
  }
}

// Calls f<N>(first column) for tiles of N vectors of a panel's columns. One row has more of them
// than lie in a line: eight at most where it may be `wide`, as two rows then have four.
template <bool wide, typename F>
S2S_INLINE void over_columns(int64_t rows, int64_t width, F f) {
  constexpr int kPerUnit = kBlock / kVec;  // vectors
  if (kPerUnit == 1 && width == 4 * kBlock) return f.template operator()<4>(0);
  if (kPerUnit == 1 && width == 3 * kBlock) return f.template operator()<3>(0);
  int64_t at = 0;
  if constexpr (wide) {
    if (rows == 1 && width == 8 * kVec) return f.template operator()<8>(0);
    if (rows == 1 && width == 6 * kVec) return f.template operator()<6>(0);
  }
  if (rows <= (wide ? 2 : 1))  // what is read must be read at once
    for (; at + 4 * kVec <= width; at += 4 * kVec) f.template operator()<4>(at);
  for (; at < width; at += kBlock) f.template operator()<kPerUnit>(at);
}

}  // namespace
}  // namespace seq2seq_fast
