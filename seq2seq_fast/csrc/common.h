// What every kernel needs from torch: buffers, dtype dispatch, rows of a strided tensor as float32.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "buffer.h"

namespace seq2seq_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Uninitialised memory on a cache line boundary. See buffer.h.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : bytes_(static_cast<size_t>(std::max<int64_t>(product_of({n, sizeof(T)}), 1))),
        data_(take(bytes_)) {}
  ~Buffer() { give_back(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return static_cast<T*>(data_); }

 private:
  size_t bytes_;
  void* data_;
};

// A new contiguous tensor where like is, of like's dtype unless told. Not through the dispatcher,
// as new_empty goes: with a few numbers to work on, three such calls are most of the time.
inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                    std::optional<ScalarType> dtype = std::nullopt) {
  std::array<int64_t, 4> strides;
  const auto dim = static_cast<int64_t>(sizes.size());
  for (int64_t i = dim - 1, stride = 1; i >= 0; stride *= std::max<int64_t>(1, sizes[i--]))
    strides[i] = stride;
  int32_t type, device, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  if (dtype) type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes.data(), strides.data(), type, device, index, &out));
  return Tensor(out);
}

// x's numbers, which are of this type
template <typename A>
A* data(const Tensor& x) {
  return static_cast<A*>(x.data_ptr());
}

// x with other sizes and strides, from its element `offset` on
inline Tensor view(const Tensor& x, std::initializer_list<int64_t> sizes,
                   std::initializer_list<int64_t> strides, int64_t offset = 0) {
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), sizes.size(), sizes.begin(),
                                                               strides.begin(), offset, &out));
  return Tensor(out);
}

// x (B, W) as (B, 1, W): one query, or one step, of each row
inline Tensor one_of_each(const Tensor& x) {
  return view(x, {x.size(0), 1, x.size(1)}, {x.stride(0), 0, x.stride(1)});
}

// The first n rows of x (B, W)
inline Tensor first_rows(const Tensor& x, int64_t n) {
  return n == x.size(0) ? x : view(x, {n, x.size(1)}, {x.stride(0), x.stride(1)});
}

inline void copy(const Tensor& to, const Tensor& from) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(to.get(), from.get(), 0));
}

inline Tensor transposed(const Tensor& x) {
  return view(x, {x.size(1), x.size(0)}, {x.stride(1), x.stride(0)});
}

template <typename F>
auto dispatch(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::BFloat16:
      return f.template operator()<torch::headeronly::BFloat16>();
    case ScalarType::Half:
      return f.template operator()<torch::headeronly::Half>();
    default:
      STD_TORCH_CHECK(false, "expected a float32, float64, bfloat16 or float16 tensor");
  }
}

// Rows of a (B, N, W) or (N, W) or (W,) tensor, read as A whatever the dtype and the strides. A
// default-made one stands for a tensor that is absent.
template <typename A>
class Rows {
 public:
  struct Block {
    const A* data;
    int64_t ld;  // from one row to the next
  };

  Rows() = default;
  explicit Rows(const Tensor& x)
      : data_(static_cast<const char*>(x.data_ptr())), dtype_(x.scalar_type()) {
    const int64_t dim = x.dim();
    width_ = x.size(dim - 1);
    for (int64_t i = 0; i < dim; ++i) stride_[3 - dim + i] = x.stride(i);
    direct_ = dtype_ == (sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float) &&
              (stride_[2] == 1 || width_ == 1);
  }
  explicit operator bool() const { return data_ != nullptr; }
  int64_t width() const { return width_; }
  int64_t scratch(int64_t rows) const { return direct_ ? 0 : rows * width_; }

  // Rows [n, n + count) of batch b: in place where that is possible, else copied to scratch.
  Block block(int64_t b, int64_t n, int64_t count, A* scratch) const {
    const int64_t at = b * stride_[0] + n * stride_[1];
    if (direct_) return {reinterpret_cast<const A*>(data_) + at, stride_[1]};
    dispatch(dtype_, [&]<typename T>() {
      const T* from = reinterpret_cast<const T*>(data_) + at;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < width_; ++j)
          scratch[i * width_ + j] = static_cast<A>(from[i * stride_[1] + j * stride_[2]]);
    });
    return {scratch, width_};
  }

 private:
  const char* data_ = nullptr;
  ScalarType dtype_ = ScalarType::Float;
  int64_t stride_[3] = {}, width_ = 0;
  bool direct_ = false;
};

// Writes `count` rows of `width` values to a contiguous tensor from element `at` on, ld_to apart.
template <typename A>
void write(const Tensor& out, int64_t at, int64_t ld_to, const A* from, int64_t ld, int64_t count,
           int64_t width) {
  dispatch(out.scalar_type(), [&]<typename T>() {
    T* to = static_cast<T*>(out.data_ptr()) + at;
    for (int64_t i = 0; i < count; ++i, to += ld_to, from += ld)
      for (int64_t j = 0; j < width; ++j) to[j] = static_cast<T>(from[j]);
  });
}

// Whether n pieces of work are too little to be shared out: below 20,000 operations, about 5 us.
constexpr int64_t kLeastOperations = 20000;
inline bool is_small(int64_t n, int64_t operations_each) {
  return n * operations_each <= kLeastOperations;
}

// Splits [0, n) over threads in chunks of at least kLeastOperations.
template <typename F>
void parallel(int64_t n, int64_t operations_each, F f) {
  const int64_t grain =
      std::max<int64_t>(1, kLeastOperations / std::max<int64_t>(1, operations_each));
  if (n <= grain) {
    if (n > 0) f(0, n);
  } else {
    torch::stable::parallel_for(0, n, grain, f);
  }
}

// Calls f(i) for i in [0, n): as `parallel`, but each thread takes the next when it has done with
// one, every other thread from the end, so that one that is held up has less to do, and each meets
// mostly what it had in its cache the last time.
template <typename F>
void parallel_in_turns(int64_t n, int64_t operations_each, F f) {
  const int64_t most = n * operations_each / kLeastOperations;
  const int64_t threads =
      std::min({n, most, static_cast<int64_t>(torch::stable::get_num_threads())});
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  std::atomic<int64_t> taken = 0, front = 0, back = n;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      while (taken.fetch_add(1, std::memory_order_relaxed) < n)
        f(thread % 2 == 0 ? front.fetch_add(1, std::memory_order_relaxed)
                          : back.fetch_sub(1, std::memory_order_relaxed) - 1);
  });
}

}  // namespace seq2seq_fast
