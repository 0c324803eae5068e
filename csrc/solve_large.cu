// Launches of the fixed-point kernel for large problems (device/large_solve.h).
//
// NOT YET RUN ON A GPU: it compiles for every architecture of the build, and the very same kernel
// body is tested on the host (tests/native); barriers, shuffles, distributed shared memory and
// launches are not.
#include "cuda_large.h"
#include "device/cuda_wide.cuh"

namespace birl {

using namespace device;

namespace {

// use(kernel, barrier, grid)
template <class Use>
cudaError_t with_large_solve(const DeviceBatch& batch, const DeviceSolve& request,
                             const WidePattern& pattern, Use&& use) {
  WideLimits limits{};
  const cudaError_t error = wide_limits(batch, limits);
  if (error != cudaSuccess) return error;
  return with_storage(batch, [&](auto zero) {
    using Real = decltype(zero);
    const auto on = [&](const auto& home, const WidePlan& plan) {
      const auto kernel = large_solve_kernel(home, batch, request, plan);
      return with_wide_grid(kernel, batch, plan, limits, [&](auto barrier, const WideGrid& grid) {
        return use(kernel, barrier, grid);
      });
    };
    const WidePlan plan = choose_wide_plan(batch, limits, [&](const WidePlan& candidate) {
      const auto home = dense_wide<Real, true>(batch, candidate);
      return wide_footprint(large_solve_kernel(home, batch, request, candidate), candidate.blocks,
                            true)
          .chip;
    });
    if (plan.kind == WideKind::kCluster) {
      const auto home = dense_wide<Real, true>(batch, plan);
      if (cluster_launches(large_solve_kernel(home, batch, request, plan), plan))
        return on(home, plan);
    }
    const WidePlan far = plan.kind == WideKind::kCluster ? far_plan(batch, limits) : plan;
    return with_far_home<Real>(batch, pattern, far,
                               [&](const auto& home) { return on(home, far); });
  });
}

}  // namespace

cudaError_t large_solve_workspace(const DeviceBatch& batch, const WidePattern& pattern,
                                  std::size_t& bytes) {
  return with_large_solve(batch, {}, pattern, [&](const auto&, auto, const WideGrid& grid) {
    bytes = grid.workspace();
    return cudaSuccess;
  });
}

cudaError_t launch_large_solve(const DeviceBatch& batch, const DeviceSolve& request,
                               const WidePattern& pattern, void* workspace, cudaStream_t stream) {
  return with_large_solve(
      batch, request, pattern, [&](const auto& kernel, auto barrier, const WideGrid& grid) {
        return launch_wide<decltype(barrier)>(kernel, batch.total(), grid, workspace, stream);
      });
}

}  // namespace birl
