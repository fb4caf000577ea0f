// The inner loops of recurrent cells. See loops.h.
#pragma once
#include "vec.h"
//
#include "cells.h"

namespace seq2seq_fast {
namespace {

template <Cell kCell>
S2S_INLINE void advance_rows(const CellRows<float>& x) {
  for (int64_t row = 0; row < x.rows; ++row) {
    const float* raw = x.raw + row * x.ld_raw;
    float* gates = x.gates + row * x.ld_gates;
    const int64_t state = row * x.ld;
    for (int64_t h = 0; h < x.units; h += kVec) {
      const int64_t n = x.units - h < kVec ? x.units - h : kVec, at = state + h;
      Unit<Vec> u;
      for (int i = 0; i < blocks_of(kCell); ++i) u.gates[i] = load_some(raw + i * kBlock + h, n);
      if constexpr (kCell == Cell::kLstm) u.cell_before = load_some(x.cell_before + at, n);
      if constexpr (kCell == Cell::kGru) u.hidden_before = load_some(x.hidden_before + at, n);
      advance<kCell>(u);
      for (int i = 0; i < blocks_of(kCell); ++i) store_some(gates + i * x.H + h, u.gates[i], n);
      if constexpr (kCell == Cell::kLstm) store_some(x.memory + at, u.cell, n);
      store_some(x.hidden + at, u.hidden, n);
    }
  }
}

template <Cell kCell>
S2S_INLINE void retreat_units(const float* gates, int64_t H, const float* hidden_before,
                              const float* cell_before, const float* memory, int64_t units,
                              float* dh, float* dc, float* dgates) {
  for (int64_t h = 0; h < units; h += kVec) {
    const int64_t n = units - h < kVec ? units - h : kVec;
    Unit<Vec> u;
    Vec out[4], gh = load_some(dh + h, n), gc = {};
    for (int i = 0; i < blocks_of(kCell); ++i) u.gates[i] = load_some(gates + i * H + h, n);
    if constexpr (kCell == Cell::kGru) u.hidden_before = load_some(hidden_before + h, n);
    if constexpr (kCell == Cell::kLstm) {
      u.cell_before = load_some(cell_before + h, n);
      u.cell = load_some(memory + h, n);
      gc = load_some(dc + h, n);
    }
    retreat<kCell>(u, gh, gc, out);
    for (int i = 0; i < blocks_of(kCell); ++i) store_some(dgates + i * H + h, out[i], n);
    if constexpr (kCell == Cell::kLstm) store_some(dc + h, gc, n);
    store_some(dh + h, gh, n);
  }
}

void advance_cell(Cell cell, const CellRows<float>& rows) {
  with_cell(cell, [&]<Cell kCell>() S2S_LAMBDA { advance_rows<kCell>(rows); });
}

void retreat_cell(Cell cell, const float* gates, int64_t H, const float* hidden_before,
                  const float* cell_before, const float* memory, int64_t n, float* dh, float* dc,
                  float* dgates) {
  with_cell(cell, [&]<Cell kCell>() S2S_LAMBDA {
    retreat_units<kCell>(gates, H, hidden_before, cell_before, memory, n, dh, dc, dgates);
  });
}

}  // namespace
}  // namespace seq2seq_fast
