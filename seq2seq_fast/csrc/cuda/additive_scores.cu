// Launches of the additive scores' kernels, and their registration. Memory beyond inputs and
// outputs: one float32 per element of query and keys, and in backward parts of their gradients
// where a call is split to fill the GPU; never (B, T, S, H).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "additive_scores.cuh"
#include "additive_scores.h"
#include "additive_scores_backward.cuh"
#include "make_powers.cuh"
#include "one_query.h"

namespace seq2seq_fast {
namespace {

int64_t padded(int64_t H) { return round_up(H, kFeatures); }

Powers powers_at(float* data, int N, int H) { return {data, N, static_cast<int>(padded(H))}; }

void launch_powers(const Device& device, const PowersArguments& a) {
  const int64_t blocks = a.query_blocks + a.key_blocks + (a.to_v != nullptr);
  device.launch(make_powers, blocks, dim3(kPowersThreads), kPowersThreads / kWarp, a);
}

}  // namespace

Tensor prepare_keys(Tensor keys) {
  STD_TORCH_CHECK(keys.dim() == 3, "expected keys (B, S, H)");
  const Device device(keys);
  const int B = size_of(keys, 0), S = size_of(keys, 1), H = size_of(keys, 2);
  Tensor powers = empty(keys, {B, Powers::floats(S, padded(H))}, ScalarType::Float);
  PowersArguments a{};
  a.keys = view_of(keys);
  a.to_keys = powers_at(floats_of(powers), S, H);
  a.H = H;
  a.key_blocks = B * ceil_div(S, kRowsOfBlock);
  launch_powers(device, a);
  return powers;
}

Powers powers_of(const Tensor& powers, const Tensor& keys) {
  const int S = size_of(keys, 1), H = size_of(keys, 2);
  STD_TORCH_CHECK(powers.dim() == 2 && powers.size(0) == keys.size(0) &&
                      powers.size(1) == Powers::floats(S, padded(H)) && powers.is_contiguous() &&
                      powers.scalar_type() == ScalarType::Float,
                  "powers: expected what prepare_keys made of these keys");
  return powers_at(floats_of(powers), S, H);
}

Prepared prepare(const Device& device, const Tensor& query, const Tensor& keys, const Tensor& v,
                 const std::optional<Tensor>& powers) {
  const int B = size_of(query, 0), T = size_of(query, 1), S = size_of(keys, 1);
  const int H = size_of(query, 2);
  const int64_t of_query = B * Powers::floats(T, padded(H));
  const int64_t of_keys = powers ? 0 : B * Powers::floats(S, padded(H));
  Tensor memory = empty(query, {of_query + of_keys + padded(H) + 1}, ScalarType::Float);
  float* const data = floats_of(memory);
  PowersArguments a{view_of(query), view_of(keys), view_of(v)};
  a.to_query = powers_at(data, T, H);
  a.to_keys = powers ? powers_of(*powers, keys) : powers_at(data + of_query, S, H);
  a.to_v = data + of_query + of_keys;
  a.H = H;
  a.query_blocks = B * ceil_div(T, kRowsOfBlock);
  a.key_blocks = powers ? 0 : B * ceil_div(S, kRowsOfBlock);
  launch_powers(device, a);
  return {a.to_query, a.to_keys, a.to_v, B, T, S, H, memory};
}

namespace {

// The tile that should take the least time. Work is counted in issue slots of a scheduler's warp;
// registers admit 16 warps to a multiprocessor, and with fewer than 6 its instructions wait for
// one another.
struct Plan {
  ScoresTile tile;
  void (*kernel)(ScoresArguments);
};

template <int TT, int SS, int LT>
Plan plan_of() {
  return {{TT, SS, LT, 1, 1}, additive_scores<TT, SS, LT>};
}

Plan choose_tile(const Prepared& p, int multiprocessors) {
  constexpr int64_t kWarps = 16, kFewest = 6;
  Plan best{};
  double least = 1e30;
  for (Plan plan : {plan_of<4, 16, 8>(), plan_of<7, 7, 4>(), plan_of<4, 7, 8>(), plan_of<4, 8, 4>(),
                    plan_of<4, 4, 4>(), plan_of<2, 2, 4>()})
    for (int warps_t = 1; warps_t <= kMostWarpsT; warps_t *= 2)
      for (int warps_h = 1; warps_h <= kMostWarpsH; warps_h *= 2) {
        if (warps_h > 1 && warps_h * 2 * kSlice > p.query.Hp) break;
        ScoresTile& tile = plan.tile;
        tile.warps_t = warps_t, tile.warps_h = warps_h;
        const int64_t warps = warps_t * warps_h;
        const int64_t blocks = p.B * ceil_div(p.T, tile.queries()) * ceil_div(p.S, tile.keys());
        const int64_t a_wave = multiprocessors * std::max<int64_t>(1, kWarps / warps);
        const int64_t rest = ceil_div(blocks % a_wave, multiprocessors) * warps;
        const int64_t busy = blocks / a_wave * kWarps + (rest ? std::max(rest, kFewest) : 0);
        const double slots = 4 * tile.TT * tile.SS + tile.TT + tile.SS + 11;
        const double cost = static_cast<double>(busy) * (slots * p.H / warps_h + 500);
        if (cost < least) least = cost, best = plan;
      }
  return best;
}

}  // namespace

void make_scores(const Device& device, const Prepared& p, const Tensor& query, const Tensor& keys,
                 const Tensor& scores) {
  const Plan plan = choose_tile(p, device.multiprocessors);
  const ScoresTile& tile = plan.tile;
  ScoresArguments a{
      p.query, p.keys, p.v, view_of(query), view_of(keys), scores.data_ptr(), type_of(scores),
      p.T,     p.S,    p.H};
  a.tiles_t = static_cast<int>(ceil_div(p.T, tile.queries()));
  a.tiles_s = static_cast<int>(ceil_div(p.S, tile.keys()));
  device.launch(plan.kernel, int64_t{p.B} * a.tiles_t * a.tiles_s,
                dim3(kWarp, tile.warps_t, tile.warps_h), tile.shared_floats(), a);
}

namespace {

// Warps of a block of backward, each with eight queries of a tile: as many as there can be, unless
// fewer leave less of the last tile empty.
int choose_warps(int T) {
  int best = 1;
  const auto padded_T = [&](int warps) { return round_up(T, warps * kQueriesOfWarp); };
  for (int warps = 2; warps <= kMostBackwardWarps; ++warps)
    if (padded_T(warps) * 8 <= padded_T(best) * 9) best = warps;
  return best;
}

}  // namespace

std::array<Tensor, 3> scores_backward(const Device& device, const Prepared& p, const Tensor& grad,
                                      const Tensor& query, const Tensor& keys, const Tensor& v,
                                      Needs needs) {
  const int B = p.B, T = p.T, S = p.S, H = p.H;
  BackwardArguments a{p.query, p.keys, p.v, view_of(query), view_of(keys), view_of(grad)};
  a.type = type_of(query);
  a.B = B, a.T = T, a.S = S, a.H = H;

  const int warps = choose_warps(T);
  // Ranges of keys of one length, shorter where there would be too few warps, and ranges of queries
  // where there still are.
  const int tiles = static_cast<int>(std::max<int64_t>(1, ceil_div(T, warps * kQueriesOfWarp)));
  a.blocks_h = static_cast<int>(ceil_div(H, kFeaturesOfBlock));
  const int64_t columns = std::max<int64_t>(1, int64_t{B} * a.blocks_h);
  const int64_t wanted = ceil_div(8 * device.multiprocessors, warps);
  int most_keys = kMostKeys;
  while (most_keys > 16 && columns * ceil_div(S, most_keys) * tiles < wanted) most_keys /= 2;
  a.keys_of_range = static_cast<int>(ceil_div(S, ceil_div(S, most_keys)));
  a.ranges_s = static_cast<int>(ceil_div(S, a.keys_of_range));
  const int64_t ranges_t = std::min<int64_t>(ceil_div(wanted, columns * a.ranges_s), tiles);
  a.tiles_of_range = static_cast<int>(ceil_div(tiles, ranges_t));
  a.ranges_t = static_cast<int>(ceil_div(tiles, a.tiles_of_range));

  const auto output = [&](const Tensor& like, bool needed) {
    return needed ? empty(like, like.sizes()) : empty(like, {0});
  };
  std::array<Tensor, 3> out = {output(query, needs.query), output(keys, needs.keys),
                               output(v, needs.v)};
  const int64_t n_query = int64_t{B} * T * H, n_keys = int64_t{B} * S * H;
  const int64_t of_query = needs.query && a.ranges_s > 1 ? a.ranges_s * n_query : 0;
  const int64_t of_keys = needs.keys && a.ranges_t > 1 ? a.ranges_t * n_keys : 0;
  const int parts_v = B * a.ranges_t * a.ranges_s;
  Tensor memory = empty(query, {of_query + of_keys + int64_t{parts_v} * H}, ScalarType::Float);
  float *const parts_query = floats_of(memory), *const parts_keys = parts_query + of_query;
  if (needs.query) a.to_query = of_query ? parts_query : out[0].data_ptr();
  if (needs.keys) a.to_keys = of_keys ? parts_keys : out[1].data_ptr();
  if (needs.v) a.to_v = parts_keys + of_keys;
  device.launch(additive_scores_backward, {int64_t{B} * a.blocks_h, a.ranges_s, a.ranges_t},
                dim3(kWarp, warps), backward_shared_floats(a.keys_of_range, warps), a);

  const auto join = [&](const float* parts, const float* scale, const Tensor& sum, int64_t n,
                        int count) {
    const JoinArguments j{parts, scale, sum.data_ptr(), type_of(sum), n, count, H, p.query.Hp};
    device.launch(join_parts, ceil_div(n, kWarp), dim3(kWarp, kJoinWarps), kWarp * kJoinWarps, j);
  };
  if (of_query) join(parts_query, p.v, out[0], n_query, a.ranges_s);
  if (of_keys) join(parts_keys, p.v, out[1], n_keys, a.ranges_t);
  if (needs.v) join(a.to_v, nullptr, out[2], H, parts_v);
  return out;
}

namespace {

Tensor additive_scores_op(Tensor query, Tensor keys, Tensor v) {
  check(query, keys, v);
  check_device(query, keys, v);
  const Device device(query);
  Tensor scores = empty(query, {query.size(0), query.size(1), keys.size(1)});
  if (goes_one_by_one(query)) {
    one_query_scores(device, query, keys, v, scores);
  } else {
    make_scores(device, prepare(device, query, keys, v, std::nullopt), query, keys, scores);
  }
  return scores;
}

std::tuple<Tensor, Tensor, Tensor> additive_scores_backward_op(Tensor grad, Tensor query,
                                                               Tensor keys, Tensor v,
                                                               bool need_query, bool need_keys,
                                                               bool need_v) {
  check(query, keys, v);
  check_shape(grad, query.size(0), query.size(1), keys.size(1), "expected grad (B, T, S)");
  check_device(query, keys, v, grad);
  const Device device(query);
  auto [dq, dk, dv] = scores_backward(device, prepare(device, query, keys, v, std::nullopt), grad,
                                      query, keys, v, {need_query, need_keys, need_v});
  return {dq, dk, dv};
}

}  // namespace
}  // namespace seq2seq_fast

S2S_CUDA_LIBRARY(m) {
  m.impl("prepare_keys", TORCH_BOX(&seq2seq_fast::prepare_keys));
  m.impl("additive_scores", TORCH_BOX(&seq2seq_fast::additive_scores_op));
  m.impl("additive_scores_backward", TORCH_BOX(&seq2seq_fast::additive_scores_backward_op));
}
