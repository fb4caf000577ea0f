// The attention decoder's recurrence backward in one launch: teams of blocks go through the steps
// together, the last one first.
//
// A step of L layers is L + 2 phases, after each of which a team meets: attention, which is two
// where members share rows, the query's product, and for each layer, the top one first, the product
// of its gates' gradient with its weights. Where such a sum goes to another layer's state, its
// owner makes that cell's step at once: of the layer below, or, with the query's product, of the
// top layer.
#pragma once
#include "cells.cuh"
#include "one_query_backward.cuh"
#include "team.cuh"

namespace seq2seq_fast {

struct DecoderBackwardLoopArguments {
  Cell cell;
  Team team;
  // The columns of layer 0 are those of [context | hidden state]; above there are two kinds for
  // each unit, of the layer below and of its own.
  TeamProduct query, layers[kMostLoopLayers];
  // What the last product gave: to each layer's own state (B, H); in layer 0, behind the context's,
  // (B, D + H); from the first query to the state before the first step (B, H).
  FloatRows self[kMostLoopLayers], lowest, of_query;
  // (T, B, H), (L, T + 1, B, H), (L, T, B, G), (L - 1, T, B, H)
  float *grad_outputs, *hiddens, *cells, *gates, *dropout;
  float *grad_gates, *grad_queries, *grad_hidden, *grad_cell;  // (T, B, A), (L, B, H)
  OneQueryBackwardArguments attention;                         // of all steps
  int T, B, L, H, G, A;
  bool query_after, by_four;

  __device__ __forceinline__ FloatRows rows(float* of, int i, int width) const {
    return rows_at(of, i, B, width);
  }
};

// Inlined, so that it reads the kernel's arguments as constants: by an address they would come
// through a cache that every meeting empties.
__device__ __forceinline__ void retreat_query_in_loop(const OneQueryBackwardArguments& a,
                                                      Stage stage, int b, int row, int part,
                                                      int memory) {
  retreat_one_query<kTeamWarps>(a, stage, b, row, part, shared_memory() + memory);
}

// A cell's step, given what a product that has just been made adds to the gradient of its state.
// Not inlined, as make_sums is not, which leaves registers to each.
static __device__ __noinline__ void retreat_unit_in_loop(const DecoderBackwardLoopArguments& a,
                                                         int l, int t, int row, int unit,
                                                         float of_product) {
  const bool last = t + 1 == a.T;
  CellBackwardArguments c{};
  c.passed = a.rows(a.grad_hidden, l, a.H);
  if (last || a.cell == Cell::kGru) c.grad.passed = c.passed;
  if (!last) c.grad.self = a.self[l];
  if (l + 1 == a.L) c.grad.output = a.rows(a.grad_outputs, t, a.H);
  c.gates = a.rows(a.gates, l * a.T + t, a.G);
  c.grad_gates = a.rows(a.grad_gates, l * a.T + t, a.G);
  c.hidden_before = a.rows(a.hiddens, l * (a.T + 1) + t, a.H);
  if (a.cell == Cell::kLstm) {
    c.cell_before = a.rows(a.cells, l * (a.T + 1) + t, a.H);
    c.cell = a.rows(a.cells, l * (a.T + 1) + t + 1, a.H);
    c.grad_cell = a.rows(a.grad_cell, l, a.H);
  }
  c.H = a.H;
  const float grad = c.grad(row, unit) + of_product;
  if (a.cell == Cell::kLstm)
    retreat_unit<Cell::kLstm>(c, row, unit, grad);
  else if (a.cell == Cell::kGru)
    retreat_unit<Cell::kGru>(c, row, unit, grad);
  else
    retreat_unit<Cell::kRnn>(c, row, unit, grad);
}

class DecoderBackwardLoop {
 public:
  __device__ DecoderBackwardLoop(const DecoderBackwardLoopArguments& a)
      : a_(a), member_(a.team, a.B) {
    keep_weights(a.query, member_);
    for (int l = 0; l < a.L; ++l) keep_weights(a.layers[l], member_);
    wait_for_weights();
  }

  __device__ __forceinline__ void run() {
    if (!a_.query_after) begin();
    for (int t = a_.T - 1; t >= 0; --t) {
      if (a_.query_after) attend(t, t);
      for (int l = a_.L - 1; l >= 0; --l) multiply(l, t);
      if (!a_.query_after) attend(t, t - 1);
    }
  }

 private:
  // The last state of the top layer, which no query reads.
  __device__ __forceinline__ void begin() {
    const int first = a_.query.first_unit(member_), n = a_.query.n_units(member_);
    for (int i = threadIdx.x; i < member_.n_rows * n; i += kTeamThreads)
      retreat_unit_in_loop(a_, a_.L - 1, a_.T - 1, member_.row0 + i / n, first + i % n, 0.f);
    member_.meet();
  }

  // Step t's query is made of the state after step `state`.
  __device__ __forceinline__ void attend(int t, int state) {
    const OneQueryBackwardArguments& of = a_.attention;
    const bool shared = of.of_weights.data != nullptr;
    for (int i = 0; i < (shared ? 2 : 1); ++i) {
      const Stage stage = !shared ? Stage::kAll : i == 0 ? Stage::kValues : Stage::kSlopes;
      const int parts = !shared ? 1 : i == 0 ? of.ranges : of.slices;
      for (int j = member_.index; j < member_.n_rows * parts; j += a_.team.size) {
        const int b = member_.row0 + j / parts;
        retreat_query_in_loop(of, stage, b, t * a_.B + b, j % parts, a_.team.memory);
      }
      member_.meet();
    }
    const Columns x{a_.rows(a_.grad_queries, t, a_.A).data, {}, a_.A};
    team_product(
        a_.query, member_,
        [&](int row, int unit, const auto& sum) {
          if (state >= 0)
            retreat_unit_in_loop(a_, a_.L - 1, state, row, unit, sum(0));
          else
            a_.of_query(row, unit) = sum(0);
        },
        a_.by_four, x);
    member_.meet();
  }

  __device__ __forceinline__ void multiply(int l, int t) {
    const Columns x{a_.rows(a_.grad_gates, l * a_.T + t, a_.G).data, {}, a_.G};
    if (l > 0) {
      const FloatRows self = a_.self[l];
      FloatRows factors{};
      if (a_.dropout != nullptr) factors = a_.rows(a_.dropout, (l - 1) * a_.T + t, a_.H);
      team_product(
          a_.layers[l], member_,
          [&](int row, int unit, const auto& sum) {
            self(row, unit) = sum(1);
            float below = sum(0);
            if (factors.data != nullptr) below *= factors(row, unit);
            retreat_unit_in_loop(a_, l - 1, t, row, unit, below);
          },
          a_.by_four, x);
    } else {
      team_product(
          a_.layers[0], member_,
          [&](int row, int column, const auto& sum) { a_.lowest(row, column) = sum(0); },
          a_.by_four, x);
    }
    member_.meet();
  }

  const DecoderBackwardLoopArguments& a_;
  Member member_;
};

static __global__ void __launch_bounds__(kTeamThreads, 1)
    decoder_backward_loop(const __grid_constant__ DecoderBackwardLoopArguments a) {
  DecoderBackwardLoop(a).run();
}

}  // namespace seq2seq_fast
