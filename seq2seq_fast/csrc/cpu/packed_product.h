// Products with packed weights, as decoding makes them.
#pragma once
#include <vector>

#include "../common.h"
#include "loops.h"

namespace seq2seq_fast {

// A contiguous float32 tensor's numbers.
const float* floats(const Tensor& x);

// One of the tensors that lie side by side in packed memory, contiguous. A call has dozens of them:
// to hand over each as a tensor of its own takes as long as a step of a small model.
struct PackedTensor {
  void* data;
  ScalarType type;
  int64_t dim, sizes[4];
  explicit PackedTensor(const Tensor& x);
  int64_t numel() const;
};
const float* floats(const PackedTensor& x);

// Those of `memory`; layout (n, 7) int64 has of each its first byte, type (0 float32, 1 bfloat16, 2
// uint8, 3 int16), number of dimensions and sizes. Made by seq2seq_fast/decoding/packing.py.
std::vector<PackedTensor> packed_tensors(const Tensor& memory, const Tensor& layout);

// Packed weights, see loops.h; scales are of whole numbers alone. The left factors of kInt8 have
// numbers of two digits, or one, as those of kInt6.
struct Matrix {
  const void* weights;
  const float* scale;
  Weights type;
  int64_t panels, K, width, digits;
  const float *mean = nullptr, *directions = nullptr;  // of kInt16, see SixteenRows
  Matrix(const PackedTensor& data, const PackedTensor& scales, int64_t digits = 2);
  bool of_bytes() const { return type == Weights::kInt8 || type == Weights::kInt6; }
  bool of_sixteen() const { return type == Weights::kInt16; }
  int64_t operations(int64_t rows) const { return rows * K * width / 2; }
  // From one digit of a row to the next; vectors are stored past its end.
  int64_t quantised_ld() const { return K + kBlock; }
  int64_t quantised_offsets() const { return digits * parts_of_digits(K, digits); }  // of a row
  // Of kInt16, whose last rows are of what the weights have in common:
  int64_t rows_of_numbers() const { return K - kCommon; }
  int64_t sixteen_ld() const { return round_up(rows_of_numbers(), kSixteenBlock) + kSixteenBlock; }
};

// The left factor of products with a matrix: rows of operands side by side.
class Factor {
 public:
  // They meet the matrix' rows from `skip` on, which must be 0 of whole numbers, up to any.
  Factor(const Matrix& matrix, int64_t rows, Operand a, Operand b = {}, Operand c = {},
         int64_t skip = 0);
  // (rows, width) = rows from `first` on times panel i
  void multiply(int64_t i, int64_t first, int64_t rows, const Sums& to) const;
  // Of whole numbers: Euclidean norms of a row and of what rounding took from it.
  const float* norms(int64_t row) const { return norms_ + 2 * row; }

 private:
  const Matrix& matrix_;
  const int64_t skip_;
  const Operand operands_[kOperands];
  Buffer<float> scales_, norms_, shifts_;
  Buffer<int32_t> offsets_;
  Buffer<int8_t> digits_;
  const QuantisedRows quantised_;
  Buffer<int16_t> numbers_;
  const SixteenRows sixteen_;
};

constexpr int64_t kRowsTogether = 48;  // of a panel's gates, which then stay in cache
constexpr int64_t kFewRows = 4;        // reading weights takes longer than multiplying rows by them

// Calls f(i) for n pieces of a product of some rows. Few rows: each thread has the same weights
// every time, maybe still in its cache, in either direction. More rows: in turns.
template <typename F>
void over_pieces(int64_t n, int64_t operations_each, int64_t rows, bool backwards, F f) {
  if (rows > kFewRows) return parallel_in_turns(n, operations_each, f);
  parallel(n, operations_each, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(backwards ? begin + end - 1 - i : i);
  });
}

}  // namespace seq2seq_fast
