// The grid as a team of a GPU, and the __global__ function that runs its kernels. The layer it
// implements is described in cuda/layer/grid_layer.h. Nothing here has run on a GPU yet.
//
// All blocks of a cooperative launch work on one item after another, or every block on items of its
// own: which of the two is known at run time, so that both are one instance of every kernel.
#pragma once

#include <cooperative_groups.h>

#include "cuda/layer/cuda_team.cuh"
#include "cuda/layer/grid_layer.h"

namespace birl::device {

template <class Chip>
class GridBlock : public BlockTeam {
 public:
  const unsigned count;
  const unsigned rank = blockIdx.x % count;
  Chip& chip;

  BIRL_DEVICE GridBlock(unsigned count, Chip& chip) : count(count), chip(chip) {}

  template <int kLanes, class F>
  BIRL_DEVICE void groups(F&& f) {
    f(LaneGroup<kLanes>(rank, count));
    __syncthreads();
  }

  template <class F>
  BIRL_DEVICE void spread(F&& f) {
    f(rank * blockDim.x + threadIdx.x, count * blockDim.x);
    __syncthreads();
  }
};

template <class Chip>
class GridTeam {
 public:
  using Block = GridBlock<Chip>;

  BIRL_DEVICE GridTeam(unsigned blocks, Chip& chip, char* slots)
      : block_(blocks, chip), slots_(slots) {}

  template <class F>
  BIRL_DEVICE void step(F&& f) {
    f(block_);
    wait();
  }

  template <class F>
  BIRL_DEVICE void local(F&& f) {
    f(block_);
  }

  template <class T, class F, class Join>
  BIRL_DEVICE T reduce(F&& f, Join&& join) {
    static_assert(sizeof(T) <= kLargestReduced, "enlarge kLargestReduced");
    char* const slots = slots_ + (reductions_++ & 1) * block_.count * kLargestReduced;
    const T mine = f(block_);
    if (threadIdx.x == 0) __builtin_memcpy(slots + block_.rank * kLargestReduced, &mine, sizeof(T));
    wait();
    return block_.template reduce<T>(
        [&](Thread t) {
          // Every thread starts from a part there is: joining one twice changes nothing.
          const Index own = t.rank < block_.count ? t.rank : 0;
          T total, part;
          __builtin_memcpy(&total, slots + own * kLargestReduced, sizeof(T));
          for (Index i = own + t.count; i < block_.count; i += t.count) {
            __builtin_memcpy(&part, slots + i * kLargestReduced, sizeof(T));
            total = join(total, part);
          }
          return total;
        },
        join);
  }

  template <class F>
  BIRL_DEVICE int decide(F&& f) {
    return block_.decide([&] { return f(block_); });
  }

 private:
  BIRL_DEVICE void wait() const {
    if (block_.count == 1)
      __syncthreads();
    else
      cooperative_groups::this_grid().sync();
  }

  Block block_;
  char* slots_;
  unsigned reductions_ = 0;
};

// Workspace: `bytes` for each team.
template <class Kernel>
__global__ void __launch_bounds__(kGridThreads, 2)
    run_grid(const __grid_constant__ Kernel kernel, unsigned blocks, Index items, char* workspace,
             std::size_t bytes) {
  using Chip = typename Kernel::Chip;
  using Arrays = typename Kernel::Arrays;
  __shared__ alignas(kAlignment) char memory[sizeof(Chip)];
  __shared__ alignas(kAlignment) char pointers[sizeof(Arrays)];  // there they take no registers
  const Index team_number = blockIdx.x / blocks, teams = gridDim.x / blocks;
  Arena common(workspace + bytes * static_cast<std::size_t>(team_number));
  char* const slots = common.template take<char>(static_cast<Index>(2 * kLargestReduced) * blocks);
  Arrays& arrays = *reinterpret_cast<Arrays*>(pointers);
  if (threadIdx.x == 0) arrays = kernel.lay_out(common);
  __syncthreads();
  GridTeam<Chip> team(blocks, *reinterpret_cast<Chip*>(memory), slots);
  for (Index item = team_number; item < items; item += teams) kernel.run(team, arrays, item);
}

template <class Kernel>
cudaError_t launch_grid(const Kernel& kernel, Index items, const GridLaunchConfig& config,
                        void* workspace, cudaStream_t stream) {
  if (items == 0) return cudaSuccess;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t how{};
  how.gridDim = dim3(config.teams * config.blocks);
  how.blockDim = dim3(config.threads);
  how.stream = stream;
  how.attrs = &attribute;
  how.numAttrs = config.blocks > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&how, run_grid<Kernel>, kernel, config.blocks, items,
                            static_cast<char*>(workspace), config.bytes);
}

}  // namespace birl::device
