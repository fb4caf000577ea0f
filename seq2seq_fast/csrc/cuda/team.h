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
  p.at = -1;
  return p;
}

namespace detail {

// Whether the tensor cores make it.
inline bool by_matrices(const TeamProduct& p, int rows) {
  return p.type == Type::kBFloat16 && rows > 4;
}

// Sets how a product is shared out.
inline void share_out(TeamProduct& p, int members, int rows) {
  p.units_of_member = static_cast<int>(ceil_div(p.units, members));
  const bool matrices = by_matrices(p, rows);
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
}

}  // namespace detail

// Which of the ways to divide rows and blocks into teams should take the least time. `floats` of
// shared memory are what a member needs when it makes no product. False if that, or a row of a
// product, does not fit.
inline bool plan_teams(TeamPlan& best, const Device& device,
                       const std::vector<TeamProduct*>& products, int64_t rows, int64_t floats) {
  constexpr int kRowsAtOnce = 2 * kTileRows;
  // Clocks of a multiprocessor: products a clock, bytes it gets of the L2, a team's meeting.
  constexpr double kProducts = 90, kMatrixProducts = 300, kBytes = 32, kMeeting = 1500;
  const int64_t limit = device.shared_floats_of_block;
  double least = 1e30;
  std::vector<TeamProduct> chosen;
  for (int64_t teams = 1; teams <= std::min<int64_t>(rows, device.multiprocessors); ++teams) {
    TeamPlan plan;
    plan.team.rows = static_cast<int>(ceil_div(rows, teams));
    plan.teams = static_cast<int>(ceil_div(rows, plan.team.rows));
    if (plan.teams != teams) continue;
    plan.team.size = static_cast<int>(device.multiprocessors / teams);
    std::vector<TeamProduct> shared;
    for (plan.team.rows_at_once = std::min(plan.team.rows, kRowsAtOnce); plan.team.rows_at_once > 0;
         plan.team.rows_at_once /= 2) {
      shared.clear();
      int64_t working = floats;
      for (const TeamProduct* p : products) {
        shared.push_back(*p);
        detail::share_out(shared.back(), plan.team.size, plan.team.rows_at_once);
        working = std::max(working, team_product_floats(shared.back(), plan.team.rows_at_once));
      }
      plan.shared_floats = round_up(working, 4);
      if (plan.shared_floats <= limit) break;
    }
    if (plan.team.rows_at_once == 0) continue;
    double cost = kMeeting * static_cast<double>(products.size());
    for (TeamProduct& p : shared) {
      const int64_t kept = int64_t{p.columns_of_member()} * p.kept_floats();
      const double n = plan.team.rows;
      const double work =
          n * p.columns_of_member() * p.width /
          (detail::by_matrices(p, plan.team.rows_at_once) ? kMatrixProducts : kProducts);
      cost += work + n * p.width * 4 / kBytes;
      if (plan.shared_floats + kept <= limit) {
        p.at = plan.team.memory;
        plan.team.memory += static_cast<int>(kept), plan.shared_floats += kept;
      } else {
        cost += static_cast<double>(ceil_div(plan.team.rows, plan.team.rows_at_once) * kept) * 4 /
                kBytes;
      }
    }
    if (cost < least) least = cost, best = plan, chosen = shared;
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
