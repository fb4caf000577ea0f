#include "loops.h"
#ifdef __x86_64__
#define S2S_LANES 16
#define S2S_INTRINSICS
#define S2S_VNNI
#define S2S_LOOPS kLoopsAvx512Vnni
#define S2S_NAME "avx512_vnni"
#ifdef __clang__
#pragma clang attribute push(                                                     \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")
#endif
#include "loops_table.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
