// Launcher of the CUDA sweep. Device pointers; the caller owns all memory and the stream.
#pragma once

#include <cuda_runtime_api.h>

#include "core/request.h"

namespace birl {

struct DeviceSweep {
  Batch batch;
  const double* value;  // (N,G,S)
  double* value_out;    // (N,G,S)
  double* advantage;    // (N,G,S,A); the last three are optional
  double* policy;
  double* log_policy;
};

// Enqueues one sweep; no synchronisation, no allocation. cudaErrorInvalidValue if a state has more
// actions than fit in shared memory (6144).
cudaError_t launch_sweep(const DeviceSweep& request, cudaStream_t stream);

}  // namespace birl
