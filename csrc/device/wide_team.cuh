// The teams of several blocks on a GPU, and the __global__ function that runs every wide kernel.
// The layer they implement is described in wide_layer.h. Nothing here has run on a GPU yet.
//
//   WideTeam<GridBarrier>     all blocks of a cooperative launch work on one item after another, or
//                             every block on items of its own, where that is not to be had;
//   WideTeam<ClusterBarrier>  one cluster per item (sm_90 and later): what the blocks share lies in
//                             the shared memory of the cluster's first block, where the others
//                             reach it as distributed shared memory.
#pragma once

#include <cooperative_groups.h>

#include "device/cuda_team.cuh"
#include "device/wide_layer.h"

namespace birl::device {

// Of a cooperative launch, or of teams of one block: which of the two is known at run time, so that
// both are one instance of every kernel.
struct GridBarrier {
  static constexpr bool kSharesChip = false;
  unsigned blocks_of_a_team;

  BIRL_DEVICE Index block() const { return blockIdx.x % blocks_of_a_team; }
  BIRL_DEVICE Index blocks() const { return blocks_of_a_team; }
  BIRL_DEVICE void wait() const {
    if (blocks_of_a_team == 1)
      __syncthreads();
    else
      cooperative_groups::this_grid().sync();
  }
  BIRL_DEVICE char* first_block(char* own) const { return own; }
};

struct ClusterBarrier {
  static constexpr bool kSharesChip = true;
  unsigned blocks_of_a_team;

  BIRL_DEVICE Index blocks() const { return blocks_of_a_team; }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  BIRL_DEVICE Index block() const { return cooperative_groups::this_cluster().block_rank(); }
  BIRL_DEVICE void wait() const { cooperative_groups::this_cluster().sync(); }
  BIRL_DEVICE char* first_block(char* own) const {
    return cooperative_groups::this_cluster().map_shared_rank(own, 0);
  }
#else  // never launched there
  BIRL_DEVICE Index block() const { return 0; }
  BIRL_DEVICE void wait() const {}
  BIRL_DEVICE char* first_block(char* own) const { return own; }
#endif
};

template <class Chip>
class WideBlock : public BlockTeam {
 public:
  const Index rank, count;
  const Chip& chip;

  BIRL_DEVICE WideBlock(Index rank, Index count, const Chip& chip)
      : rank(rank), count(count), chip(chip) {}

  template <int kLanes, class F>
  BIRL_DEVICE void groups(F&& f) {
    f(Lanes<kLanes>(rank, count));
    __syncthreads();
  }

  template <class F>
  BIRL_DEVICE void spread(F&& f) {
    f(rank * blockDim.x + threadIdx.x, count * blockDim.x);
    __syncthreads();
  }
};

template <class Barrier, class Chip>
class WideTeam {
 public:
  using Block = WideBlock<Chip>;

  BIRL_DEVICE WideTeam(const Barrier& barrier, const Chip& chip, char* slots)
      : barrier_(barrier), block_(barrier.block(), barrier.blocks(), chip), slots_(slots) {}

  template <class F>
  BIRL_DEVICE void step(F&& f) {
    f(block_);
    barrier_.wait();
  }

  template <class F>
  BIRL_DEVICE void local(F&& f) {
    f(block_);
  }

  template <class T, class F, class Join>
  BIRL_DEVICE T reduce(F&& f, Join&& join) {
    static_assert(sizeof(T) <= kLargestWide, "enlarge kLargestWide");
    char* const slots = slots_ + (reductions_++ & 1) * block_.count * kLargestWide;
    const T mine = f(block_);
    if (threadIdx.x == 0) __builtin_memcpy(slots + block_.rank * kLargestWide, &mine, sizeof(T));
    barrier_.wait();
    return block_.template reduce<T>(
        [&](Thread t) {
          // Every thread starts from a part there is: joining one twice changes nothing.
          const Index own = t.rank < block_.count ? t.rank : 0;
          T total, part;
          __builtin_memcpy(&total, slots + own * kLargestWide, sizeof(T));
          for (Index i = own + t.count; i < block_.count; i += t.count) {
            __builtin_memcpy(&part, slots + i * kLargestWide, sizeof(T));
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
  Barrier barrier_;
  Block block_;
  char* slots_;
  unsigned reductions_ = 0;
};

// Workspace: `spill` bytes for each team; on chip: for a cluster what its blocks share, then the
// block's own arrays.
template <class Barrier, class Kernel>
__global__ void __launch_bounds__(BlockTeam::kMaxThreads, 2)
    run_wide(const __grid_constant__ Kernel kernel, const __grid_constant__ Barrier barrier,
             Index items, char* workspace, std::size_t spill) {
  extern __shared__ __align__(16) char shared[];
  const Index blocks = barrier.blocks();
  const Index number = blockIdx.x / blocks, teams = gridDim.x / blocks;
  Arena global(workspace + spill * static_cast<std::size_t>(number));
  Arena near(Barrier::kSharesChip ? barrier.first_block(shared) : nullptr);
  Arena& common = Barrier::kSharesChip ? near : global;
  char* const slots = common.template take<char>(static_cast<Index>(2 * kLargestWide) * blocks);
  const auto arrays = kernel.lay_out(common, global);
  std::size_t taken = 0;
  if (Barrier::kSharesChip) {
    Footprint needed, ignored;
    needed.template take<char>(static_cast<Index>(2 * kLargestWide) * blocks);
    kernel.lay_out(needed, ignored);
    taken = needed.bytes();
  }
  Arena own(shared + taken);
  const auto chip = kernel.lay_out_chip(own);
  WideTeam<Barrier, typename Kernel::Chip> team(barrier, chip, slots);
  if (Barrier::kSharesChip) barrier.wait();  // a block's memory is there once it has started
  for (Index item = number; item < items; item += teams) kernel.run(team, arrays, item);
  barrier.wait();  // a block's memory stays until the others are done with it
}

template <class Barrier, class Kernel>
cudaError_t allow_chip(std::size_t bytes) {
  constexpr std::size_t kWithoutAsking = 48 * 1024;
  if (bytes <= kWithoutAsking) return cudaSuccess;
  return cudaFuncSetAttribute(run_wide<Barrier, Kernel>,
                              cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

template <class Barrier, class Kernel>
cudaError_t launch_wide(const Kernel& kernel, Index items, const WideGrid& grid, void* workspace,
                        cudaStream_t stream) {
  if (items == 0) return cudaSuccess;
  const cudaError_t error = allow_chip<Barrier, Kernel>(grid.bytes.chip);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.teams * grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.bytes.chip;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = grid.blocks > 1 ? 1 : 0;
  if (Barrier::kSharesChip) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = grid.blocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  return cudaLaunchKernelEx(&config, run_wide<Barrier, Kernel>, kernel, Barrier{grid.blocks}, items,
                            static_cast<char*>(workspace), grid.bytes.spill);
}

}  // namespace birl::device
