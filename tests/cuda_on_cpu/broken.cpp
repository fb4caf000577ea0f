// Kernels with a fault each, to see that the harness finds it. `fault` 0 is the kernel as it should
// be.
#include "launch.h"

namespace seq2seq_fast {
namespace {

enum Fault {
  kNone,
  kNoBarrier,
  kNoWait,
  kUnwritten,
  kOrder,
  kPastTheEnd,
  kDivergent,
  kLateWarp,
  kShuffle,
  kNoFence,
  kFarOn,  // no fault: a count near its end
};

struct Arguments {
  const float* x;
  float* out;
  unsigned* arrived;
  int fault;
  unsigned before = 0;  // of `arrived`
};

// out[i] = x[n - 1 - i] of a block of n = 64, through shared memory and an asynchronous copy; then
// out[64 + block] = how many blocks have come before, which must not depend on the order.
void reversed(Arguments a) {
  float* const memory = shared_memory();
  const int i = threadIdx.x, n = blockDim.x;
  if (i % 4 == 0) copy_async(memory + i, a.x + i);
  close_copies();
  if (a.fault != kNoWait) wait_copies<0>();
  if (a.fault != kNoBarrier) __syncthreads();
  float y = memory[n - 1 - i];
  if (a.fault == kDivergent && i < 32) __syncthreads();
  if (a.fault != kLateWarp || i % 2 == 0) y += __shfl_xor_sync(kAll, 0.f, 1);
  if (a.fault == kPastTheEnd && i == 0) memory[n] = 1.f;
  if (blockIdx.x == 0 && (a.fault != kUnwritten || i != 5)) a.out[i] = y;
  if (i != 0) return;
  const unsigned before = atomicAdd(a.arrived, 1u);
  a.out[n + blockIdx.x] = a.fault == kOrder ? static_cast<float>(before) : 0.f;
}

// out[n + block] = what the block's successor had left before they met.
void exchanged(Arguments a) {
  const unsigned block = blockIdx.x, n = gridDim.x;
  if (threadIdx.x == 0) a.out[block] = a.x[block];
  __syncthreads();
  if (threadIdx.x == 0 && a.fault != kNoBarrier) {
    if (a.fault != kLateWarp || block != 0) announce(a.arrived);
    await(a.arrived, a.before + n);
  }
  __syncthreads();
  if (threadIdx.x == 0) a.out[n + block] = a.out[(block + 1) % n];
}

// out[i] = the sum over blocks of what each had left at i, which was its neighbour's x, by the last
// block to come.
void gathered(Arguments a) {
  float* const memory = shared_memory();
  const int i = threadIdx.x, n = blockDim.x;
  float* const left = a.out + n;
  memory[i] = a.x[i];
  if (a.fault == kShuffle)
    __shfl_xor_sync(kAll, 0.f, 1);
  else
    __syncwarp();
  left[blockIdx.x * n + i] = memory[i ^ 1];
  if (a.fault != kNoFence) __threadfence();
  __syncthreads();
  if (i == 0) memory[0] = atomicAdd(a.arrived, 1u) + 1 == gridDim.x ? 1.f : 0.f;
  __syncthreads();
  if (memory[0] == 0.f) return;
  __threadfence();
  float sum = 0.f;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += left[block * n + i];
  a.out[i] = sum;
}

torch::stable::Tensor broken_together(torch::stable::Tensor x, int64_t fault) {
  constexpr int kBlocks = 5;
  auto out = empty(x, {2 * kBlocks});
  const unsigned before = fault == kFarOn ? -3u : 0u;
  unsigned arrived = before;
  Device(x).launch_together(
      exchanged, kBlocks, dim3(64), 0,
      {static_cast<const float*>(x.data_ptr()), static_cast<float*>(out.data_ptr()), &arrived,
       static_cast<int>(fault), before});
  return out;
}

torch::stable::Tensor broken_gathered(torch::stable::Tensor x, int64_t fault) {
  constexpr int kThreads = 64, kBlocks = 5;
  auto out = empty(x, {kThreads * (1 + kBlocks)});
  unsigned arrived = 0;
  Device(x).launch(gathered, kBlocks, dim3(kThreads), kThreads,
                   {static_cast<const float*>(x.data_ptr()), static_cast<float*>(out.data_ptr()),
                    &arrived, static_cast<int>(fault)});
  return out;
}

int64_t launches_together() { return cuda_on_cpu::launches_together; }

void limit_launches_together(int64_t left, bool told) {
  cuda_on_cpu::launches_left = left, cuda_on_cpu::told = told;
}

void set_multiprocessors(int64_t n) { cuda_on_cpu::multiprocessors = static_cast<int>(n); }

torch::stable::Tensor broken(torch::stable::Tensor x, int64_t fault) {
  constexpr int kThreads = 64, kBlocks = 5;
  auto out = empty(x, {kThreads + kBlocks});
  unsigned arrived = 0;
  const Device device(x);
  device.launch(reversed, kBlocks, dim3(kThreads), kThreads,
                {static_cast<const float*>(x.data_ptr()), static_cast<float*>(out.data_ptr()),
                 &arrived, static_cast<int>(fault)});
  return out;
}

}  // namespace
}  // namespace seq2seq_fast

STABLE_TORCH_LIBRARY_FRAGMENT(seq2seq_fast_cuda_on_cpu, m) {
  m.def("broken(Tensor x, int fault) -> Tensor");
  m.def("broken_together(Tensor x, int fault) -> Tensor");
  m.def("broken_gathered(Tensor x, int fault) -> Tensor");
  m.def("launches_together() -> int");
  m.def("limit_launches_together(int left, bool told) -> ()");
  m.def("set_multiprocessors(int n) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast_cuda_on_cpu, CPU, m) {
  m.impl("broken", TORCH_BOX(&seq2seq_fast::broken));
  m.impl("broken_together", TORCH_BOX(&seq2seq_fast::broken_together));
  m.impl("broken_gathered", TORCH_BOX(&seq2seq_fast::broken_gathered));
}
STABLE_TORCH_LIBRARY_IMPL(seq2seq_fast_cuda_on_cpu, CompositeExplicitAutograd, m) {
  m.impl("launches_together", TORCH_BOX(&seq2seq_fast::launches_together));
  m.impl("limit_launches_together", TORCH_BOX(&seq2seq_fast::limit_launches_together));
  m.impl("set_multiprocessors", TORCH_BOX(&seq2seq_fast::set_multiprocessors));
}
