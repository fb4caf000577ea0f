// Launches of cells.cuh.
#include "cells.h"

namespace seq2seq_fast {
namespace {

// The gradient of the state before the first step.
__global__ void __launch_bounds__(kCellThreads) sum_gradient(SumArguments a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCellThreads + threadIdx.x;
  const int b = i / a.H, h = i % a.H;
  if (b < a.B) a.sum(b, h) = a.grad(b, h);
}

__global__ void __launch_bounds__(kCellThreads) scale(ScaleArguments a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCellThreads + threadIdx.x;
  const int b = i / a.H, h = i % a.H;
  if (b < a.B) a.x(b, h) *= a.factors(b, h);
}

__global__ void __launch_bounds__(kCellThreads) make_vector(VectorArguments a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCellThreads + threadIdx.x;
  const int b = i / a.O, n = i % a.O;
  if (b >= a.B) return;
  float y = a.product(b, n) + a.bias(b, n);
  if (a.tanh) y = tanhf(y);
  if (a.factors.data != nullptr) y *= a.factors(b, n);
  a.vector(b, n) = y;
  if (a.to_input.data != nullptr) a.to_input(b, n) = y;
}

__global__ void __launch_bounds__(kCellThreads) retreat_vector(VectorBackwardArguments a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCellThreads + threadIdx.x;
  const int b = i / a.O, n = i % a.O;
  if (b >= a.B) return;
  const float factor = a.factors.data == nullptr ? 1.f : a.factors(b, n);
  const float y = factor != 0.f ? a.vector(b, n) / factor : 0.f;  // before dropout
  const float d = (a.given(b, n) + a.carried.get(b, n)) * factor;
  a.grad(b, n) = a.tanh ? d * (1.f - y * y) : d;
}

template <typename A>
void launch(const Device& device, void (*kernel)(A), const A& a, int width) {
  device.launch(kernel, ceil_div(int64_t{a.B} * width, kCellThreads), dim3(kCellThreads), 0, a);
}

}  // namespace

void launch_advance(const Device& device, Cell cell, const CellArguments& a) {
  launch(device,
         cell == Cell::kLstm  ? advance_cell<Cell::kLstm>
         : cell == Cell::kGru ? advance_cell<Cell::kGru>
                              : advance_cell<Cell::kRnn>,
         a, a.H);
}

void launch_retreat(const Device& device, Cell cell, const CellBackwardArguments& a) {
  launch(device,
         cell == Cell::kLstm  ? retreat_cell<Cell::kLstm>
         : cell == Cell::kGru ? retreat_cell<Cell::kGru>
                              : retreat_cell<Cell::kRnn>,
         a, a.H);
}

void launch_sum(const Device& device, const SumArguments& a) {
  launch(device, sum_gradient, a, a.H);
}
void launch_scale(const Device& device, const ScaleArguments& a) { launch(device, scale, a, a.H); }
void launch_vector(const Device& device, const VectorArguments& a) {
  launch(device, make_vector, a, a.O);
}
void launch_vector_backward(const Device& device, const VectorBackwardArguments& a) {
  launch(device, retreat_vector, a, a.O);
}

}  // namespace seq2seq_fast
