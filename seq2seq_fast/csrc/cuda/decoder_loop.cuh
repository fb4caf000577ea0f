// The attention decoder's recurrence in one launch: teams of blocks go through the steps together.
//
// A step of L layers is L + 2 phases, after each of which a team meets: the query's product,
// attention, and for each layer the product of [x | hidden state] with its weights, whose columns'
// owner makes the cell's step of its units at once.
#pragma once
#include "team_steps.cuh"

namespace seq2seq_fast {

struct DecoderLoopArguments {
  Cell cell;
  Team team;
  TeamProduct query, layers[kMostLoopLayers];
  const float* b_query;             // (A,)
  FloatRows bias[kMostLoopLayers];  // (B, G), ld 0: (G,)
  // (L, T + 1, B, H), (L, T, B, G), (T, B, A), (T + 1, B, D), (L - 1, T, B, H)
  float *hiddens, *cells, *gates, *queries, *contexts;
  const float* dropout;
  OneQueryArguments attention;  // of all steps
  int begin, end;               // steps
  int T, B, L, H, G, A, D;
  bool attends, query_after, by_four;
};

class DecoderLoop {
 public:
  __device__ DecoderLoop(const DecoderLoopArguments& a) : a_(a), member_(a.team, a.B) {
    if (a.attends) keep_weights(a.query, member_);
    for (int l = 0; l < a.L; ++l) keep_weights(a.layers[l], member_);
    wait_for_weights();
  }

  __device__ __forceinline__ void run() {
    for (int t = a_.begin; t < a_.end; ++t) {
      if (a_.attends && !a_.query_after) attend(t, t);
      for (int l = 0; l < a_.L; ++l) advance(l, t);
      if (a_.attends && a_.query_after) attend(t, t + 1);
    }
  }

 private:
  __device__ __forceinline__ FloatRows rows(float* of, int i, int width) const {
    return rows_at(of, i, a_.B, width);
  }
  __device__ __forceinline__ FloatRows state(float* of, int l, int t) const {
    return rows(of, l * (a_.T + 1) + t, a_.H);
  }

  __device__ __forceinline__ void attend(int t, int at) {
    const FloatRows queries = rows(a_.queries, t, a_.A);
    const Columns x{state(a_.hiddens, a_.L - 1, at).data, {}, a_.H};
    team_product(
        a_.query, member_,
        [&](int row, int unit, const auto& sum) { queries(row, unit) = sum(0) + a_.b_query[unit]; },
        a_.by_four, x);
    member_.meet();
    const int64_t step = int64_t{t} * a_.B;
    const int n = member_.n_rows * a_.attention.ranges;
    for (int i = member_.index; i < n; i += a_.team.size) {
      attend_in_loop(a_.attention, i, member_.row0, t, step, step, a_.team.memory);
      __syncthreads();
    }
    member_.meet();
  }

  __device__ __forceinline__ void advance(int l, int t) {
    const FloatRows before = state(a_.hiddens, l, t);
    Columns x{{}, {}, l > 0 ? a_.H : a_.attends ? a_.D : 0};
    const Columns own{before.data, {}, a_.H};
    if (l > 0) {
      x.rows = state(a_.hiddens, l - 1, t + 1).data;
      if (a_.dropout != nullptr) x.factors = a_.dropout + (int64_t{l - 1} * a_.T + t) * a_.B * a_.H;
    } else if (a_.attends) {
      x.rows = rows(a_.contexts, a_.query_after ? t : t + 1, a_.D).data;
    }
    CellArguments c{};
    c.bias = a_.bias[l];
    c.gates = rows(a_.gates, l * a_.T + t, a_.G);
    if (l == 0) c.input = c.gates;
    c.hidden_before = before, c.hidden = state(a_.hiddens, l, t + 1);
    if (a_.cell == Cell::kLstm)
      c.cell_before = state(a_.cells, l, t), c.cell = state(a_.cells, l, t + 1);
    c.H = a_.H;
    team_product(
        a_.layers[l], member_,
        [&](int row, int unit, const auto& sum) { advance_in_loop(a_.cell, c, row, unit, sum); },
        a_.by_four, x, own);
    member_.meet();
  }

  const DecoderLoopArguments& a_;
  Member member_;
};

static __global__ void __launch_bounds__(kTeamThreads, 1)
    decoder_loop(const __grid_constant__ DecoderLoopArguments a) {
  DecoderLoop(a).run();
}

}  // namespace seq2seq_fast
