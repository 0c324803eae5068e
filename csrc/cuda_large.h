// Launchers of the kernels whose team is several blocks: large dense problems and sparse ones.
// Device pointers; the caller owns all memory and the stream. No launcher synchronises or
// allocates; cooperative and cluster launches are attributes of cudaLaunchKernelEx, which CUDA
// captures as kernel nodes ("valid for graph nodes" in driver_types.h since 11.x).
#pragma once

#include <cuda_runtime_api.h>

#include "device/requests.h"
#include "device/wide_pattern.h"

namespace birl {

// Bytes of global memory that a call of this shape works in; only sizes are read, and whether there
// is a pattern.
cudaError_t large_solve_workspace(const DeviceBatch& batch, const WidePattern& pattern,
                                  std::size_t& bytes);
cudaError_t large_policy_solve_workspace(const DeviceBatch& batch, const WidePattern& pattern,
                                         Index right_sides, bool transpose, std::size_t& bytes);

// The fixed point V* = TV* of every problem; any number of states, any device: a cluster of blocks
// per problem, the whole device on one problem after another, or one block per problem.
// cudaErrorInvalidValue if a transition has more than 2^31 - 1 rows, here and below.
cudaError_t launch_large_solve(const DeviceBatch& batch, const DeviceSolve& request,
                               const WidePattern& pattern, void* workspace, cudaStream_t stream);

// (I − γP_π)x = b or its transpose for every right-hand side, by Krylov or Richardson iteration;
// sparse: `pattern` is needed.
cudaError_t launch_large_policy_solve(const DeviceBatch& batch, const DevicePolicySolve& request,
                                      const WidePattern& pattern, void* workspace,
                                      cudaStream_t stream);

}  // namespace birl
