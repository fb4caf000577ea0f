// What teams do in a decoder's steps, teacher-forced and greedy, beside products.
#pragma once
#include "cells.cuh"
#include "one_query.cuh"
#include "team.cuh"

namespace seq2seq_fast {

// Inlined, so that it reads a kernel's arguments as constants: by an address they would come
// through a cache that every meeting empties.
__device__ __forceinline__ void attend_in_loop(const OneQueryArguments& a, int b, int t,
                                               int64_t row, int64_t context_row, int range,
                                               int memory) {
  attend_one_query<float>(a, b, t, row, context_row, range, shared_memory() + memory);
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
