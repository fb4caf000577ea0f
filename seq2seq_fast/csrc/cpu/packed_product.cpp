// See packed_product.h.
#include "packed_product.h"

namespace seq2seq_fast {
namespace {

constexpr int64_t kLeastUnpacked = 12;  // rows that pay for making floats of a panel's weights

Weights weights_of(const PackedTensor& x) {
  if (x.type == ScalarType::Float) return Weights::kFloat;
  if (x.type == ScalarType::BFloat16) return Weights::kBFloat16;
  if (x.type == ScalarType::Short) return Weights::kInt16;
  STD_TORCH_CHECK(x.type == ScalarType::Byte, "expected float32, bfloat16, uint8 or int16 weights");
  return x.sizes[3] == kPanel ? Weights::kInt6 : Weights::kInt8;
}

int64_t rows_of_bytes(const Matrix& matrix, int64_t rows) { return matrix.of_bytes() ? rows : 0; }
int64_t rows_of_sixteen(const Matrix& matrix, int64_t rows) {
  return matrix.of_sixteen() ? rows : 0;
}

}  // namespace

const float* floats(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(),
                  "expected a contiguous float32 tensor");
  return static_cast<const float*>(x.data_ptr());
}

PackedTensor::PackedTensor(const Tensor& x)
    : data(x.data_ptr()), type(x.scalar_type()), dim(x.dim()), sizes{} {
  STD_TORCH_CHECK(x.is_contiguous() && dim <= 4, "expected a contiguous tensor");
  for (int64_t i = 0; i < dim; ++i) sizes[i] = x.size(i);
}

int64_t PackedTensor::numel() const {
  int64_t n = 1;
  for (int64_t i = 0; i < dim; ++i) n *= sizes[i];
  return n;
}

const float* floats(const PackedTensor& x) {
  STD_TORCH_CHECK(x.type == ScalarType::Float, "expected float32");
  return static_cast<const float*>(x.data);
}

std::vector<PackedTensor> packed_tensors(const Tensor& memory, const Tensor& layout) {
  constexpr int64_t kColumns = 7;
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Byte,
                                   ScalarType::Short};
  constexpr int64_t kBytes[] = {4, 2, 1, 2};
  STD_TORCH_CHECK(memory.scalar_type() == ScalarType::Byte && memory.is_contiguous() &&
                      layout.scalar_type() == ScalarType::Long && layout.is_contiguous() &&
                      layout.dim() == 2 && layout.size(1) == kColumns,
                  "expected bytes of packed tensors, and where they lie");
  const int64_t n = layout.size(0), end = memory.numel();
  const auto* row = static_cast<const int64_t*>(layout.data_ptr());
  std::vector<PackedTensor> found(n, PackedTensor(memory));
  for (PackedTensor& x : found) {
    const int64_t type = row[1];
    STD_TORCH_CHECK(type >= 0 && type < 4 && row[2] >= 0 && row[2] <= 4, "expected a layout");
    x.data = static_cast<char*>(x.data) + row[0];
    x.type = kTypes[type], x.dim = row[2];
    std::copy_n(row + 3, 4, x.sizes);
    STD_TORCH_CHECK(row[0] >= 0 && x.numel() >= 0 && row[0] + x.numel() * kBytes[type] <= end,
                    "expected packed tensors to lie in their memory");
    row += kColumns;
  }
  return found;
}

Matrix::Matrix(const PackedTensor& data, const PackedTensor& scales, int64_t digits_)
    : weights(data.data), scale(floats(scales)), type(weights_of(data)), digits(digits_) {
  const bool of_six = type == Weights::kInt6, whole = of_bytes() || of_sixteen();
  STD_TORCH_CHECK(data.dim == (whole ? 4 : 3) && (!of_six || (data.sizes[2] == 3 && digits == 1)) &&
                      (!of_sixteen() || (data.sizes[3] == 2 && 2 * data.sizes[1] >= kCommon)),
                  "expected panels (P, K, width), or of uint8 (P, K / 4, width, 4), with one digit "
                  "(P, K / 4, 3, 64), or of int16 (P, K / 2, width, 2)");
  panels = data.sizes[0], K = data.sizes[1] * (of_bytes() ? 4 : of_sixteen() ? 2 : 1);
  width = of_six ? kPanel : data.sizes[2];
  STD_TORCH_CHECK(
      width % kBlock == 0 && width <= kPanel && scales.numel() == (whole ? panels * width : 0),
      "expected panels of whole units, and a scale for each column of whole numbers");
  STD_TORCH_CHECK(!of_bytes() || K <= (digits == 2 ? 1 << 17 : 1 << 16),
                  "expected sums of at most 2^17 products of bytes, with one digit of 2^16");
}

Factor::Factor(const Matrix& matrix, int64_t rows, Operand a, Operand b, Operand c, int64_t skip)
    : matrix_(matrix),
      skip_(skip),
      operands_{a, b, c},
      scales_(rows_of_bytes(matrix, rows) +
              rows_of_sixteen(matrix, rows) * (matrix.sixteen_ld() / kSixteenBlock)),
      norms_(2 * (rows_of_bytes(matrix, rows) + rows_of_sixteen(matrix, rows))),
      shifts_(rows_of_sixteen(matrix, rows)),
      offsets_(matrix.quantised_offsets() * rows_of_bytes(matrix, rows)),
      digits_(matrix.digits * rows_of_bytes(matrix, rows) * matrix.quantised_ld()),
      quantised_{matrix.K,
                 matrix.quantised_ld(),
                 matrix.digits,
                 loops.bytes.pairs,
                 matrix.digits == 2 ? kTwoDigits : loops.bytes.digit,
                 digits_,
                 scales_,
                 offsets_,
                 norms_},
      numbers_(rows_of_sixteen(matrix, rows) * matrix.sixteen_ld()),
      sixteen_{matrix.rows_of_numbers(),
               matrix.sixteen_ld(),
               numbers_,
               scales_,
               norms_,
               matrix.mean,
               matrix.directions,
               shifts_} {
  const bool sixteen = matrix.of_sixteen();
  if (!sixteen && !matrix.of_bytes()) return;
  parallel(rows, matrix.K, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      sixteen ? loops.quantise_sixteen(operands_, i, sixteen_)
              : loops.quantise(operands_, i, quantised_);
  });
}

void Factor::multiply(int64_t i, int64_t first, int64_t rows, const Sums& to) const {
  const int64_t K = matrix_.K, width = matrix_.width;
  const auto panel = [&]<typename W>() {
    return static_cast<const W*>(matrix_.weights) + (i * K + skip_) * width;
  };
  const auto as_floats = [&](const float* w) {
    loops.packed_panel(operands_, first, rows, w, width, to);
  };
  const auto as_bytes = [&](const uint8_t* w) {
    loops.bytes.panel(quantised_, first, rows, w, width, matrix_.scale + i * width, to);
  };
  if (matrix_.type == Weights::kInt8) {
    as_bytes(panel.template operator()<uint8_t>());
  } else if (matrix_.type == Weights::kInt6) {
    const int64_t fours = K / 4;
    const auto* w = static_cast<const uint8_t*>(matrix_.weights) + i * fours * 3 * kPanel;
    if (rows <= kFewRows)
      return loops.bytes.panel_of_six(quantised_, first, rows, w, matrix_.scale + i * width, to);
    Buffer<uint8_t> unpacked(K * width);
    loops.six_to_eight(w, fours, unpacked);
    as_bytes(unpacked);
  } else if (matrix_.type == Weights::kInt16) {
    loops.bytes.panel_of_sixteen(sixteen_, first, rows, panel.template operator()<int16_t>(), width,
                                 matrix_.scale + i * width, to);
  } else if (matrix_.type == Weights::kFloat) {
    as_floats(panel.template operator()<float>());
  } else if (rows < kLeastUnpacked) {
    loops.packed_panel_half(operands_, first, rows, panel.template operator()<uint16_t>(), width,
                            to);
  } else {
    int64_t rows_met = 0;
    for (const Operand& x : operands_) rows_met += x.K;
    Buffer<float> unpacked(rows_met * width);
    loops.unpack(panel.template operator()<uint16_t>(), rows_met * width, unpacked);
    as_floats(unpacked);
  }
}

}  // namespace seq2seq_fast
