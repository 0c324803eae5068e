// Launchers of the CUDA kernels. Device pointers; the caller owns all memory and the stream. No
// launcher synchronises or allocates, so all of them can be captured in a graph.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/entry/requests.h"

namespace birl {

// Bytes of global memory that a call of this shape works in; only sizes are read.
cudaError_t solve_workspace(const DeviceBatch& batch, std::size_t& bytes);
cudaError_t policy_solve_workspace(const DeviceBatch& batch, Index right_sides, std::size_t& bytes);

// The fixed point V* = TV* of every problem. cudaErrorInvalidValue if a transition has more than
// 2^31 - 1 rows, here and below.
cudaError_t launch_solve(const DeviceBatch& batch, const DeviceSolve& request, void* workspace,
                         cudaStream_t stream);

// (I − γP_π)x = b or its transpose for every right-hand side, by elimination; reward, log_reference
// and temperature are not read. cudaErrorNotSupported beyond kDirectLimit states.
cudaError_t launch_policy_solve(const DeviceBatch& batch, const DevicePolicySolve& request,
                                void* workspace, cudaStream_t stream);

// out = Σ_g weight(s,a) vector(t) − shift(s,a) on the pattern of the transition; of the batch only
// sizes and pattern are read.
cudaError_t launch_outer(const DeviceBatch& batch, const DeviceOuter& request, cudaStream_t stream);

}  // namespace birl
