#include "loops.h"
#define S2S_LANES 4  // of SSE2 and of NEON: what is wider than registers, GCC keeps in memory
#define S2S_LOOPS kLoopsDefault
#define S2S_NAME "default"
#include "loops_table.h"
