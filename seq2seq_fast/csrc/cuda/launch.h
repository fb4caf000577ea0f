// Host side of the CUDA kernels: where tensors lie, the current stream, launches.
#pragma once
#include <utility>

#include "../checks.h"
#include "device.cuh"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#define S2S_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast, CUDA, m)

#endif

namespace seq2seq_fast {

#ifdef __CUDACC__

inline void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would find it
  STD_TORCH_CHECK(false, "seq2seq_fast: CUDA error: ", cudaGetErrorString(error));
}

// PyTorch's current stream. Its function is looked up in the library that PyTorch has loaded: an
// extension that were linked with it would not load where PyTorch has no CUDA.
inline cudaStream_t current_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* const found =
        library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<GetStream>(found);
  }();
  STD_TORCH_CHECK(get != nullptr, "seq2seq_fast: this PyTorch has no CUDA streams");
  void* stream;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Makes the device of x current, for as long as this lives.
class Device {
 public:
  explicit Device(const Tensor& x) : guard_(x.get_device_index()) {
    const int32_t index = x.get_device_index();
    stream_ = current_stream(index);
    const auto ask = [&](cudaDeviceAttr what) {
      int found;
      check_cuda(cudaDeviceGetAttribute(&found, what, index));
      return found;
    };
    multiprocessors = ask(cudaDevAttrMultiProcessorCount);
    shared_floats_of_block =
        ask(cudaDevAttrMaxSharedMemoryPerBlockOptin) / static_cast<int>(sizeof(float));
    cooperates_ = ask(cudaDevAttrCooperativeLaunch) != 0;
  }

  template <typename... P>
  void launch(void (*kernel)(P...), Grid grid, dim3 threads, int64_t shared_floats,
              std::type_identity_t<P>... arguments) const {
    if (grid.x == 0) return;
    STD_TORCH_CHECK(grid.x < int64_t{1} << 31 && grid.y < 65536 && grid.z < 65536,
                    "seq2seq_fast: too many blocks: ", grid.x, ", ", grid.y, ", ", grid.z);
    const auto bytes = static_cast<int>(shared_floats * sizeof(float));
    if (bytes > 48 * 1024) allow_shared_memory(kernel);
    const dim3 blocks(grid.x, grid.y, grid.z);
    kernel<<<blocks, threads, bytes, stream_>>>(arguments...);
    check_cuda(cudaGetLastError());
  }

  // Whether so many blocks can run at the same time.
  template <typename... P>
  bool fits_together(void (*kernel)(P...), int64_t blocks, dim3 threads,
                     int64_t shared_floats) const {
    if (!cooperates_) return false;
    allow_shared_memory(kernel);
    int of_each = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &of_each, kernel, static_cast<int>(threads.x), shared_floats * sizeof(float)));
    return int64_t{of_each} * multiprocessors >= blocks;
  }

  // Blocks that may wait for each other: they all run at the same time. At most one to a
  // multiprocessor, and so much shared memory as a block can have. False, and nothing is launched,
  // if they do not fit after all.
  template <typename... P>
  bool launch_together(void (*kernel)(P...), int64_t blocks, dim3 threads, int64_t shared_floats,
                       std::type_identity_t<P>... arguments) const {
    const auto bytes = static_cast<int>(shared_floats * sizeof(float));
    allow_shared_memory(kernel);
    void* values[] = {&arguments...};
    const cudaError_t error =
        cudaLaunchCooperativeKernel(kernel, dim3(blocks), threads, values, bytes, stream_);
    if (error == cudaErrorCooperativeLaunchTooLarge) {
      cudaGetLastError();
      return false;
    }
    check_cuda(error);
    return true;
  }

  void zero(void* data, int64_t bytes) const {
    check_cuda(cudaMemsetAsync(data, 0, bytes, stream_));
  }

  int multiprocessors, shared_floats_of_block;

 private:
  // All that a block can have, of any size: what one thread allows, another's launch is held to.
  template <typename... P>
  void allow_shared_memory(void (*kernel)(P...)) const {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    shared_floats_of_block * static_cast<int>(sizeof(float))));
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  bool cooperates_;
};

#endif

template <typename... T>
void check_device(const Tensor& query, const T&... others) {
  const auto place = [](const Tensor& x) {
    int32_t type, index;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
    return std::pair(type, index);
  };
  STD_TORCH_CHECK(((place(others) == place(query)) && ...), "expected all tensors on one device");
}

inline Type type_of(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
      "expected a float32, float16 or bfloat16 tensor; float64 has no CUDA kernel");
  return dtype == ScalarType::Float  ? Type::kFloat
         : dtype == ScalarType::Half ? Type::kHalf
                                     : Type::kBFloat16;
}

// x (B, N, W), (N, W) or (W,)
inline View view_of(const Tensor& x) {
  View view{x.data_ptr(), type_of(x), {}};
  for (int64_t i = 0; i < x.dim(); ++i) view.stride[3 - x.dim() + i] = x.stride(i);
  return view;
}

inline float* floats_of(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

// The sizes of a dimension, which kernels count in 32 bits; offsets they make of 64.
inline int size_of(const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK(x.size(dim) < int64_t{1} << 30, "a dimension of ", x.size(dim),
                  " is too long, expected less than 2^30");
  return static_cast<int>(x.size(dim));
}

// Whether rows of x (B, N, W) can be read in aligned fours.
inline bool by_four(const Tensor& x) {
  const size_t bytes = 4 * x.element_size();
  return x.size(2) % 4 == 0 && x.stride(2) == 1 && x.stride(1) % 4 == 0 && x.stride(0) % 4 == 0 &&
         reinterpret_cast<uintptr_t>(x.data_ptr()) % bytes == 0;
}

}  // namespace seq2seq_fast
