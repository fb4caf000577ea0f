// Values that have met the context's weights already.
//
// The context is a sum of a source's values, and so is its product with weights W:
// W sum_s a[s] v[s] = sum_s a[s] (W v[s]). With W v[s] made once of each source, a step reads S
// rows for each row it has, in place of the D rows of weights that all rows share.
#pragma once
#include <vector>

#include "packed_product.h"

namespace seq2seq_fast {

// What a step's rows attend to: attention weights (rows, S), ld apart, and whose source each has.
struct Attended {
  const float* weights;
  int64_t ld;
  const int32_t* sources;
};

class ProjectedValues {
 public:
  // Of values (B, S, D), of which each source has so many that can be attended to, by a matrix'
  // rows from `skip` on; null for nothing.
  ProjectedValues(const Matrix& matrix, int64_t skip, const Tensor* values,
                  const std::vector<int64_t>& lengths);
  explicit operator bool() const { return panels_ > 0; }
  // What `add` reads for a panel.
  Soon of_panel(int64_t panel) const {
    const int64_t n = B_ * S_ * width_;
    return {products_ + panel * n, n * static_cast<int64_t>(sizeof(float))};
  }
  // Adds the context's part to a panel of n rows, from `first` on.
  void add(const Attended& to, int64_t panel, int64_t first, int64_t n, const Sums& sums) const;

 private:
  const int64_t panels_, width_, B_, S_;
  const std::vector<int64_t>& lengths_;
  Buffer<float> products_;  // (panels, B, S, width), which a step reads in this order
};

}  // namespace seq2seq_fast
