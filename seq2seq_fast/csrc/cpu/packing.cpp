// What weights that are packed for decoding lie in, and how they come there: see
// seq2seq_fast/decoding/packing.py.
#include <torch/csrc/stable/library.h>

#include "../buffer.h"
#include "../common.h"
#include "loops.h"

namespace seq2seq_fast {
namespace {

// n bytes, of the device that like is on, in large pages of their own where the system has them.
Tensor weights_memory(Tensor like, int64_t n) {
  keep_freed_memory();  // weights that were not prepared are packed call by call
  const auto page = static_cast<int64_t>(kHugePage);
  if (n < page / 2) return empty(like, {n}, ScalarType::Byte);
  const int64_t whole = round_up(n, page);
  const Tensor room = empty(like, {whole + page}, ScalarType::Byte);
  const auto address = reinterpret_cast<uintptr_t>(room.data_ptr());
  const auto begin = static_cast<int64_t>(-address % kHugePage);
  collapse_to_huge_pages(static_cast<char*>(room.data_ptr()) + begin, whole);
  return view(room, {n}, {1}, begin);
}

constexpr int64_t kTogether = 64;  // of K, so that what is written line by line stays in cache

// Of a weight (blocks * N, k) the K of columns from one on: panels (P, K, blocks * unit), see
// pack_rows.
void pack_panels(Tensor panels, Tensor weight, int64_t blocks, int64_t column) {
  const int64_t unit = blocks == 1 ? kPanel : kBlock, width = blocks * unit;
  STD_TORCH_CHECK(
      blocks >= 1 && weight.dim() == 2 && weight.size(0) % blocks == 0 && panels.dim() == 3 &&
          panels.is_contiguous() && panels.scalar_type() == ScalarType::Float &&
          weight.scalar_type() == ScalarType::Float && panels.size(2) == width &&
          panels.size(0) == (weight.size(0) / blocks + unit - 1) / unit && column >= 0 &&
          column <= panels.size(1) - weight.size(1),
      "expected panels (P, K, blocks * unit) of a weight (blocks * N, k), both float32");
  const int64_t N = weight.size(0) / blocks, k = weight.size(1), K = panels.size(1);
  const int64_t row = weight.stride(0), across = weight.stride(1);
  const auto* const from = static_cast<const float*>(weight.data_ptr());
  auto* const out = static_cast<float*>(panels.data_ptr());
  parallel(panels.size(0), k * width, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t n = std::min(unit, N - p * unit);
      for (int64_t first = 0; first < k; first += kTogether)
        for (int64_t block = 0; block < blocks; ++block) {
          const float* const w = from + (block * N + p * unit) * row + first * across;
          float* const to = out + (p * K + column + first) * width + block * unit;
          const int64_t count = std::min(kTogether, k - first);
          if (across == 1) {
            loops.transpose(w, row, n, count, to, width);
          } else {
            for (int64_t i = 0; i < count; ++i)
              for (int64_t r = 0; r < n; ++r) to[i * width + r] = w[r * row + i * across];
          }
          for (int64_t i = 0; n < unit && i < count; ++i)
            std::fill(to + i * width + n, to + i * width + unit, 0.f);
        }
    }
  });
}

}  // namespace
}  // namespace seq2seq_fast

STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast, CPU, m) {
  m.impl("weights_memory", TORCH_BOX(&seq2seq_fast::weights_memory));
  m.impl("pack_panels", TORCH_BOX(&seq2seq_fast::pack_panels));
}
