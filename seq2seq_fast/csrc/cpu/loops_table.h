// The last part of a file that compiles the loops for one instruction set.
#include "attention_loops.h"
#include "cell_loops.h"
#include "cross_entropy_loops.h"
#include "location_loops.h"
#include "packed_loops.h"
#include "panel_loops.h"
#include "product_loops.h"
#include "quantised_loops.h"
#include "quantised_panel.h"
#include "random_loops.h"
#include "scores_loops.h"

namespace seq2seq_fast {

extern const Loops S2S_LOOPS;
const Loops S2S_LOOPS = {S2S_NAME,
                         scores,
                         gradients,
                         exp2x,
                         expm1_2x,
                         largest,
                         softmax,
                         softmax_backward,
                         scale_and_flush,
                         weighted_rows,
                         products,
                         exponentials,
                         logit_gradients,
                         panel,
                         panel_double,
                         product_panel,
                         pack_strips,
                         sum_strips,
                         transpose,
                         convolve,
                         correlate,
                         place_scores,
                         place_gradients,
                         dropout,
                         perturb,
                         perturb_some,
                         advance_cell,
                         retreat_cell,
                         packed_panel,
                         packed_panel_half,
                         kBytes,
                         quantise,
                         quantise_sixteen,
                         to_bytes,
                         six_to_eight,
                         unpack,
                         dots,
                         dots_half,
                         excess,
                         excess_half,
                         peak,
                         top,
                         above};

}  // namespace seq2seq_fast
