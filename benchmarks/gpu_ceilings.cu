// Prints as JSON what barriers cost in seconds: grid.sync over all multiprocessors, and cluster
// barriers of 2, 4, 8 and 16 blocks, where the GPU has clusters (sm_90 and later).
#include <cooperative_groups.h>

#include <cstdio>
#include <cstdlib>

namespace cg = cooperative_groups;

constexpr int kBarriers = 1000, kRounds = 7;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

__global__ void grid_barriers(int n) {
  for (int i = 0; i < n; ++i) cg::this_grid().sync();
}

__global__ void cluster_barriers(int n) {
#if __CUDA_ARCH__ >= 900
  for (int i = 0; i < n; ++i) cg::this_cluster().sync();
#endif
}

// Seconds per barrier, the least of some rounds: launch(n) runs n barriers.
template <typename F>
double per_barrier(F launch) {
  cudaEvent_t start, end;
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&end));
  const auto milliseconds = [&](int n) {
    float best = 1e30f;
    for (int i = 0; i < kRounds; ++i) {
      check(cudaEventRecord(start));
      launch(n);
      check(cudaEventRecord(end));
      check(cudaEventSynchronize(end));
      float t;
      check(cudaEventElapsedTime(&t, start, end));
      best = t < best ? t : best;
    }
    return best;
  };
  milliseconds(1);
  return (milliseconds(2 * kBarriers) - milliseconds(kBarriers)) * 1e-3 / kBarriers;
}

int main() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  std::printf("{\"grid\": %.4g", per_barrier([&](int n) {
                void* arguments[] = {&n};
                check(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(grid_barriers),
                                                  device.multiProcessorCount, 256, arguments));
              }));
  if (device.major >= 9) {
    check(
        cudaFuncSetAttribute(cluster_barriers, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    for (unsigned blocks : {2u, 4u, 8u, 16u}) {
      cudaLaunchAttribute cluster;
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {blocks, 1, 1};
      cudaLaunchConfig_t config = {};
      config.gridDim = blocks;
      config.blockDim = 256;
      config.attrs = &cluster;
      config.numAttrs = 1;
      std::printf(", \"cluster of %u\": %.4g", blocks, per_barrier([&](int n) {
                    check(cudaLaunchKernelEx(&config, cluster_barriers, n));
                  }));
    }
  }
  std::printf("}\n");
}
