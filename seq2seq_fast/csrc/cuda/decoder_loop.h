// Launches of decoder_loop.cuh.
#pragma once
#include <memory>
#include <vector>

#include "decoder.h"

namespace seq2seq_fast {

// Whether recurrences run in one launch where they can: the environment's SEQ2SEQ_FAST_GPU_LOOP is
// "together", not "steps".
bool runs_together();

class TogetherForward {
 public:
  // Null where it is not wanted, what a block needs exceeds its shared memory, or the blocks do not
  // fit the GPU together.
  static std::unique_ptr<TogetherForward> make(const Device& device,
                                               const std::vector<Tensor>& layers,
                                               const std::optional<Source>& source,
                                               const std::optional<Tensor>& dropout, Cell cell,
                                               bool query_after, const Run& run);
  virtual ~TogetherForward() = default;
  // Steps [begin, end); the input's part of layer 0's gates lies where the gates will. False, and
  // nothing has changed, if the blocks do not fit after all.
  virtual bool run(int64_t begin, int64_t end) = 0;
};

}  // namespace seq2seq_fast
