// One step of a recurrent cell, forward and backward, behind and before the product with its
// weights. Gates come in blocks of H: i f g o (LSTM), n r z m (GRU, m the hidden state's part of n)
// or h (RNN).
//
// Grid: a thread for each unit of each row. A step has few units, so that one to a thread, which
// neighbours read side by side, waits for memory once; wider loads would leave processors idle.
#pragma once
#include "../cell.h"
#include "device.cuh"

namespace seq2seq_fast {

constexpr int kCellThreads = 128;
template <Cell cell>
constexpr int kBlocksOf = blocks_of(cell);

struct CellArguments {
  // Parts of the gates before their nonlinearities, each (B, G); `input`, which may be absent and
  // lie where `gates` do, lacks the block m of a GRU.
  FloatRows product, input, bias;
  FloatRows hidden_before, cell_before;  // (B, H)
  FloatRows gates;                       // (B, G), after their nonlinearities, or absent
  FloatRows hidden, cell;                // (B, H), after the step
  // Where else the hidden state goes, if anywhere: its place in the next step's product, and, times
  // `factors` (B, H) unless absent, in the next layer's.
  FloatRows to_self, to_next, factors;
  FloatRows kept;  // factors (B, H) of the hidden state, wherever it goes, or absent
  int B, H;
};

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// A unit's step, given its gates' part that comes of the product.
template <Cell cell>
__device__ __forceinline__ void advance_unit(const CellArguments& a, int b, int h,
                                             float (&x)[kBlocksOf<cell>]) {
  constexpr int kBlocks = kBlocksOf<cell>, kInputBlocks = cell == Cell::kGru ? 3 : kBlocks;
#pragma unroll
  for (int k = 0; k < kBlocks; ++k) {
    x[k] += a.bias(b, k * a.H + h);
    if (k < kInputBlocks) x[k] += a.input.get(b, k * a.H + h);
  }
  float y;
  if constexpr (cell == Cell::kLstm) {
    x[0] = sigmoid(x[0]);
    x[1] = sigmoid(x[1]);
    x[2] = tanhf(x[2]);
    x[3] = sigmoid(x[3]);
    const float memory = x[1] * a.cell_before(b, h) + x[0] * x[2];
    a.cell(b, h) = memory;
    y = x[3] * tanhf(memory);
  } else if constexpr (cell == Cell::kGru) {
    x[1] = sigmoid(x[1]);
    x[2] = sigmoid(x[2]);
    x[0] = tanhf(x[0] + x[1] * x[3]);
    y = x[0] + x[2] * (a.hidden_before(b, h) - x[0]);
  } else {
    y = x[0] = tanhf(x[0]);
  }
  if (a.gates.data != nullptr)
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) a.gates(b, k * a.H + h) = x[k];
  if (a.kept.data != nullptr) y *= a.kept(b, h);
  a.hidden(b, h) = y;
  if (a.to_self.data != nullptr) a.to_self(b, h) = y;
  if (a.to_next.data != nullptr)
    a.to_next(b, h) = a.factors.data == nullptr ? y : y * a.factors(b, h);
}

template <Cell cell>
__global__ void __launch_bounds__(kCellThreads) advance_cell(CellArguments a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCellThreads + threadIdx.x;
  const int b = i / a.H, h = i % a.H;
  if (b >= a.B) return;
  float x[kBlocksOf<cell>];
#pragma unroll
  for (int k = 0; k < kBlocksOf<cell>; ++k) x[k] = a.product(b, k * a.H + h);
  advance_unit<cell>(a, b, h, x);
}

// Parts of the gradient of a hidden state (B, H), any of which may be absent: what passed the gates
// of the next step by; of the products that read the state, in the next step, in the next layer
// (times `factors`), and to make a query; of the output.
struct HiddenGradient {
  FloatRows passed, self, next, factors, query, output;
  __device__ __forceinline__ float operator()(int b, int h) const {
    const float of_next = next.get(b, h);
    const float later = passed.get(b, h) + self.get(b, h) + query.get(b, h) + output.get(b, h);
    return later + (factors.data == nullptr ? of_next : of_next * factors(b, h));
  }
};

struct CellBackwardArguments {
  HiddenGradient grad;
  FloatRows gates;                             // (B, G), after their nonlinearities
  FloatRows hidden_before, cell_before, cell;  // (B, H)
  FloatRows grad_cell;   // (B, H), of the cell state after the step, then before
  FloatRows grad_gates;  // (B, G), before their nonlinearities
  FloatRows passed;      // (B, H), what passes the gates by; of a GRU alone
  FloatRows kept;        // as forward
  int B, H;
};

// A unit's step, given its hidden state's gradient, which `a.grad` may be a part of.
template <Cell cell>
__device__ __forceinline__ void retreat_unit(const CellBackwardArguments& a, int b, int h,
                                             float dh) {
  constexpr int kBlocks = kBlocksOf<cell>;
  float x[kBlocks], dx[kBlocks];
#pragma unroll
  for (int k = 0; k < kBlocks; ++k) x[k] = a.gates(b, k * a.H + h);
  if constexpr (cell == Cell::kLstm) {
    const float y = tanhf(a.cell(b, h));
    const float dc = a.grad_cell(b, h) + dh * x[3] * (1.f - y * y);
    dx[0] = dc * x[2] * x[0] * (1.f - x[0]);
    dx[1] = dc * a.cell_before(b, h) * x[1] * (1.f - x[1]);
    dx[2] = dc * x[0] * (1.f - x[2] * x[2]);
    dx[3] = dh * y * x[3] * (1.f - x[3]);
    a.grad_cell(b, h) = dc * x[1];
  } else if constexpr (cell == Cell::kGru) {
    const float dn = dh * (1.f - x[2]) * (1.f - x[0] * x[0]);
    dx[0] = dn;
    dx[1] = dn * x[3] * x[1] * (1.f - x[1]);
    dx[2] = dh * (a.hidden_before(b, h) - x[0]) * x[2] * (1.f - x[2]);
    dx[3] = dn * x[1];
    a.passed(b, h) = dh * x[2];
  } else {
    dx[0] = dh * (1.f - x[0] * x[0]);
  }
#pragma unroll
  for (int k = 0; k < kBlocks; ++k) a.grad_gates(b, k * a.H + h) = dx[k];
}

template <Cell cell>
__global__ void __launch_bounds__(kCellThreads) retreat_cell(CellBackwardArguments a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCellThreads + threadIdx.x;
  const int b = i / a.H, h = i % a.H;
  if (b < a.B)
    retreat_unit<cell>(a, b, h, a.grad(b, h) * (a.kept.data == nullptr ? 1.f : a.kept(b, h)));
}

struct SumArguments {
  HiddenGradient grad;
  FloatRows sum;  // (B, H)
  int B, H;
};

// x (B, H) times factors, in place
struct ScaleArguments {
  FloatRows x, factors;
  int B, H;
};

// Attentional vectors behind the product that they are made by, and their gradient before it.
struct VectorArguments {
  FloatRows product, bias;  // (B, O), and (O,) for all rows
  FloatRows factors;        // of dropout, or absent
  // where it goes: its place, and that in the next step's product, which may be absent
  FloatRows vector, to_input;
  int B, O;
  bool tanh;
};

struct VectorBackwardArguments {
  FloatRows given, carried;  // gradients: from outside, and from the next step, which may be absent
  FloatRows factors, vector;  // as forward
  FloatRows grad;             // before the activation
  int B, O;
  bool tanh;
};

}  // namespace seq2seq_fast
