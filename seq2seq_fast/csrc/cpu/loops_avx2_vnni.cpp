#include "loops.h"
#ifdef __x86_64__
#define S2S_LANES 8
#define S2S_INTRINSICS
#define S2S_VNNI
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,avxvnni,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,avxvnni,fma")
#endif
#include "quantised_panel.h"

namespace seq2seq_fast {

extern const Bytes kBytesAvx2Vnni;
const Bytes kBytesAvx2Vnni = kBytes;

}  // namespace seq2seq_fast
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
