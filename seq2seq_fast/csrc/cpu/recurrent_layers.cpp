// An encoder's recurrent layers over a whole source, with weights packed for decoding.
//
// All steps' products with the input are one product. What is left of a step is one with the hidden
// state, whose weights stay in the threads' caches: few rows are what this is for.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "packed_product.h"

namespace seq2seq_fast {
namespace {

constexpr int64_t kRowsTogether = 48;  // of a panel's gates, which then stay in cache
constexpr int64_t kTensors = 5;        // of a layer: matrix and scales of both parts, bias

struct Layer {
  Matrix input, hidden;
  const float* bias;
  explicit Layer(const PackedTensor* x)
      : input(x[0], x[1]), hidden(x[2], x[3]), bias(floats(x[4])) {}
};

// One layer in one direction, over T steps of B rows. Rows lie step by step.
class Recurrence {
 public:
  Recurrence(const PackedTensor* weights, Cell cell, const Tensor& x, int64_t H, bool backwards)
      : layer_(weights),
        cell_(cell),
        T_(x.size(1)),
        B_(x.size(0)),
        H_(H),
        panels_(layer_.hidden.panels),
        unit_(cell == Cell::kRnn ? kPanel : kBlock),
        Hp_(panels_ * unit_),
        width_(blocks_of(cell) * unit_),
        backwards_(backwards),
        outputs_(empty(x, {T_ * B_, Hp_})),
        memory_(empty(x, {cell == Cell::kLstm ? B_ : 0, Hp_})) {
    STD_TORCH_CHECK(layer_.input.panels == panels_ && layer_.hidden.K == H && Hp_ >= H,
                    "expected weights of one layer");
  }

  // inputs: (T B, K), side by side
  void run(const Operand& a, const Operand& b) {
    STD_TORCH_CHECK(layer_.input.K == a.K + b.K, "expected inputs as wide as a layer's weights");
    const Buffer<float> gates(panels_ * T_ * B_ * width_);  // before their nonlinearities
    const Factor inputs(layer_.input, T_ * B_, a, b);
    const int64_t parts = (T_ * B_ + kRowsTogether - 1) / kRowsTogether;
    parallel_in_turns(panels_ * parts, layer_.input.operations(kRowsTogether), [&](int64_t i) {
      const int64_t p = i / parts, first = i % parts * kRowsTogether;
      const int64_t rows = std::min(kRowsTogether, T_ * B_ - first), width = layer_.input.width;
      const float* bias = layer_.bias + p * width_;
      float* out = gates + (p * T_ * B_ + first) * width_;
      inputs.multiply(p, first, rows, {bias, 0, out, width_});
      for (int64_t m = 0; width < width_ && m < rows; ++m)  // of a GRU, whose n has two parts
        std::copy_n(bias + width, width_ - width, out + m * width_ + width);
    });
    const Buffer<float> zeros(B_ * Hp_);
    std::fill_n(+zeros, B_ * Hp_, 0.f);
    std::fill_n(cells(), memory_.numel(), 0.f);
    const float* before = zeros;
    for (int64_t i = 0; i < T_; ++i) {
      const int64_t t = backwards_ ? T_ - 1 - i : i;
      step(gates + t * B_ * width_, before, at(t), i % 2 == 1);
      before = at(t);
    }
  }

  Operand outputs() const { return {at(0), Hp_, H_}; }  // (T B, H)
  // (B, H) after the last step
  Operand hidden() const { return {at(backwards_ ? 0 : T_ - 1), Hp_, H_}; }
  Operand memory() const { return {cells(), Hp_, H_}; }

 private:
  float* at(int64_t t) const { return static_cast<float*>(outputs_.data_ptr()) + t * B_ * Hp_; }
  float* cells() const { return static_cast<float*>(memory_.data_ptr()); }

  // gates: a panel's T B rows from this step on, the next panel's behind them. Of few rows' weights
  // what was read last is still in the second level of the cache: `turned` goes the other way.
  void step(float* gates, const float* before, float* after, bool turned) {
    const Factor states(layer_.hidden, B_, {before, Hp_, H_});
    over_pieces(panels_, layer_.hidden.operations(B_), B_, turned, [&](int64_t p) {
      for (int64_t first = 0; first < B_; first += kRowsTogether) {
        const int64_t n = std::min(kRowsTogether, B_ - first);
        float* raw = gates + (p * T_ * B_ + first) * width_;
        float* last = raw + width_ - layer_.hidden.width;
        states.multiply(p, first, n, {last, width_, last, width_});
        for (int64_t m = first; m < first + n; ++m, raw += width_) {
          const int64_t place = m * Hp_ + p * unit_;
          float* memory = cell_ == Cell::kLstm ? cells() + place : nullptr;
          loops.advance(cell_, raw, before + place, memory, unit_, raw, kBlock, after + place,
                        memory);
        }
      }
    });
  }

  const Layer layer_;
  const Cell cell_;
  const int64_t T_, B_, H_, panels_, unit_, Hp_, width_;
  const bool backwards_;
  const Tensor outputs_, memory_;  // not buffers, as the layer behind takes its own before these go
};

void copy_rows(const Operand& from, int64_t n, float* to, int64_t ld) {
  for (int64_t i = 0; i < n; ++i) std::copy_n(from.x + i * from.ld, from.K, to + i * ld);
}

// x (B, T, E) to outputs (B, T, directions H), hidden and cell (layers directions, B, H) as torch
// has them; cell is empty but of an LSTM.
std::tuple<Tensor, Tensor, Tensor> recurrent_layers(Tensor x, Tensor packed, Tensor layout,
                                                    std::string cell_type, int64_t H,
                                                    bool bidirectional) {
  const Cell cell = cell_of(cell_type);
  const int64_t B = x.size(0), T = x.size(1), E = x.size(2), directions = bidirectional ? 2 : 1;
  const std::vector<PackedTensor> weights = packed_tensors(packed, layout);
  const auto n = static_cast<int64_t>(weights.size()) / kTensors;
  STD_TORCH_CHECK(
      n > 0 && n * kTensors == static_cast<int64_t>(weights.size()) && n % directions == 0 && T > 0,
      "expected the weights of whole layers, and a source");
  Tensor outputs = empty(x, {B, T, directions * H}), hidden = empty(x, {n, B, H});
  Tensor memory = cell == Cell::kLstm ? empty(x, {n, B, H}) : empty(x, {0});
  auto *out = static_cast<float*>(outputs.data_ptr()), *h = static_cast<float*>(hidden.data_ptr()),
       *c = static_cast<float*>(memory.data_ptr());
  const Buffer<float> embedded(T * B * E);
  for (int64_t b = 0; b < B; ++b)
    copy_rows({floats(x) + b * T * E, E, E}, T, embedded + b * E, B * E);
  Operand inputs[2] = {{embedded, E, E}, {}};
  std::vector<Recurrence> layer, below;
  for (int64_t i = 0; i < n; i += directions) {
    below = std::move(layer);
    layer.clear();
    for (int64_t j = i; j < i + directions; ++j) {
      layer.emplace_back(weights.data() + j * kTensors, cell, x, H, j > i);
      layer.back().run(inputs[0], inputs[1]);
      copy_rows(layer.back().hidden(), B, h + j * B * H, H);
      if (cell == Cell::kLstm) copy_rows(layer.back().memory(), B, c + j * B * H, H);
    }
    for (int64_t d = 0; d < directions; ++d) inputs[d] = layer[d].outputs();
  }
  for (int64_t b = 0; b < B; ++b)
    for (int64_t d = 0; d < directions; ++d)
      copy_rows({inputs[d].x + b * inputs[d].ld, B * inputs[d].ld, H}, T,
                out + (b * T * directions + d) * H, directions * H);
  return {outputs, hidden, memory};
}

}  // namespace
}  // namespace seq2seq_fast

STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast, CPU, m) {
  m.impl("recurrent_layers", TORCH_BOX(&seq2seq_fast::recurrent_layers));
}
