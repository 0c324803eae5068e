// The grid of a wide kernel and its launch. No call synchronises or allocates.
#pragma once

#include "cuda/block/device.h"
#include "cuda/grid/dispatch.h"
#include "cuda/layer/cuda_wide_team.cuh"

namespace birl::device {

template <class Kernel>
cudaError_t grid_on_device(const Kernel& kernel, const Batch& batch, WideGrid& grid) {
  DeviceLimits limits{};
  cudaError_t error = check(batch, limits);
  int device = 0, cooperative = 0, each = 0;
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, run_wide<Kernel>, kWideThreads, 0);
  if (error != cudaSuccess) return error;
  if (!cooperative || each < 1) return cudaErrorNotSupported;
  // More blocks than two on each multiprocessor only make the barrier slower.
  grid =
      wide_grid(kernel, batch, limits, static_cast<Index>(each < 2 ? each : 2) * limits.processors);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t workspace_of(const Kernel& kernel, const Batch& batch, std::size_t& bytes) {
  WideGrid grid{};
  const cudaError_t error = grid_on_device(kernel, batch, grid);
  bytes = grid.workspace();
  return error;
}

template <class Kernel>
cudaError_t launch_on_grid(const Kernel& kernel, const Batch& batch, void* workspace,
                           cudaStream_t stream) {
  WideGrid grid{};
  const cudaError_t error = grid_on_device(kernel, batch, grid);
  return error == cudaSuccess ? launch_wide(kernel, batch.total(), grid, workspace, stream) : error;
}

}  // namespace birl::device
