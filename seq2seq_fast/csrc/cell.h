// The recurrent cells there are; torch is not known here.
#pragma once
#include <cstdint>

namespace seq2seq_fast {

enum class Cell : uint8_t { kLstm, kGru, kRnn };
constexpr int blocks_of(Cell cell) { return cell == Cell::kRnn ? 1 : 4; }  // of gates

}  // namespace seq2seq_fast
