// The teams of a GPU, and the one __global__ function that runs every kernel.
#pragma once

#include <cuda_runtime.h>

#include "cuda/layer/layer.h"
#include "cuda/layer/primitives.h"

namespace birl::device {

// What a thread keeps for itself between phases.
template <class Team, class T>
class OwnRegister {
 public:
  __device__ explicit OwnRegister(const Team&) {}
  __device__ T& operator()(Thread) { return value_; }

 private:
  T value_;
};

// One warp is one team, and one block holds one warp: the hardware's block scheduler is the queue
// of problems, and a problem that is done frees its place at once.
class WarpTeam {
 public:
  static constexpr int kMaxThreads = kWarp;

  template <class T>
  using Private = OwnRegister<WarpTeam, T>;

  template <class Phase>
  BIRL_DEVICE void phase(Phase&& f) {
    f(thread());
    __syncwarp();
  }

  template <class T, class Local, class Join>
  BIRL_DEVICE T reduce(Local&& local, Join&& join) {
    const T total = warp_join<T>(local(thread()), join);
    __syncwarp();
    return total;
  }

  template <class Answer>
  BIRL_DEVICE int decide(Answer&& answer) {
    int result = 0;
    if (threadIdx.x == 0) result = answer();
    __syncwarp();
    return __shfl_sync(0xffffffffu, result, 0);
  }

 private:
  BIRL_DEVICE Thread thread() const { return {static_cast<int>(threadIdx.x), kWarp}; }
};

// One block is one team; its size is a multiple of the warp's.
class BlockTeam {
 public:
  static constexpr int kMaxThreads = 256;

  template <class T>
  using Private = OwnRegister<BlockTeam, T>;

  template <class Phase>
  BIRL_DEVICE void phase(Phase&& f) {
    f(thread());
    __syncthreads();
  }

  // Two slots in turn: a thread may still read one while the next answer goes into the other, and
  // the barrier of that answer comes before the first slot is used again.
  template <class T, class Local, class Join>
  BIRL_DEVICE T reduce(Local&& local, Join&& join) {
    static_assert(sizeof(T) <= kLargestReduced, "enlarge kLargestReduced");
    char* const slots = reduced(reductions_++ & 1);
    const T mine = warp_join<T>(local(thread()), join);
    if (threadIdx.x % kWarp == 0)
      __builtin_memcpy(slots + threadIdx.x / kWarp * kLargestReduced, &mine, sizeof(T));
    __syncthreads();
    T total;
    __builtin_memcpy(&total, slots, sizeof(T));
    for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) {
      T part;
      __builtin_memcpy(&part, slots + warp * kLargestReduced, sizeof(T));
      total = join(total, part);
    }
    return total;
  }

  template <class Answer>
  BIRL_DEVICE int decide(Answer&& answer) {
    __shared__ int slots[2];
    int& slot = slots[decisions_++ & 1];
    if (threadIdx.x == 0) slot = answer();
    __syncthreads();
    return slot;
  }

 private:
  // One function, so that all reductions of a kernel share the same slots.
  BIRL_DEVICE static char* reduced(unsigned turn) {
    __shared__ alignas(kAlignment) char slots[2][kMaxThreads / kWarp * kLargestReduced];
    return slots[turn];
  }

  BIRL_DEVICE Thread thread() const {
    return {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
  }

  unsigned reductions_ = 0, decisions_ = 0;
};

template <class Team, class Kernel>
__global__ void __launch_bounds__(Team::kMaxThreads, Kernel::kTeamsPerProcessor)
    run_items(const __grid_constant__ Kernel kernel, Index items, char* workspace,
              std::size_t spill) {
  extern __shared__ __align__(16) char shared[];
  Arena chip(shared), global(workspace + spill * blockIdx.x);
  const auto arrays = kernel.lay_out(chip, global);
  Team team;
  for (Index item = blockIdx.x; item < items; item += gridDim.x) kernel.run(team, arrays, item);
}

template <class Team, class Kernel>
cudaError_t launch(const Kernel& kernel, Index items, const LaunchConfig& config, void* workspace,
                   cudaStream_t stream) {
  if (items == 0) return cudaSuccess;  // a launch cannot be empty
  constexpr std::size_t kWithoutAsking = 48 * 1024;
  if (config.bytes.chip > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(run_items<Team, Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(config.bytes.chip));
    if (error != cudaSuccess) return error;
  }
  run_items<Team, Kernel><<<config.blocks, config.threads, config.bytes.chip, stream>>>(
      kernel, items, static_cast<char*>(workspace), config.bytes.spill);
  return cudaGetLastError();
}

}  // namespace birl::device
