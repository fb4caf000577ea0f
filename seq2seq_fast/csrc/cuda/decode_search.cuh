// Greedy decoding, sampling and beam search, as seq2seq_fast/decoding/stepwise.py has them, over a
// state that stays on the GPU, so that steps follow each other without the host.
//
// Hypothesis k of source b is row b K + k of all that has rows. Those of a source that go on are
// the first `live[b]` of its K rows, best first; the others rest, whatever stands in them.
#pragma once
#include "sampling.cuh"

namespace seq2seq_fast {

constexpr int kFollowThreads = 256;
constexpr int kRankWarps = 16, kRankThreads = kWarp * kRankWarps;
constexpr int kTraceThreads = 64;

// N hypotheses of each source that have ended, (B, N), the best first.
struct Ended {
  int *length, *row, *token, *finished;  // the step, row and token of its last node
  double *log_prob, *score;
};

struct Search {
  int *step, *over;       // the last step begun; how many sources are through
  int *live, *ended;      // (B,) how many hypotheses of a source go on, and have ended
  int *token, *parent;    // (M,) of the next step: what a row is fed, and which row it goes on from
  double* log_prob;       // (M,)
  int *tokens, *parents;  // (T, M) the same of all steps: the tree of hypotheses
  Ended best;
  int M, K, N, T;
  __device__ __forceinline__ bool rests(int m) const { return m % K >= live[m / K]; }
};

// Begins a step: rows take over the states of those they go on from, and their tokens' embeddings.
struct FollowArguments {
  Search search;
  View embedding;              // (1, V, E)
  FloatRows input;             // (M, E), of the first layer's operand
  FloatRows context, to;       // (M, D); D is 0 where the step makes its own context
  const float *hidden, *cell;  // (L, M, H) after the last step; cells of an LSTM
  FloatRows lowest, upper;     // (M, H), where hidden states go: of the first layer's operand, and
  int64_t upper_stride;        // of the others', so far apart
  float* cell_before;          // (L, M, H)
  const float* covered;        // (M, S); S is 0 where no coverage is asked for
  float* covered_before;
  int L, H, E, D, S;
};

static __global__ void __launch_bounds__(kFollowThreads) follow(FollowArguments a) {
  const int parts = static_cast<int>(ceil_div(a.E + a.D + a.L * a.H + a.S, kFollowThreads));
  const int m = blockIdx.x / parts;
  int i = blockIdx.x % parts * kFollowThreads + threadIdx.x;
  if (blockIdx.x == 0 && threadIdx.x == 0) ++*a.search.step;
  if (a.search.rests(m)) return;
  const int parent = a.search.parent[m];
  if (i < a.E) {
    a.input(m, i) = a.embedding(0, a.search.token[m], i);
    return;
  }
  i -= a.E;
  if (i < a.D) {
    a.to(m, i) = a.context(parent, i);
    return;
  }
  i -= a.D;
  if (i < a.L * a.H) {
    const int l = i / a.H, h = i % a.H;
    const int64_t layer = static_cast<int64_t>(l) * a.search.M;
    const float state = a.hidden[(layer + parent) * a.H + h];
    if (l == 0)
      a.lowest(m, h) = state;
    else
      (&a.upper(m, h))[(l - 1) * a.upper_stride] = state;
    if (a.cell != nullptr)
      a.cell_before[(layer + m) * a.H + h] = a.cell[(layer + parent) * a.H + h];
    return;
  }
  i -= a.L * a.H;
  if (i < a.S)
    a.covered_before[static_cast<int64_t>(m) * a.S + i] =
        a.covered[static_cast<int64_t>(parent) * a.S + i];
}

struct SearchRules {
  int eos, min_length, ngram, P;
  const double* penalties;  // (T + 1,), lp of each length
  double coverage_penalty;
  const int64_t *limits, *prefix;  // (B,), (B, P)
};

struct RankArguments {
  Search search;
  SearchRules rules;
  Draw draw;
  float* logits;      // (M, V), without their bias
  const float* bias;  // (V,)
  int V;
  int* path;  // (M, T), room for a row's tokens so far
  // The 2 K best continuations of each row, the best first, and how many there are.
  double* candidate_log_probs;
  int *candidates, *found;
  // Attention: what is kept of a step's weights (M, S), if anything.
  const float *weights, *covered_before;
  float *kept, *covered;  // (T, M, S), (M, S), or null
  double* coverage;       // (M,) the penalty
  const uint8_t* mask;    // (B, S), or null
  int64_t mask_stride[2];
  int S;
};

// A place among continuations: by value, and of equals the first. `at` of none is V.
struct Choice {
  float value;
  int at;
  __device__ __forceinline__ bool before(const Choice& other) const {
    return value > other.value || (value == other.value && at < other.at);
  }
};

__device__ __forceinline__ Choice first_of_block(Choice mine, float* scratch) {
  return join_block<kRankWarps>(
      mine, scratch, [](const Choice& a, const Choice& b) { return b.before(a) ? b : a; });
}

__device__ __forceinline__ Peak peak_of_block(Peak mine, float* scratch) {
  return join_block<kRankWarps>(mine, scratch, [](Peak a, const Peak& b) {
    a.join(b);
    return a;
  });
}

// A hypothesis has ended with this step. Among equals those that were there come first, and
// finished ones before all others.
__device__ __forceinline__ void end(const RankArguments& a, int b, int row, int token,
                                    double log_prob, bool finished) {
  const int length = *a.search.step + 1, N = a.search.N;
  double score = log_prob / a.rules.penalties[length];
  if (a.covered != nullptr) score += a.coverage[row];
  const Ended& best = a.search.best;
  const int64_t first = static_cast<int64_t>(b) * N;
  int place = a.search.ended[b];
  const auto comes_after = [&](int64_t i) {
    return (best.finished[i] != 0) == finished ? best.score[i] < score : finished;
  };
  if (place == N && !comes_after(first + N - 1)) return;
  if (place < N)
    ++a.search.ended[b];
  else
    --place;
  for (; place > 0 && comes_after(first + place - 1); --place) {
    const int64_t i = first + place;
    best.length[i] = best.length[i - 1], best.row[i] = best.row[i - 1];
    best.token[i] = best.token[i - 1], best.finished[i] = best.finished[i - 1];
    best.log_prob[i] = best.log_prob[i - 1], best.score[i] = best.score[i - 1];
  }
  const int64_t i = first + place;
  best.length[i] = length, best.row[i] = row, best.token[i] = token;
  best.finished[i] = finished, best.log_prob[i] = log_prob, best.score[i] = score;
}

// Row `m` of the next step goes on from `row` with a token.
__device__ __forceinline__ void go_on(const RankArguments& a, int m, int row, int token,
                                      double log_prob) {
  const int64_t node = static_cast<int64_t>(*a.search.step) * a.search.M + m;
  a.search.tokens[node] = a.search.token[m] = token;
  a.search.parents[node] = a.search.parent[m] = row;
  a.search.log_prob[m] = log_prob;
}

// What is left of a source's search after a step that `next` hypotheses have come out of.
__device__ __forceinline__ void close_step(const RankArguments& a, int b, int next) {
  const Search& search = a.search;
  const int length = *search.step + 1;
  const int64_t limit = a.rules.limits[b], first = static_cast<int64_t>(b) * search.K;
  if (length == limit) {
    for (int64_t m = first; m < first + next; ++m)
      end(a, b, search.parent[m], search.token[m], search.log_prob[m], false);
    next = 0;
  }
  if (next > 0 && search.ended[b] == search.N) {  // see stepwise.py: Ended.complete
    const int64_t worst = static_cast<int64_t>(b + 1) * search.N - 1;
    const double bound = search.log_prob[first] / a.rules.penalties[limit];
    if (search.best.finished[worst] && search.best.score[worst] >= bound) next = 0;
  }
  search.live[b] = next;
  if (next == 0) atomicAdd(reinterpret_cast<unsigned*>(search.over), 1u);
}

// Keeps the step's weights, and adds them up to what has been covered.
__device__ __forceinline__ void keep_weights(const RankArguments& a, int m, float* scratch) {
  const int64_t row = static_cast<int64_t>(m) * a.S;
  const int64_t kept = static_cast<int64_t>(*a.search.step) * a.search.M * a.S + row;
  double sum = 0;
  for (int s = threadIdx.x; s < a.S; s += kRankThreads) {
    const float w = a.weights[row + s];
    if (a.kept != nullptr) a.kept[kept + s] = w;
    if (a.covered == nullptr) continue;
    const float covered = a.covered_before[row + s] + w;
    a.covered[row + s] = covered;
    const int64_t at = m / a.search.K * a.mask_stride[0] + s * a.mask_stride[1];
    if (a.mask == nullptr || a.mask[at] != 0)
      sum += log(static_cast<double>(fminf(fmaxf(covered, 1.17549435e-38f), 1.f)));
  }
  if (a.covered == nullptr) return;
  sum = join_block<kRankWarps>(sum, scratch, [](double x, double y) { return x + y; });
  if (threadIdx.x == 0) a.coverage[m] = a.rules.coverage_penalty * sum;
}

// Sets the logits of what must not follow to -inf.
__device__ __forceinline__ void bar(const RankArguments& a, int m, float* logits) {
  const int t = *a.search.step, n = a.rules.ngram;
  if (t + 1 < a.rules.min_length && threadIdx.x == 0) logits[a.rules.eos] = -INFINITY;
  if (n == 0 || t < n) return;
  int* const path = a.path + static_cast<int64_t>(m) * a.search.T;
  if (threadIdx.x == 0)
    for (int step = t - 1, at = m; step >= 0; --step) {
      const int64_t node = static_cast<int64_t>(step) * a.search.M + at;
      path[step] = a.search.tokens[node];
      at = a.search.parents[node];
    }
  __syncthreads();
  for (int first = threadIdx.x; first + n <= t; first += kRankThreads) {
    bool again = true;
    for (int i = 0; i < n - 1; ++i) again = again && path[first + i] == path[t - n + 1 + i];
    if (again) store_alike(logits + path[first + n - 1], -INFINITY);
  }
}

// Grid: a block for each row. Its best continuations; if there is but one row to a source, greedy
// or with tokens that are drawn, that is the source's whole step.
template <bool greedy, bool draws = false>
static __global__ void __launch_bounds__(kRankThreads, 1) rank(RankArguments a) {
  const int m = blockIdx.x, b = m / a.search.K, thread = threadIdx.x, V = a.V;
  if (a.search.rests(m)) return;
  float* const scratch = shared_memory();
  float* const logits = a.logits + static_cast<int64_t>(m) * V;
  const int t = *a.search.step;
  if (a.S > 0) keep_weights(a, m, scratch);

  Peak mine = {-INFINITY, 0.f};
  constexpr int kAtOnce = 8;  // reads on their way before the first is waited for
  for (int v0 = thread; v0 < V; v0 += kAtOnce * kRankThreads) {
    float x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int v = v0 + i * kRankThreads;
      x[i] = v < V ? logits[v] + a.bias[v] : -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (const int v = v0 + i * kRankThreads; v < V) logits[v] = x[i];
    mine.add(x);
  }
  const Peak all = peak_of_block(mine, scratch);
  // The two roundings of torch's log_softmax.
  const float log_sum = logf(all.sum);
  const auto log_p = [&](int v) { return (logits[v] - all.top) - log_sum; };
  const double so_far = thread == 0 ? a.search.log_prob[m] : 0.;  // which thread 0 will write
  const int64_t first = static_cast<int64_t>(m) * 2 * a.search.K;
  const auto propose = [&](int rank, int token) {
    a.candidate_log_probs[first + rank] = so_far + log_p(token);
    a.candidates[first + rank] = token;
  };

  if (t < a.rules.P) {
    if (thread != 0) return;
    const int token = static_cast<int>(a.rules.prefix[static_cast<int64_t>(b) * a.rules.P + t]);
    if constexpr (greedy) {
      go_on(a, m, m, token, so_far + log_p(token));
      close_step(a, b, 1);
    } else {
      propose(0, token);
      a.found[m] = a.candidate_log_probs[first] > -INFINITY;
    }
    return;
  }
  const float eos_logit = logits[a.rules.eos];
  if constexpr (greedy) {
    const float eos_log_p = log_p(a.rules.eos);
    __syncthreads();
    bar(a, m, logits);
    __syncthreads();
    if constexpr (draws) {
      Cut<kRankWarps> cut(logits, V, scratch);
      if (a.draw.top_k > 0 && a.draw.top_k < V) cut.keep_largest(a.draw.top_k);
      if (a.draw.top_p < 1) cut.keep_share(a.draw.top_p, a.draw.scale);
    }
    const auto value = [&](int v) {
      if constexpr (draws) return a.draw.scale * logits[v] + gumbel(*a.draw.seed, m, t, v);
      return logits[v];
    };
    // NaN before all: its place is that of +inf before numbers that may have that value too.
    Choice best = {-INFINITY, V}, no_number = {-INFINITY, V};
    for (int v = thread; v < V; v += kRankThreads) {
      const Choice here = {value(v), v};
      if (here.value != here.value) {
        if (v < no_number.at) no_number = {0.f, v};
      } else if (here.before(best)) {
        best = here;
      }
    }
    best = first_of_block(best, scratch);
    if (all.sum != all.sum) {
      no_number = first_of_block(no_number, scratch);
      if (no_number.at < V) best = no_number;
    }
    if (thread != 0) return;
    if (best.value == -INFINITY) best.at = a.rules.eos;
    const int token = best.at;
    const double log_prob = so_far + (token == a.rules.eos ? eos_log_p : log_p(token));
    if (token == a.rules.eos)
      end(a, b, m, token, log_prob, true);
    else
      go_on(a, m, m, token, log_prob);
    close_step(a, b, token != a.rules.eos);
  } else {
    __syncthreads();
    bar(a, m, logits);
    __syncthreads();
    // The first of the places from `begin` on, `step` apart, that come after `last`.
    const auto next = [&](int begin, int step, const Choice& last) {
      Choice best = {-INFINITY, V};
      for (int v = begin; v < V; v += step) {
        const Choice here = {log_p(v), v};
        if (here.value > -INFINITY && last.before(here) && here.before(best)) best = here;
      }
      return best;
    };
    Choice own = next(thread, kRankThreads, {INFINITY, -1});  // of a thread's own places
    int found = 0;
    for (; found < 2 * a.search.K; ++found) {
      const Choice best = first_of_block(own, scratch);
      if (best.at == V) break;
      if (thread == 0) propose(found, best.at);
      // What the thread that had it has next, its whole warp looks for.
      const int of = best.at % kRankThreads, lane = thread % kWarp;
      if (of / kWarp != thread / kWarp) continue;
      Choice left = next(of + lane * kRankThreads, kWarp * kRankThreads, best);
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        const Choice other = shuffle(left, lanes);
        if (other.before(left)) left = other;
      }
      if (of == thread) own = left;
    }
    if (thread != 0) return;
    if (found == 0 && eos_logit > -INFINITY && all.sum == all.sum) {  // nothing else is left
      logits[a.rules.eos] = eos_logit;
      propose(found++, a.rules.eos);
    }
    a.found[m] = found;
  }
}

// Grid: a warp for each source, its lanes the rows; shared memory holds a number for each of K.
// The 2 K best continuations of all rows, of which at most K end, so that K go on.
static __global__ void __launch_bounds__(kWarp) join_rows(RankArguments a) {
  const int b = blockIdx.x, lane = threadIdx.x, K = a.search.K, live = a.search.live[b];
  if (live == 0) return;
  int* const heads = reinterpret_cast<int*>(shared_memory());  // (K,), of the rows' candidates
  for (int k = lane; k < live; k += kWarp) heads[k] = 0;
  const int t = *a.search.step, row0 = b * K;
  int next = 0;
  for (int rank = 0; rank < 2 * K; ++rank) {
    double best = -INFINITY;
    int row = K, token = 0;
    for (int k = lane; k < live; k += kWarp) {
      if (heads[k] == a.found[row0 + k]) continue;
      const int64_t at = static_cast<int64_t>(row0 + k) * 2 * K + heads[k];
      if (a.candidate_log_probs[at] > best)
        best = a.candidate_log_probs[at], row = k, token = a.candidates[at];
    }
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      const double other = shuffle(best, lanes);
      const int other_row = shuffle(row, lanes), other_token = shuffle(token, lanes);
      if (other > best || (other == best && other_row < row))
        best = other, row = other_row, token = other_token;
    }
    if (row == K) break;
    if (row % kWarp == lane) ++heads[row];
    if (token != a.rules.eos || t < a.rules.P) {
      if (next < K) {
        if (lane == 0) go_on(a, row0 + next, row0 + row, token, best);
        ++next;
      }
    } else if (rank < K && lane == 0) {
      end(a, b, row0 + row, token, best, true);
    }
  }
  __syncwarp();  // all lanes have read `live`
  if (lane == 0) close_step(a, b, next);
}

// Results: a thread for each hypothesis that has ended, from its last token back.
struct TraceArguments {
  Search search;
  int B, fill;
  // (B, N, T), (B, N): rows of steps are -1 after the end
  int64_t *tokens, *rows, *lengths;
  float *log_probs, *scores;
  bool* finished;
};

static __global__ void __launch_bounds__(kTraceThreads) trace(TraceArguments a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kTraceThreads + threadIdx.x;
  const Search& search = a.search;
  if (i >= static_cast<int64_t>(a.B) * search.N) return;
  const bool there = i % search.N < search.ended[i / search.N];
  const int length = there ? search.best.length[i] : 0;
  a.lengths[i] = length;
  a.log_probs[i] = there ? static_cast<float>(search.best.log_prob[i]) : -INFINITY;
  a.scores[i] = there ? static_cast<float>(search.best.score[i]) : -INFINITY;
  a.finished[i] = there && search.best.finished[i] != 0;
  int64_t *const tokens = a.tokens + i * search.T, *const rows = a.rows + i * search.T;
  for (int t = length; t < search.T; ++t) tokens[t] = a.fill, rows[t] = -1;
  int token = there ? search.best.token[i] : 0, row = there ? search.best.row[i] : 0;
  for (int t = length - 1; t >= 0; --t) {
    tokens[t] = token, rows[t] = row;
    if (t == 0) break;
    const int64_t node = static_cast<int64_t>(t - 1) * search.M + row;
    token = search.tokens[node], row = search.parents[node];
  }
}

}  // namespace seq2seq_fast
