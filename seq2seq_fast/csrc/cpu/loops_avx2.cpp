#include "loops.h"
#ifdef __x86_64__
#define S2S_LANES 8
#define S2S_INTRINSICS
#define S2S_LOOPS kLoopsAvx2
#define S2S_NAME "avx2"
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "loops_table.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
