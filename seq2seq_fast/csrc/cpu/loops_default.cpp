#include "loops.h"
#define S2S_LANES 8
#define S2S_LOOPS kLoopsDefault
#define S2S_NAME "default"
#include "loops_table.h"
