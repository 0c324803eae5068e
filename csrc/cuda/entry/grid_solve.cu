// Launches of the grid's fixed-point kernel (cuda/grid/solve.h).
//
// NOT YET RUN ON A GPU: it compiles for every architecture of the build, and the very same kernel
// body is tested on the host (tests/native); barriers, shuffles and launches are not.
#include "cuda/entry/grid.h"
#include "cuda/grid/launch.cuh"

namespace birl {

using namespace device;

cudaError_t grid_solve_workspace(const Batch& batch, const GridPattern& pattern,
                                 std::size_t& bytes) {
  return with_grid_solve(batch, {}, pattern,
                         [&](const auto& kernel) { return workspace_of(kernel, batch, bytes); });
}

cudaError_t launch_grid_solve(const Batch& batch, const Solve& request, const GridPattern& pattern,
                              void* workspace, cudaStream_t stream) {
  return with_grid_solve(batch, request, pattern, [&](const auto& kernel) {
    return launch_on_grid(kernel, batch, workspace, stream);
  });
}

}  // namespace birl
