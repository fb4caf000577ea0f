#include "loops.h"
#ifdef __aarch64__
#define S2S_LANES 4
#define S2S_DOT
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include "quantised_panel.h"

namespace seq2seq_fast {

extern const Bytes kBytesNeonDot;
const Bytes kBytesNeonDot = kBytes;

}  // namespace seq2seq_fast
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
