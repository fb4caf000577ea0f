// Memory for temporaries, kept by the thread that used it for its next call.
//
// The C library hands large blocks back to the system as soon as they are freed, and to touch each
// page anew costs as much as the arithmetic on it: a third of a backward at B 8, T = S = 64,
// H = 256 was page faults.
#pragma once
#include <cstddef>

namespace seq2seq_fast {

// At most this much is kept by a thread, and nothing in blocks smaller than kLeastKept.
constexpr size_t kMostKept = size_t{32} << 20, kLeastKept = size_t{64} << 10;

// `bytes` of uninitialised memory on a 64 byte boundary; given back by the same thread.
void* take(size_t& bytes);
void give_back(void* data, size_t bytes);

}  // namespace seq2seq_fast
