// The launch of a kernel of the grid. No call synchronises or allocates.
#pragma once

#include "cuda/block/device.h"
#include "cuda/grid/dispatch.h"
#include "cuda/layer/cuda_grid_team.cuh"

namespace birl::device {

template <class Kernel>
cudaError_t config_on_device(const Kernel& kernel, const Batch& batch, GridLaunchConfig& config) {
  DeviceLimits limits{};
  cudaError_t error = check(batch, limits);
  int device = 0, cooperative = 0, each = 0;
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, run_grid<Kernel>, kGridThreads, 0);
  if (error != cudaSuccess) return error;
  if (!cooperative || each < 1) return cudaErrorNotSupported;
  // More blocks than two on each multiprocessor only make the barrier slower.
  config = grid_launch_config(kernel, batch, limits,
                              static_cast<Index>(each < 2 ? each : 2) * limits.processors);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t workspace_of(const Kernel& kernel, const Batch& batch, std::size_t& bytes) {
  GridLaunchConfig config{};
  const cudaError_t error = config_on_device(kernel, batch, config);
  bytes = config.workspace();
  return error;
}

template <class Kernel>
cudaError_t launch_on_grid(const Kernel& kernel, const Batch& batch, void* workspace,
                           cudaStream_t stream) {
  GridLaunchConfig config{};
  const cudaError_t error = config_on_device(kernel, batch, config);
  return error == cudaSuccess ? launch_grid(kernel, batch.total(), config, workspace, stream)
                              : error;
}

}  // namespace birl::device
