// See projected_values.h.
#include "projected_values.h"

namespace seq2seq_fast {

ProjectedValues::ProjectedValues(const Matrix& matrix, int64_t skip, const Tensor* values,
                                 const std::vector<int64_t>& lengths)
    : panels_(values ? matrix.panels : 0),
      width_(matrix.width),
      B_(values ? values->size(0) : 0),
      S_(values ? values->size(1) : 0),
      lengths_(lengths),
      products_(B_ * panels_ * S_ * width_) {
  if (panels_ == 0) return;
  const int64_t D = values->size(2);
  STD_TORCH_CHECK(matrix.K >= skip + D,
                  "expected values as wide as the context's weights are high");
  const Factor rows(matrix, B_ * S_, {floats(*values), D, D}, {}, {}, skip);
  parallel(B_ * panels_, S_ * D * width_ / 2, [&](int64_t begin, int64_t end) {
    alignas(64) const float nothing[kPanel] = {};
    for (int64_t i = begin; i < end; ++i)
      rows.multiply(i / B_, i % B_ * S_, lengths_[i % B_],
                    {nothing, 0, products_ + i * S_ * width_, width_});
  });
}

void ProjectedValues::add(const Attended& to, int64_t panel, int64_t first, int64_t n,
                          const Sums& sums) const {
  for (int64_t m = first, end; m < first + n; m = end) {
    const int32_t source = to.sources[m];
    for (end = m + 1; end < first + n && to.sources[end] == source;) ++end;  // beams
    const Operand weights[kOperands] = {{to.weights, to.ld, lengths_[source]}};
    const float* of_source = products_ + (panel * B_ + source) * S_ * width_;
    loops.packed_panel(weights, m, end - m, of_source, width_, sums.from(m - first, 0));
  }
}

}  // namespace seq2seq_fast
