// What teams do in a decoder's steps, teacher-forced and greedy, beside products.
#pragma once
#include "cells.cuh"
#include "one_query.cuh"
#include "team.cuh"

namespace seq2seq_fast {

// A part of the sources of rows from row0 on, whose weights and contexts lie from those rows on.
// Not inlined, as make_sums is not, which leaves registers to each.
static __device__ __noinline__ void attend_in_loop(const OneQueryArguments& a, int part, int row0,
                                                   int t, int64_t weights_row, int64_t context_row,
                                                   int memory) {
  const int b = row0 + part / a.ranges;
  attend_one_query<float>(a, b, t, weights_row + b, context_row + b, part % a.ranges,
                          shared_memory() + memory);
}

// A unit's step of any cell, given sum(k) of the product for its k-th gate.
template <typename Sum>
__device__ __forceinline__ void advance_in_loop(Cell cell, const CellArguments& a, int row,
                                                int unit, const Sum& sum) {
  const auto advance = [&]<Cell kind>() {
    float gates[kBlocksOf<kind>];
#pragma unroll
    for (int k = 0; k < kBlocksOf<kind>; ++k) gates[k] = sum(k);
    advance_unit<kind>(a, row, unit, gates);
  };
  if (cell == Cell::kLstm)
    advance.template operator()<Cell::kLstm>();
  else if (cell == Cell::kGru)
    advance.template operator()<Cell::kGru>();
  else
    advance.template operator()<Cell::kRnn>();
}

}  // namespace seq2seq_fast
