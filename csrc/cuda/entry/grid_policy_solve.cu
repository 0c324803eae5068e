// Launches of the grid's policy-system kernel (cuda/grid/policy_solve.h).
//
// NOT YET RUN ON A GPU: see cuda/entry/grid_solve.cu.
#include "cuda/entry/grid.h"
#include "cuda/grid/launch.cuh"

namespace birl {

using namespace device;

cudaError_t grid_policy_solve_workspace(const Batch& batch, const GridPattern& pattern,
                                        Index right_sides, std::size_t& bytes) {
  PolicySolve request{};
  request.right_sides = right_sides;
  return with_grid_policy_solve(batch, request, pattern, [&](const auto& kernel) {
    return workspace_of(kernel, batch, bytes);
  });
}

cudaError_t launch_grid_policy_solve(const Batch& batch, const PolicySolve& request,
                                     const GridPattern& pattern, void* workspace,
                                     cudaStream_t stream) {
  return with_grid_policy_solve(batch, request, pattern, [&](const auto& kernel) {
    return launch_on_grid(kernel, batch, workspace, stream);
  });
}

}  // namespace birl
