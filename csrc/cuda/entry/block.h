// Launchers of the CUDA kernels. Device pointers; the caller owns all memory and the stream. No
// launcher synchronises or allocates, so all of them can be captured in a graph.
#pragma once

#include <cuda_runtime_api.h>

#include "core/request.h"

namespace birl {

// Bytes of global memory that a call of this shape works in; only sizes are read.
cudaError_t solve_workspace(const Batch& batch, std::size_t& bytes);
cudaError_t policy_solve_workspace(const Batch& batch, Index right_sides, std::size_t& bytes);

// The fixed point V* = TV* of every problem. cudaErrorInvalidValue if a transition has more than
// 2^31 - 1 rows, here and below.
cudaError_t launch_solve(const Batch& batch, const Solve& request, void* workspace,
                         cudaStream_t stream);

// (I − γP_π)x = b or its transpose for every right-hand side, by elimination; reward, log_reference
// and temperature are not read. cudaErrorNotSupported beyond kDirectLimit states.
cudaError_t launch_policy_solve(const Batch& batch, const PolicySolve& request, void* workspace,
                                cudaStream_t stream);

// out = Σ_g weight(s,a) vector(t) − shift(s,a) on the pattern of the transition; of the batch only
// sizes and pattern are read.
cudaError_t launch_outer(const Batch& batch, const Outer& request, cudaStream_t stream);

}  // namespace birl
