// Greedy decoding in one launch: teams of blocks go through the steps together, see team.cuh, until
// all of a team's rows have ended.
//
// A step of L layers is L + 3 phases, after each of which a team meets: the query's product,
// attention, each layer's product and cell, and the readout, whose columns' owners leave the
// largest of their logits and the sum of their exponentials. One warp for each row makes a token of
// these, beside attention if that comes first in a step, and else in a phase of its own.
#pragma once
#include "choice.cuh"
#include "team_steps.cuh"

namespace seq2seq_fast {

constexpr int kStepsBetweenLooks = 4;  // at whether all rows have ended

// What a member finds among its logits of a row.
struct alignas(16) Found {
  Peak peak;
  Best best;
};

struct GreedyArguments {
  Cell cell_type;
  Team team;
  TeamProduct query, layers[kMostLoopLayers], readout;
  const float *b_query, *bias[kMostLoopLayers], *b_readout;
  const float* embedding;  // (V, E)
  // Before the first step: (L, B, H) and (B, D), the latter null where it is zero
  const float *hidden, *cell, *context;
  // (2, L, B, H) of steps by turns, (L, B, H), (B, D), (B, A), (B, E), (B, V), (B, members)
  float *hiddens, *cells, *contexts, *queries, *inputs, *logits;
  Found* found;
  OneQueryArguments attention;
  bool keeps_weights;  // (T, B, S), else one step's
  // Of each row: whether it goes on, and its log-probability; its tokens (B, T), and the rest
  int* live;
  double* log_prob;
  int64_t *tokens, *lengths;
  float *log_probs, *scores;
  bool* finished;
  const int64_t *limits, *prefix;  // (B,) or null: T; (B, P)
  const int64_t* bos_of_rows;      // (B,) or null: bos
  double length_penalty;
  int T, B, L, H, E, A, D, V, P;
  int bos, eos, fill, min_length;
  bool attends, query_after, by_four;
};

class Greedy {
 public:
  __device__ explicit Greedy(const GreedyArguments& a) : a_(a), member_(a.team, a.B) {
    if (a.attends) keep_weights(a.query, member_);
    for (int l = 0; l < a.L; ++l) keep_weights(a.layers[l], member_);
    keep_weights(a.readout, member_);
    wait_for_weights();
  }

  __device__ __forceinline__ void run() {
    const bool before = a_.attends && !a_.query_after;
    for_own_rows([&](int row) { begin(row); });
    for (int t = 0; t < a_.T; ++t) {
      if (before) {
        attend(t, t, t - 1);
      } else {
        if (t > 0) for_own_rows([&](int row) { choose(row, t - 1); });
        member_.meet();
      }
      if (t > 0 && t % kStepsBetweenLooks == 0 && !any_live()) return;
      for (int l = 0; l < a_.L; ++l) advance(l, t);
      if (a_.attends && a_.query_after) attend(t, t + 1, -1);
      read_out(t);
    }
    for_own_rows([&](int row) { choose(row, a_.T - 1); });
  }

 private:
  // Tokens are made by the members that are the last to attend.
  template <typename F>
  __device__ __forceinline__ void for_own_rows(const F& f) {
    const int warp = threadIdx.x / kWarp, from_last = a_.team.size - 1 - member_.index;
    for (int i = from_last + warp * a_.team.size; i < member_.n_rows;
         i += kTeamWarps * a_.team.size)
      f(member_.row0 + i);
  }

  __device__ __forceinline__ FloatRows state(int l, int t) const {
    const int64_t layer = static_cast<int64_t>(l) * a_.B * a_.H;
    const int64_t of_step = static_cast<int64_t>(t % 2) * a_.L * a_.B * a_.H;
    return {t == 0 ? const_cast<float*>(a_.hidden) + layer : a_.hiddens + of_step + layer, a_.H};
  }
  __device__ __forceinline__ const float* context(bool first) const {
    return !a_.attends || first ? a_.context : a_.contexts;
  }

  __device__ __forceinline__ bool any_live() const {
    int live = 0;
    for (int i = threadIdx.x; i < member_.n_rows; i += kTeamThreads)
      live |= __ldcg(a_.live + member_.row0 + i);
    return __syncthreads_or(live);
  }

  __device__ __forceinline__ void feed(int row, int token) const {
    const float* const from = a_.embedding + static_cast<int64_t>(token) * a_.E;
    for (int e = threadIdx.x % kWarp; e < a_.E; e += kWarp)
      a_.inputs[static_cast<int64_t>(row) * a_.E + e] = from[e];
  }

  __device__ __forceinline__ void begin(int row) const {
    feed(row, a_.bos_of_rows == nullptr ? a_.bos : static_cast<int>(a_.bos_of_rows[row]));
    for (int t = threadIdx.x % kWarp; t < a_.T; t += kWarp)
      a_.tokens[static_cast<int64_t>(row) * a_.T + t] = a_.fill;
    if (threadIdx.x % kWarp == 0) a_.live[row] = 1, a_.log_prob[row] = 0;
  }

  // The query is the top layer's hidden state before step `at`. Beside attention the tokens of step
  // `chosen` are made, if that is not negative.
  __device__ __forceinline__ void attend(int t, int at, int chosen) {
    const Columns x{state(a_.L - 1, at).data, {}, a_.H};
    team_product<true>(
        a_.query, member_,
        [&](int row, int unit, const auto& sum) {
          a_.queries[static_cast<int64_t>(row) * a_.A + unit] = sum(0) + a_.b_query[unit];
        },
        a_.by_four, x);
    member_.meet();
    const int64_t step = a_.keeps_weights ? int64_t{t} * a_.B : 0;
    const int n = member_.n_rows * a_.attention.ranges;
    for (int i = member_.index; i < n; i += a_.team.size) {
      attend_in_loop(a_.attention, i, member_.row0, 0, step, 0, a_.team.memory);
      __syncthreads();
    }
    if (chosen >= 0) for_own_rows([&](int row) { choose(row, chosen); });
    ask_for_weights(a_.query_after ? a_.readout : a_.layers[0], member_);
    member_.meet();
  }

  __device__ __forceinline__ void advance(int l, int t) {
    const FloatRows before = state(l, t);
    CellArguments c{};
    c.bias = {const_cast<float*>(a_.bias[l]), 0};
    c.hidden_before = before, c.hidden = state(l, t + 1);
    if (a_.cell_type == Cell::kLstm) {
      const int64_t layer = static_cast<int64_t>(l) * a_.B * a_.H;
      c.cell = {a_.cells + layer, a_.H};
      c.cell_before = t == 0 ? FloatRows{const_cast<float*>(a_.cell) + layer, a_.H} : c.cell;
    }
    c.H = a_.H;
    const auto finish = [&](int row, int unit, const auto& sum) {
      advance_in_loop(a_.cell_type, c, row, unit, sum);
    };
    const Columns own{before.data, {}, a_.H};
    const Columns x{l == 0 ? a_.inputs : state(l - 1, t + 1).data, {}, l == 0 ? a_.E : a_.H};
    const Columns of_context{context(t == 0 && a_.query_after), {}, l == 0 ? a_.D : 0};
    team_product<true>(a_.layers[l], member_, finish, a_.by_four, x, of_context, own);
    if (l + 1 < a_.L)
      ask_for_weights(a_.layers[l + 1], member_);
    else
      ask_for_weights(a_.attends && a_.query_after ? a_.query : a_.readout, member_);
    member_.meet();
  }

  __device__ __forceinline__ void read_out(int t) {
    const Columns of_context{context(false), {}, a_.D}, top{state(a_.L - 1, t + 1).data, {}, a_.H};
    team_product<true>(
        a_.readout, member_,
        [&](int row, int unit, const auto& sum) {
          a_.logits[static_cast<int64_t>(row) * a_.V + unit] = sum(0) + a_.b_readout[unit];
        },
        a_.by_four, of_context, top);
    __syncthreads();
    const int lane = threadIdx.x % kWarp, first = a_.readout.first_unit(member_);
    const int end = first + a_.readout.n_units(member_);
    for (int i = threadIdx.x / kWarp; i < member_.n_rows; i += kTeamWarps) {
      const int row = member_.row0 + i;
      const float* const logits = a_.logits + static_cast<int64_t>(row) * a_.V;
      Found mine{{-INFINITY, 0.f}, {-INFINITY, a_.V}};
      constexpr int kAtOnce = 8;  // reads on their way before the first is waited for
      for (int v0 = first + lane; v0 < end; v0 += kAtOnce * kWarp) {
        float x[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int v = v0 + i * kWarp;
          x[i] = v < end ? __ldcg(logits + v) : -INFINITY;
        }
        mine.peak.add(x);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int v = v0 + i * kWarp;
          const Best here{v == a_.eos && t + 1 < a_.min_length ? -INFINITY : x[i], v};
          if (v < end && here.before(mine.best)) mine.best = here;
        }
      }
      mine = joined(mine);
      if (lane == 0) a_.found[static_cast<int64_t>(row) * a_.team.size + member_.index] = mine;
    }
    ask_for_weights(a_.attends && !a_.query_after ? a_.query : a_.layers[0], member_);
    member_.meet();
  }

  // Of all lanes, for all of them.
  __device__ __forceinline__ static Found joined(Found mine) {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      const Best other{__shfl_xor_sync(kAll, mine.best.value, lanes), shuffle(mine.best.at, lanes)};
      if (other.before(mine.best)) mine.best = other;
      mine.peak.join({__shfl_xor_sync(kAll, mine.peak.top, lanes),
                      __shfl_xor_sync(kAll, mine.peak.sum, lanes)});
    }
    return mine;
  }

  // By a warp: the row's token of step t, and what comes of it.
  __device__ __forceinline__ void choose(int row, int t) const {
    if (a_.live[row] == 0) return;
    const int lane = threadIdx.x % kWarp;
    Found all{{-INFINITY, 0.f}, {-INFINITY, a_.V}};
    for (int i = lane; i < a_.team.size; i += kWarp) {
      const int64_t at = static_cast<int64_t>(row) * a_.team.size + i;
      const float4 x = __ldcg(reinterpret_cast<const float4*>(a_.found + at));
      const Best other{x.z, static_cast<int>(__float_as_uint(x.w))};
      if (other.before(all.best)) all.best = other;
      all.peak.join({x.x, x.y});
    }
    all = joined(all);
    const float* const logits = a_.logits + static_cast<int64_t>(row) * a_.V;
    if (t < a_.P) {
      all.best.at = static_cast<int>(a_.prefix[static_cast<int64_t>(row) * a_.P + t]);
      all.best.value = __ldcg(logits + all.best.at);
    } else if (all.best.value == -INFINITY && __ldcg(logits + a_.eos) != -INFINITY) {
      all.best = {__ldcg(logits + a_.eos), a_.eos};  // nothing else is left
    }
    const int token = all.best.at, length = t + 1;
    feed(row, token);
    __syncwarp();  // all lanes have read what one of them writes
    if (lane != 0) return;
    // The two roundings of torch's log_softmax.
    a_.log_prob[row] += (all.best.value - all.peak.top) - logf(all.peak.sum);
    a_.tokens[static_cast<int64_t>(row) * a_.T + t] = token;
    const bool finished = token == a_.eos && t >= a_.P;
    if (!finished && length < (a_.limits == nullptr ? a_.T : a_.limits[row])) return;
    const double penalty = pow((5.0 + length) / 6.0, a_.length_penalty);
    a_.live[row] = 0;
    a_.lengths[row] = length;
    a_.log_probs[row] = static_cast<float>(a_.log_prob[row]);
    a_.scores[row] = static_cast<float>(a_.log_prob[row] / penalty);
    a_.finished[row] = finished;
  }

  const GreedyArguments& a_;
  Member member_;
};

static __global__ void __launch_bounds__(kTeamThreads, 1)
    decode_greedy(const __grid_constant__ GreedyArguments a) {
  Greedy(a).run();
}

}  // namespace seq2seq_fast
