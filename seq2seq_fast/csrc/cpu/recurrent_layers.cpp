// An encoder's recurrent layers over a whole source, with weights packed for decoding.
//
// All steps' products with the input are one product. What is left of a step is one with the hidden
// state, whose weights stay in the threads' caches: few rows are what this is for.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "packed_product.h"

namespace seq2seq_fast {
namespace {

constexpr int64_t kTensors = 5;  // of a layer: matrix and scales of both parts, bias

struct Layer {
  Matrix input, hidden;
  const float* bias;
  explicit Layer(const PackedTensor* x)
      : input(x[0], x[1]), hidden(x[2], x[3]), bias(floats(x[4])) {}
};

// The rows of a batch and how long they are, as a PackedSequence has them: the longest first, and
// of each step those that are not over, one behind the other.
struct Sequences {
  std::vector<int64_t> row, length;  // of each place: the batch's row, and its steps
  std::vector<int64_t> rows, first;  // of each step: how many, and how many of the steps before

  Sequences(const std::optional<Tensor>& lengths, int64_t B, int64_t T) : row(B), length(B, T) {
    std::iota(row.begin(), row.end(), 0);
    if (lengths) sort_by(*lengths, B, T);
    first.push_back(0);
    for (int64_t t = 0, n = B; t < T; ++t) {
      while (n > 0 && length[n - 1] <= t) --n;
      if (n == 0) break;
      rows.push_back(n);
      first.push_back(first.back() + n);
    }
  }
  int64_t steps() const { return static_cast<int64_t>(rows.size()); }
  int64_t total() const { return first.back(); }

 private:
  void sort_by(const Tensor& lengths, int64_t B, int64_t T) {
    STD_TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == B && lengths.is_contiguous() &&
                        lengths.scalar_type() == ScalarType::Long,
                    "expected lengths (B,), int64");
    const auto* n = static_cast<const int64_t*>(lengths.data_ptr());
    for (int64_t b = 0; b < B; ++b)
      STD_TORCH_CHECK(n[b] >= 0 && n[b] <= T, "expected lengths from 0 to T");
    std::stable_sort(row.begin(), row.end(), [&](int64_t a, int64_t b) { return n[a] > n[b]; });
    for (int64_t i = 0; i < B; ++i) length[i] = n[row[i]];
  }
};

// One layer in one direction, over all steps.
class Recurrence {
 public:
  Recurrence(const PackedTensor* weights, Cell cell, const Tensor& x, const Sequences& sequences,
             int64_t H, bool backwards)
      : layer_(weights),
        cell_(cell),
        sequences_(sequences),
        N_(sequences.total()),
        B_(x.size(0)),
        H_(H),
        panels_(layer_.hidden.panels),
        unit_(cell == Cell::kRnn ? kPanel : kBlock),
        Hp_(panels_ * unit_),
        width_(blocks_of(cell) * unit_),
        backwards_(backwards),
        outputs_(empty(x, {N_, Hp_})),
        memory_(empty(x, {cell == Cell::kLstm ? B_ : 0, Hp_})) {
    STD_TORCH_CHECK(layer_.input.panels == panels_ && layer_.hidden.K == H && Hp_ >= H,
                    "expected weights of one layer");
  }

  // inputs: (N, K), side by side
  void run(const Operand& a, const Operand& b) {
    STD_TORCH_CHECK(layer_.input.K == a.K + b.K, "expected inputs as wide as a layer's weights");
    const Buffer<float> gates(panels_ * N_ * width_);  // before their nonlinearities
    const Factor inputs(layer_.input, N_, a, b);
    const int64_t parts = (N_ + kRowsTogether - 1) / kRowsTogether;
    parallel_in_turns(panels_ * parts, layer_.input.operations(kRowsTogether), [&](int64_t i) {
      const int64_t p = i / parts, first = i % parts * kRowsTogether;
      const int64_t rows = std::min(kRowsTogether, N_ - first), width = layer_.input.width;
      const float* bias = layer_.bias + p * width_;
      float* out = gates + (p * N_ + first) * width_;
      inputs.multiply(p, first, rows, {bias, 0, out, width_});
      for (int64_t m = 0; width < width_ && m < rows; ++m)  // of a GRU, whose n has two parts
        std::copy_n(bias + width, width_ - width, out + m * width_ + width);
    });
    const Buffer<float> begun(B_ * Hp_);  // states where a step has more rows than that before
    std::fill_n(cells(), memory_.numel(), 0.f);
    const float* before = begun;
    for (int64_t i = 0, known = 0; i < sequences_.steps(); ++i) {
      const int64_t t = backwards_ ? sequences_.steps() - 1 - i : i, rows = sequences_.rows[t];
      if (rows > known) {
        std::copy_n(before, known * Hp_, +begun);
        std::fill_n(begun + known * Hp_, (rows - known) * Hp_, 0.f);
        before = begun;
      }
      step(rows, gates + sequences_.first[t] * width_, before, at(t), i % 2 == 1);
      before = at(t);
      known = rows;
    }
  }

  Operand outputs() const { return {at(0), Hp_, H_}; }  // (N, H)
  // After the last of a row's steps, of which it has one at least
  const float* hidden(int64_t place) const {
    return at(backwards_ ? 0 : sequences_.length[place] - 1) + place * Hp_;
  }
  const float* memory(int64_t place) const { return cells() + place * Hp_; }

 private:
  float* at(int64_t t) const {
    return static_cast<float*>(outputs_.data_ptr()) + sequences_.first[t] * Hp_;
  }
  float* cells() const { return static_cast<float*>(memory_.data_ptr()); }

  // gates: a panel's N rows from this step on, the next panel's behind them. Of few rows' weights
  // what was read last is still in the second level of the cache: `turned` goes the other way.
  void step(int64_t rows, float* gates, const float* before, float* after, bool turned) {
    const Factor states(layer_.hidden, rows, {before, Hp_, H_});
    over_pieces(panels_, layer_.hidden.operations(rows), rows, turned, [&](int64_t p) {
      for (int64_t first = 0; first < rows; first += kRowsTogether) {
        const int64_t n = std::min(kRowsTogether, rows - first);
        float* raw = gates + (p * N_ + first) * width_;
        float* last = raw + width_ - layer_.hidden.width;
        states.multiply(p, first, n, {last, width_, last, width_});
        const int64_t place = first * Hp_ + p * unit_;
        float* memory = cell_ == Cell::kLstm ? cells() + place : nullptr;
        loops.advance(cell_, {n, unit_, raw, width_, raw, width_, kBlock, before + place, memory,
                              after + place, memory, Hp_});
      }
    });
  }

  const Layer layer_;
  const Cell cell_;
  const Sequences& sequences_;
  const int64_t N_, B_, H_, panels_, unit_, Hp_, width_;
  const bool backwards_;
  const Tensor outputs_, memory_;  // not buffers, as the layer behind takes its own before these go
};

// n numbers of a row, or zeros if it has no steps
void copy_or_clear(const float* from, bool any, int64_t n, float* to) {
  any ? std::copy_n(from, n, to) : std::fill_n(to, n, 0.f);
}

// x (B, T, E) to outputs (B, T, directions H), hidden and cell (layers directions, B, H) as torch
// has them, of packed sequences where there are lengths (B,); cell is empty but of an LSTM.
std::tuple<Tensor, Tensor, Tensor> recurrent_layers(Tensor x, std::optional<Tensor> lengths,
                                                    Tensor packed, Tensor layout,
                                                    std::string cell_type, int64_t H,
                                                    bool bidirectional) {
  const Cell cell = cell_of(cell_type);
  const int64_t B = x.size(0), T = x.size(1), E = x.size(2), directions = bidirectional ? 2 : 1;
  const std::vector<PackedTensor> weights = packed_tensors(packed, layout);
  const auto n = static_cast<int64_t>(weights.size()) / kTensors;
  STD_TORCH_CHECK(
      n > 0 && n * kTensors == static_cast<int64_t>(weights.size()) && n % directions == 0 && T > 0,
      "expected the weights of whole layers, and a source");
  const Sequences sequences(lengths, B, T);
  Tensor outputs = empty(x, {B, T, directions * H}), hidden = empty(x, {n, B, H});
  Tensor memory = cell == Cell::kLstm ? empty(x, {n, B, H}) : empty(x, {0});
  auto *out = static_cast<float*>(outputs.data_ptr()), *h = static_cast<float*>(hidden.data_ptr()),
       *c = static_cast<float*>(memory.data_ptr());
  const Buffer<float> embedded(sequences.total() * E);
  for (int64_t t = 0; t < sequences.steps(); ++t)
    for (int64_t i = 0; i < sequences.rows[t]; ++i)
      std::copy_n(floats(x) + (sequences.row[i] * T + t) * E, E,
                  embedded + (sequences.first[t] + i) * E);
  Operand inputs[2] = {{embedded, E, E}, {}};
  std::vector<Recurrence> layer, below;
  for (int64_t l = 0; l < n; l += directions) {
    below = std::move(layer);
    layer.clear();
    for (int64_t j = l; j < l + directions; ++j) {
      layer.emplace_back(weights.data() + j * kTensors, cell, x, sequences, H, j > l);
      layer.back().run(inputs[0], inputs[1]);
      for (int64_t i = 0; i < B; ++i) {
        const bool any = sequences.length[i] > 0;
        const int64_t to = (j * B + sequences.row[i]) * H;
        copy_or_clear(any ? layer.back().hidden(i) : nullptr, any, H, h + to);
        if (cell == Cell::kLstm) copy_or_clear(layer.back().memory(i), any, H, c + to);
      }
    }
    for (int64_t d = 0; d < directions; ++d) inputs[d] = layer[d].outputs();
  }
  for (int64_t i = 0; i < B; ++i)
    for (int64_t t = 0; t < T; ++t)
      for (int64_t d = 0; d < directions; ++d) {
        const bool any = t < sequences.length[i];
        const float* from = any ? inputs[d].x + (sequences.first[t] + i) * inputs[d].ld : nullptr;
        copy_or_clear(from, any, H, out + ((sequences.row[i] * T + t) * directions + d) * H);
      }
  return {outputs, hidden, memory};
}

}  // namespace
}  // namespace seq2seq_fast

STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast, CPU, m) {
  m.impl("recurrent_layers", TORCH_BOX(&seq2seq_fast::recurrent_layers));
}
