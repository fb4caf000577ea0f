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

template <typename A>
void launch(const Device& device, void (*kernel)(A), const A& a) {
  device.launch(kernel, ceil_div(int64_t{a.B} * a.H, kCellThreads), dim3(kCellThreads), 0, a);
}

}  // namespace

void launch_advance(const Device& device, Cell cell, const CellArguments& a) {
  launch(device,
         cell == Cell::kLstm  ? advance_cell<Cell::kLstm>
         : cell == Cell::kGru ? advance_cell<Cell::kGru>
                              : advance_cell<Cell::kRnn>,
         a);
}

void launch_retreat(const Device& device, Cell cell, const CellBackwardArguments& a) {
  launch(device,
         cell == Cell::kLstm  ? retreat_cell<Cell::kLstm>
         : cell == Cell::kGru ? retreat_cell<Cell::kGru>
                              : retreat_cell<Cell::kRnn>,
         a);
}

void launch_sum(const Device& device, const SumArguments& a) { launch(device, sum_gradient, a); }

}  // namespace seq2seq_fast
