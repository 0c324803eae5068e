// Launches of the policy-system kernel for large problems (device/large_policy_solve.h).
//
// NOT YET RUN ON A GPU: see solve_large.cu.
#include "cuda_large.h"
#include "device/cuda_wide.cuh"

namespace birl {

using namespace device;

namespace {

// use(kernel, barrier, grid)
template <class Use>
cudaError_t with_large_policy_solve(const DeviceBatch& batch, const DevicePolicySolve& request,
                                    const WidePattern& pattern, Use&& use) {
  WideLimits limits{};
  const cudaError_t error = wide_limits(batch, limits);
  if (error != cudaSuccess) return error;
  if (request.right_sides < 0 || (batch.sparse() && !pattern.crow)) return cudaErrorInvalidValue;
  return with_storage(batch, [&](auto zero) {
    const WidePlan plan = far_plan(batch, limits);
    return with_far_home<decltype(zero)>(batch, pattern, plan, [&](const auto& home) {
      const auto kernel = large_policy_solve_kernel(home, batch, request);
      return with_wide_grid(kernel, batch, plan, limits, [&](auto barrier, const WideGrid& grid) {
        return use(kernel, barrier, grid);
      });
    });
  });
}

}  // namespace

cudaError_t large_policy_solve_workspace(const DeviceBatch& batch, const WidePattern& pattern,
                                         Index right_sides, bool transpose, std::size_t& bytes) {
  DevicePolicySolve request{};
  request.right_sides = right_sides;
  request.transpose = transpose;
  return with_large_policy_solve(batch, request, pattern,
                                 [&](const auto&, auto, const WideGrid& grid) {
                                   bytes = grid.workspace();
                                   return cudaSuccess;
                                 });
}

cudaError_t launch_large_policy_solve(const DeviceBatch& batch, const DevicePolicySolve& request,
                                      const WidePattern& pattern, void* workspace,
                                      cudaStream_t stream) {
  return with_large_policy_solve(
      batch, request, pattern, [&](const auto& kernel, auto barrier, const WideGrid& grid) {
        return launch_wide<decltype(barrier)>(kernel, batch.total(), grid, workspace, stream);
      });
}

}  // namespace birl
