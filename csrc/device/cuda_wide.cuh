// The grid of a wide kernel and its launch. No call synchronises or allocates.
#pragma once

#include "device/cuda_device.h"
#include "device/large_dispatch.h"
#include "device/wide_team.cuh"

namespace birl::device {

inline cudaError_t wide_limits(const DeviceBatch& batch, WideLimits& limits) {
  cudaError_t error = check(batch, limits.block);
  int device = 0, cooperative = 0, clusters = 0;
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  limits.cooperative = cooperative != 0;
  limits.clusters = clusters != 0;
  return error;
}

// Blocks of a cooperative launch: as many as are resident at once, and no more than have states.
template <class Kernel>
cudaError_t resident_blocks(const Kernel& kernel, const WideLimits& limits, Index states,
                            unsigned threads, unsigned& blocks) {
  const std::size_t chip = wide_footprint(kernel, 1, false).chip;
  cudaError_t error = allow_chip<GridBarrier, Kernel>(chip);
  int each = 0;
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, run_wide<GridBarrier, Kernel>,
                                                          static_cast<int>(threads), chip);
  // More blocks than two on each multiprocessor only make the barrier slower.
  const Index most = static_cast<Index>(each < 2 ? each : 2) * limits.block.processors;
  if (error == cudaSuccess && most < 1) return cudaErrorCooperativeLaunchTooLarge;
  blocks = static_cast<unsigned>(states < most ? states : most);
  return error;
}

// Whether a cluster of this size finds its blocks' memory on the current device: not on a small
// part of one, for example.
template <class Kernel>
bool cluster_launches(const Kernel& kernel, const WidePlan& plan) {
  const std::size_t chip = wide_footprint(kernel, plan.blocks, true).chip;
  if (allow_chip<ClusterBarrier, Kernel>(chip) != cudaSuccess) return false;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(plan.blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(BlockTeam::kMaxThreads);
  config.dynamicSmemBytes = chip;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, run_wide<ClusterBarrier, Kernel>, &config) ==
      cudaSuccess)
    return clusters > 0;
  cudaGetLastError();  // a question was refused, no launch: nobody else should trip over it
  return false;
}

// Calls use(zero of the barrier's type, grid) for the plan.
template <class Kernel, class Use>
cudaError_t with_wide_grid(const Kernel& kernel, const DeviceBatch& batch, const WidePlan& plan,
                           const WideLimits& limits, Use&& use) {
  constexpr unsigned kThreads = BlockTeam::kMaxThreads;
  WideGrid grid{1, 1, kThreads, {}};
  // Thousands of actions and no pattern of P_π.
  if (wide_footprint(kernel, plan.blocks, Kernel::Home::kOnChip).chip > limits.block.chip)
    return cudaErrorNotSupported;
  if constexpr (Kernel::Home::kOnChip) {
    grid.blocks = static_cast<unsigned>(plan.blocks);
    grid.bytes = wide_footprint(kernel, plan.blocks, true);
    grid.teams = block_count(batch.total(), grid.bytes, limits.block);
    return use(ClusterBarrier{}, grid);
  } else {
    if (plan.kind == WideKind::kGrid) {
      const cudaError_t error =
          resident_blocks(kernel, limits, batch.states, kThreads, grid.blocks);
      if (error != cudaSuccess) return error;
      grid.bytes = wide_footprint(kernel, grid.blocks, false);
      return use(GridBarrier{}, grid);
    }
    grid.bytes = wide_footprint(kernel, 1, false);
    grid.teams = block_count(batch.total(), grid.bytes, limits.block);
    return use(GridBarrier{}, grid);
  }
}

}  // namespace birl::device
