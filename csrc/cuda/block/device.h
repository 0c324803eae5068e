// What the launchers ask of the device they run on. No call synchronises or allocates, so all of
// them are allowed while a graph is being captured.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/block/selection.h"

namespace birl::device {

inline cudaError_t current_limits(DeviceLimits& limits) {
  int device = 0, chip = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&chip, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limits.processors, cudaDevAttrMultiProcessorCount, device);
  constexpr int kStatic = 4096;  // what a team keeps for itself, with room to spare
  limits.chip = static_cast<std::size_t>(chip > kStatic ? chip - kStatic : 0);
  return error;
}

// Whether the kernels can index the batch, and the limits of the current device.
inline cudaError_t check(const Batch& batch, DeviceLimits& limits) {
  return indexable(batch) ? current_limits(limits) : cudaErrorInvalidValue;
}

}  // namespace birl::device
