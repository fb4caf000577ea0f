// How many blocks share which rows of a recurrence, and what they keep in shared memory.
#pragma once
#include <vector>

#include "launch.h"
#include "team.cuh"

namespace seq2seq_fast {

struct TeamPlan {
  Team team{};
  int teams = 0;
  int64_t shared_floats = 0;
  int64_t blocks() const { return int64_t{teams} * team.size; }
};

// A product whose weights (kinds units, width) have rows of multiples of 16 bytes.
inline TeamProduct team_product_of(const Tensor& w, int kinds) {
  STD_TORCH_CHECK(w.is_contiguous() && w.size(1) * w.element_size() % 16 == 0,
                  "expected contiguous weights with rows of multiples of 16 bytes");
  TeamProduct p{w.data_ptr(), type_of(w), size_of(w, 1)};
  p.units = size_of(w, 0) / kinds, p.kinds = kinds;
  return p;
}

namespace detail {

// Sets how a product of so many rows is shared out, among members and the warps of one.
// Returns the clocks that its multiplications should take.
inline double share_out(TeamProduct& p, int members, int rows) {
  // Of a multiprocessor, a clock: of the tensor cores' three parts together.
  constexpr double kProducts = 90, kMatrixProducts = 300;
  p.units_of_member = static_cast<int>(ceil_div(p.units, members));
  const bool matrices = p.by_matrices(rows);
  const int R = matrices ? std::min(2, static_cast<int>(ceil_div(rows, kMatrixRows))) * kMatrixRows
                : rows > 4 ? kTileRows
                : rows > 2 ? 4
                           : rows;
  const int C = matrices ? kMatrixColumns : kTileColumns;
  const int64_t tiles = ceil_div(rows, R) * ceil_div(p.columns_of_member(), C);
  const int64_t pieces = ceil_div(p.width, 4 * kWarp);
  int64_t least = INT64_MAX;
  for (int64_t n = 1; n <= std::min<int64_t>(pieces, kTeamWarps); ++n) {
    const int64_t cost = ceil_div(tiles * n, kTeamWarps) * (4 * ceil_div(pieces, n) + 1);
    if (cost < least) least = cost, p.splits = static_cast<int>(n);
  }
  const double quarter = R * C * kWarp;  // of a warp's piece
  return static_cast<double>(least) * quarter * kTeamWarps /
         (matrices ? kMatrixProducts : kProducts);
}

}  // namespace detail

// Which of the ways to divide rows and blocks into teams should take the least time. `floats` of
// shared memory are what a member needs when it makes no product. False if that, or a row of a
// product, does not fit.
inline bool plan_teams(TeamPlan& best, const Device& device,
                       const std::vector<TeamProduct*>& products, int64_t rows, int64_t floats) {
  constexpr int kRowsAtOnce = 2 * kTileRows;
  static_assert(kRowsAtOnce <= 2 * kMatrixRows, "the tensor cores' rows are one tile");
  // Clocks of a multiprocessor: bytes it gets of the L2, a team's meeting, and rows' way to shared
  // memory and their sums' out of it.
  constexpr double kBytes = 32, kMeeting = 1500, kRows = 600;
  const int64_t limit = device.shared_floats_of_block;
  double least = 1e30;
  std::vector<TeamProduct> chosen;
  const auto consider = [&](TeamPlan plan) {
    std::vector<TeamProduct> shared;
    std::vector<double> clocks;
    const double times = static_cast<double>(ceil_div(plan.team.rows, plan.team.rows_at_once));
    double cost = (kMeeting + times * kRows) * static_cast<double>(products.size());
    int64_t working = floats;
    for (const TeamProduct* p : products) {
      shared.push_back(*p);
      clocks.push_back(times *
                       detail::share_out(shared.back(), plan.team.size, plan.team.rows_at_once));
      working = std::max(working, team_product_floats(shared.back(), plan.team.rows_at_once));
    }
    plan.shared_floats = round_up(working, 4);
    if (plan.shared_floats > limit) return;
    const auto keep = [&](TeamProduct& p, int64_t columns) {
      p.at = plan.team.memory, p.kept = static_cast<int>(columns);
      const int64_t n = columns * p.kept_floats();
      plan.team.memory += static_cast<int>(n), plan.shared_floats += n;
    };
    const auto room = [&](const TeamProduct& p) {
      return (limit - plan.shared_floats) / p.kept_floats();
    };
    for (TeamProduct& p : shared)
      if (room(p) >= p.columns_of_member()) keep(p, p.columns_of_member());
    for (size_t i = 0; i < shared.size(); ++i) {
      TeamProduct& p = shared[i];
      // Whole tiles of what does not fit.
      if (p.kept == 0) keep(p, room(p) / kMatrixColumns * kMatrixColumns);
      const double rest = times * (p.columns_of_member() - p.kept) * p.floats_of_column();
      const double reading = rest * 4 / kBytes;
      cost += static_cast<double>(plan.team.rows) * p.width * 4 / kBytes;
      // The tensor cores' weights are read well ahead.
      cost += p.by_matrices(plan.team.rows_at_once) ? std::max(clocks[i], reading)
                                                    : clocks[i] + reading;
    }
    if (cost < least) least = cost, best = plan, chosen = shared;
  };
  for (int64_t teams = 1; teams <= std::min<int64_t>(rows, device.multiprocessors); ++teams) {
    TeamPlan plan;
    plan.team.rows = static_cast<int>(ceil_div(rows, teams));
    plan.teams = static_cast<int>(ceil_div(rows, plan.team.rows));
    if (plan.teams != teams) continue;
    plan.team.size = static_cast<int>(device.multiprocessors / teams);
    // Of fewer rows at once more weights may stay.
    for (plan.team.rows_at_once = std::min(plan.team.rows, kRowsAtOnce); plan.team.rows_at_once > 0;
         plan.team.rows_at_once /= 2)
      consider(plan);
  }
  if (chosen.empty()) return false;
  for (size_t i = 0; i < products.size(); ++i) *products[i] = chosen[i];
  return true;
}

// Whether rows can be read in aligned fours, where their widths are multiples of 4.
inline bool aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.data_ptr()) % (4 * sizeof(float)) == 0;
}

// The counts that members meet by, zero.
inline Tensor counts_of(const Device& device, TeamPlan& plan, const Tensor& like) {
  const int64_t n = int64_t{plan.teams} * kCountStride;
  Tensor counts = empty(like, {n}, ScalarType::Int);
  device.zero(counts.data_ptr(), n * static_cast<int64_t>(sizeof(unsigned)));
  plan.team.arrived = static_cast<unsigned*>(counts.data_ptr());
  return counts;
}

}  // namespace seq2seq_fast
