// Launchers of the kernels whose team is the whole device: large dense problems and sparse ones.
// Device pointers; the caller owns all memory and the stream. No launcher synchronises or
// allocates.
#pragma once

#include <cuda_runtime_api.h>

#include "core/request.h"
#include "cuda/grid/pattern.h"

namespace birl {

// Bytes of global memory that a call of this shape works in; only sizes are read.
cudaError_t grid_solve_workspace(const Batch& batch, const GridPattern& pattern,
                                 std::size_t& bytes);
cudaError_t grid_policy_solve_workspace(const Batch& batch, const GridPattern& pattern,
                                        Index right_sides, std::size_t& bytes);

// The fixed point V* = TV* of every problem, any number of states: all blocks work on one problem
// after another, or where there are many each on its own. A sparse batch needs the pattern of P_π.
// cudaErrorInvalidValue if a transition has more than 2^31 - 1 rows, cudaErrorNotSupported on a
// device without cooperative launches, here and below.
cudaError_t launch_grid_solve(const Batch& batch, const Solve& request, const GridPattern& pattern,
                              void* workspace, cudaStream_t stream);

// (I − γP_π)x = b or its transpose for every right-hand side, by products alone; the pattern is
// that of P_π, or of its transpose. A system that mixes too slowly gets NaN.
cudaError_t launch_grid_policy_solve(const Batch& batch, const PolicySolve& request,
                                     const GridPattern& pattern, void* workspace,
                                     cudaStream_t stream);

}  // namespace birl
