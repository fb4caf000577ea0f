// What the attention decoder's forward and backward share on the CPU: packed weights, the source.
#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "../decoder_run.h"
#include "additive_scores.h"
#include "product.h"

namespace seq2seq_fast::decoder {

// Rows from the nth on of B, `width` numbers each and one behind the other, become zeros.
template <typename A>
void clear_rows(A* x, int64_t n, int64_t B, int64_t width) {
  std::fill(x + n * width, x + B * width, A(0));
}

// Each row becomes the bias, (W,) or (B, W).
void fill(const Tensor& out, const Tensor& bias);

struct Layer {
  Tensor w_input, w_hidden, bias;
};
std::vector<Layer> layers_of(const std::vector<Tensor>& x);

// Which outputs a panel holds: blocks ld_block apart, of `width` units each; the next panel begins
// `step` further on.
struct Layout {
  int64_t width, step, ld_block;
  static Layout plain(int64_t N) { return {N, kPanel, kBlock}; }
  // The gates of kBlock units, so that a panel makes all that they need.
  static Layout of(Cell cell, int64_t H) {
    return cell == Cell::kRnn ? plain(H) : Layout{H, kBlock, H};
  }
  int64_t panels() const { return (width + step - 1) / step; }
  int64_t units(int64_t p) const { return std::min(step, width - p * step); }
  int64_t used(int64_t p, int64_t j) const {
    const int64_t first = p * step + (step == kPanel ? j * kBlock : 0);
    return std::clamp<int64_t>(width - first, 0, kBlock);
  }
};

// The blocks of a layout that a weight has; of a cell, those of its gates: see cells.h.
struct Blocks {
  int64_t first = 0, count = kBlocks;
  static Blocks of_input(Cell cell) { return {0, cell == Cell::kGru ? 3 : kBlocks}; }
  static Blocks of_hidden(Cell cell) { return {cell == Cell::kGru ? 1 : 0, kBlocks}; }
};

// Whether weights are better read as they lie than copied into panels: for so many rows in all
// steps, where up to eight rows, which take as long as reading, count as eight.
constexpr int64_t kRowsInPlace = 64;
inline bool in_place(int64_t steps, int64_t rows) {
  return steps * std::max<int64_t>(rows, 8) <= kRowsInPlace;
}

// Weights w (N, K) in panels: product(p) makes a panel's outputs of a (m, K) w^T. Blocks
// that w does not have are zero.
template <typename A>
class Packed {
 public:
  // in_place: the rows of w are read as they are, which must be in one piece each.
  Packed(const Tensor& w, Layout layout, Blocks blocks = {}, bool in_place = false)
      : layout(layout),
        blocks_(blocks),
        w_(data<A>(w)),
        sn_(w.stride(0)),
        K_(w.size(1)),
        in_place_(in_place && sizeof(A) == 4 && w.stride(1) == 1),
        panels_(in_place_ ? 0 : layout.panels() * K_ * kPanel) {
    if (in_place_) return;
    const int64_t sn = sn_, sk = w.stride(1);
    parallel_in_turns(layout.panels(), 2 * K_ * kPanel, [&](int64_t p) {
      if (sn == 1 && layout.step == kPanel)
        return copy_rows(w_ + p * kPanel, sk, layout.units(p), panels_ + p * K_ * kPanel);
      for (int64_t j = 0; j < kBlocks; ++j) {
        const Part part = block(p, j);
        copy(part.first, sn, sk, part.n, panels_ + p * K_ * kPanel + j * kBlock);
      }
    });
  }

  // To columns of the whole product, from column 0 on; init likewise.
  void product(int64_t p, const A* a, int64_t lda, int64_t m, const A* init, int64_t ld_init,
               A* out, int64_t ldo) const {
    const int64_t column = p * layout.step;
    run(p, a, lda, m, K_, init ? init + column : nullptr, ld_init, layout.ld_block, out + column,
        ldo, layout.ld_block);
  }
  // To a tile (m, kPanel), of a's first K columns. init: columns of the whole product, or null for
  // what the tile holds.
  void to_tile(int64_t p, const A* a, int64_t lda, int64_t m, const A* init, int64_t ld_init,
               A* tile, int64_t K) const {
    if (init)
      run(p, a, lda, m, K, init + p * layout.step, ld_init, layout.ld_block, tile, kPanel, kBlock);
    else
      run(p, a, lda, m, K, tile, kPanel, kBlock, tile, kPanel, kBlock);
  }
  int64_t K() const { return K_; }
  // Of a row and a panel, in what `parallel` counts: 16 multiply-adds take the time of one.
  int64_t operations() const { return K_ * kPanel / 16; }

  const Layout layout;

 private:
  // Rows of w whose products are a panel's block.
  struct Part {
    const A* first;
    int64_t n;
  };
  Part block(int64_t p, int64_t j) const {
    const bool there = j >= blocks_.first && j < blocks_.first + blocks_.count;
    const int64_t n = there ? layout.used(p, j) : 0;
    return {n > 0 ? w_ + (p * layout.step + (j - blocks_.first) * layout.ld_block) * sn_ : w_, n};
  }

  // A whole panel, to (K, kPanel), = rows (K, n), sk apart, and zeros.
  void copy_rows(const A* rows, int64_t sk, int64_t n, A* to) const {
    for (int64_t k = 0; k < K_; ++k, rows += sk, to += kPanel) {
      if (n == kPanel) {
        std::memcpy(to, rows, kPanel * sizeof(A));
      } else {
        std::fill(std::copy_n(rows, n, to), to + kPanel, A(0));
      }
    }
  }
  // to (K, kBlock), kPanel apart, = n rows (n, K) transposed, and zeros.
  void copy(const A* rows, int64_t sn, int64_t sk, int64_t n, A* to) const {
    if (sizeof(A) == 4 && sk == 1 && sn != 1)
      loops.transpose(reinterpret_cast<const float*>(rows), sn, n, K_, reinterpret_cast<float*>(to),
                      kPanel);
    for (int64_t k = 0; k < K_; ++k, to += kPanel) {
      if (sn == 1)
        std::copy_n(rows + k * sk, n, to);
      else if (sizeof(A) != 4 || sk != 1)
        for (int64_t i = 0; i < n; ++i) to[i] = rows[i * sn + k * sk];
      std::fill(to + n, to + kBlock, A(0));
    }
  }

  void run(int64_t p, const A* a, int64_t lda, int64_t m, int64_t K, const A* init, int64_t ld_init,
           int64_t block_init, A* out, int64_t ldo, int64_t block_out) const {
    if constexpr (sizeof(A) == 4) {
      for (int64_t j = 0; in_place_ && j < kBlocks; ++j) {
        const Part part = block(p, j);
        product_in_place(a, lda, m, K, part.first, sn_, part.n,
                         init ? init + j * block_init : nullptr, ld_init, out + j * block_out, ldo,
                         layout.used(p, j));
      }
      if (in_place_) return;
    }
    int64_t used[kBlocks];
    for (int64_t j = 0; j < kBlocks; ++j) used[j] = layout.used(p, j);
    const auto go = [&](auto* loop) {
      loop(a, lda, m, K, panels_ + p * K_ * kPanel, init, ld_init, block_init, out, ldo, block_out,
           used);
    };
    if constexpr (sizeof(A) == 4)
      go(loops.panel);
    else
      go(loops.panel_double);
  }

  const Blocks blocks_;
  const A* const w_;
  const int64_t sn_, K_;
  const bool in_place_;
  Buffer<A> panels_;
};

// Calls f(panel, first row, rows) for all panels and rows, in parallel.
template <typename F>
void over_panels(int64_t panels, int64_t rows, int64_t operations_of_a_row, F f) {
  if (panels == 0 || rows == 0) return;
  const int64_t wanted = 2 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t chunks = std::clamp<int64_t>(wanted / panels, 1, (rows + kBlock - 1) / kBlock);
  const int64_t each = (rows + chunks - 1) / chunks;
  const int64_t operations = std::max(each, kRowsOfReading) * operations_of_a_row;
  parallel_in_turns(panels * chunks, operations, [&](int64_t i) {
    const int64_t first = i % chunks * each, n = std::min(each, rows - first);
    if (n > 0) f(i / chunks, first, n);
  });
}

// Weights (O, H + D) of the attentional vector, over [output; context], or their parts transposed.
template <typename A>
struct OfVector {
  Packed<A> output, context;
  OfVector(const Tensor& w_output, Layout of_output, const Tensor& w_context, Layout of_context,
           bool in_place = false)
      : output(w_output, of_output, Blocks{}, in_place),
        context(w_context, of_context, Blocks{}, in_place) {}
};

// What is attended to.
struct Source {
  Tensor w_context, w_query, b_query, keys, values, v;
  std::optional<Keys> prepared;  // in float32
  std::optional<Tensor> mask;

  // Keys are not prepared where the scores are not of query and keys alone.
  Source(const std::vector<Tensor>& attention, const std::optional<Tensor>& mask,
         const std::optional<Tensor>& powers, bool prepare = true);
  // query (B, A) to context (B, D) and weights (B, S)
  void attend(const Tensor& query, const Tensor& context, const Tensor& weights) const;
  // Gradients of the scores (B, S) and the query, from those of context and weights.
  void attend_backward(const Tensor& dcontext, const Tensor& dweights, const Tensor& query,
                       const Tensor& weights, const Tensor& dscores, const Tensor& dquery) const;
};

}  // namespace seq2seq_fast::decoder
