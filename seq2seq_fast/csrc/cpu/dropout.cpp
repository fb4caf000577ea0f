// Factors of dropout.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "../common.h"
#include "loops.h"

namespace seq2seq_fast {
namespace {

// 1 / (1 - p), or zero with probability p, of any shape; seed holds one whole number.
Tensor dropout_factors(Tensor seed, std::vector<int64_t> size, double p) {
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long && 0 <= p && p <= 1,
                  "expected a seed of one int64, and p between 0 and 1");
  int64_t n = 1;
  for (const int64_t each : size) n *= each;
  const Tensor flat = empty(seed, {n}, ScalarType::Float);
  auto* const out = static_cast<float*>(flat.data_ptr());
  const auto key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr()));
  const auto threshold = static_cast<uint64_t>(std::llround(p * 4294967296.0));
  const float kept = p < 1 ? static_cast<float>(1 / (1 - p)) : 0.f;
  const int64_t blocks = (n + kRandomBlock - 1) / kRandomBlock;
  parallel(blocks, kRandomBlock, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kRandomBlock;
    loops.dropout(key, begin, std::min(n, end * kRandomBlock) - first, threshold, kept,
                  out + first);
  });
  return torch::stable::reshape(flat, size);
}

}  // namespace
}  // namespace seq2seq_fast

STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast, CPU, m) {
  m.impl("dropout_factors", TORCH_BOX(&seq2seq_fast::dropout_factors));
}
