// One step of a recurrent cell, forward and backward, for a number or a vector V of units; V needs
// sigmoid and tanh, from vec.h if it is one of its vectors. Gates come in blocks of H: i f g o
// (LSTM), n r z m (GRU, m the hidden state's part of n) or h (RNN).
#pragma once
#include <cmath>

#include "loops.h"

namespace seq2seq_fast {

namespace {

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
inline double tanh(double x) { return std::tanh(x); }

// What a unit reads and writes: gates before their nonlinearities in, after them out.
template <typename V>
struct Unit {
  V gates[4];
  V hidden_before, cell_before, hidden, cell;
};

template <Cell kCell, typename V>
inline __attribute__((always_inline)) void advance(Unit<V>& u) {
  if constexpr (kCell == Cell::kLstm) {
    auto& [i, f, g, o] = u.gates;
    i = sigmoid(i);
    f = sigmoid(f);
    g = tanh(g);
    o = sigmoid(o);
    u.cell = f * u.cell_before + i * g;
    u.hidden = o * tanh(u.cell);
  } else if constexpr (kCell == Cell::kGru) {
    auto& [n, r, z, m] = u.gates;
    r = sigmoid(r);
    z = sigmoid(z);
    n = tanh(n + r * m);
    u.hidden = n + z * (u.hidden_before - n);
  } else {
    u.hidden = u.gates[0] = tanh(u.gates[0]);
  }
}

// From the gradients of the unit's hidden and cell state, those of its gates before their
// nonlinearities, and what goes to the states before the step without passing the gates.
template <Cell kCell, typename V>
inline __attribute__((always_inline)) void retreat(const Unit<V>& u, V& dh, V& dc, V dgates[4]) {
  if constexpr (kCell == Cell::kLstm) {
    const auto& [i, f, g, o] = u.gates;
    const V y = tanh(u.cell);
    dc += dh * o * (1.f - y * y);
    dgates[0] = dc * g * i * (1.f - i);
    dgates[1] = dc * u.cell_before * f * (1.f - f);
    dgates[2] = dc * i * (1.f - g * g);
    dgates[3] = dh * y * o * (1.f - o);
    dc = dc * f;
    dh = V{};
  } else if constexpr (kCell == Cell::kGru) {
    const auto& [n, r, z, m] = u.gates;
    const V dn = dh * (1.f - z) * (1.f - n * n);
    dgates[0] = dn;
    dgates[1] = dn * m * r * (1.f - r);
    dgates[2] = dh * (u.hidden_before - n) * z * (1.f - z);
    dgates[3] = dn * r;
    dh = dh * z;
  } else {
    dgates[0] = dh * (1.f - u.gates[0] * u.gates[0]);
    dh = V{};
  }
}

// Calls f<cell>.
template <typename F>
inline __attribute__((always_inline)) void with_cell(Cell cell, F f) {
  if (cell == Cell::kLstm) return f.template operator()<Cell::kLstm>();
  if (cell == Cell::kGru) return f.template operator()<Cell::kGru>();
  f.template operator()<Cell::kRnn>();
}

}  // namespace
}  // namespace seq2seq_fast
