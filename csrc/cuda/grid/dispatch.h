// From a request to a kernel of the grid, as cuda/block/dispatch.h for one block: the same for the
// GPU (cuda/entry/grid_solve.cu, cuda/entry/grid_policy_solve.cu) and for the host.
#pragma once

#include "cuda/block/dispatch.h"
#include "cuda/grid/policy_solve.h"
#include "cuda/grid/solve.h"

namespace birl::device {

// One block for each problem keeps the device busy once there are twice as many as processors.
inline bool one_block_each(const Batch& batch, const DeviceLimits& limits) {
  return batch.total() >= 2 * static_cast<Index>(limits.processors);
}

// `resident`: blocks that run at once. Each problem gets one of them, or all.
template <class Kernel>
GridLaunchConfig grid_launch_config(const Kernel& kernel, const Batch& batch,
                                    const DeviceLimits& limits, Index resident) {
  GridLaunchConfig config{1, 1, kGridThreads, 0};
  const bool alone = one_block_each(batch, limits);
  if (!alone)
    config.blocks = static_cast<unsigned>(resident < batch.states ? resident : batch.states);
  config.bytes = grid_footprint(kernel, config.blocks);
  if (alone) config.teams = block_count(batch.total(), {0, config.bytes}, limits);
  return config;
}

// body(home) with the home of P; of a policy's matrix, or its transpose, sparse ones need a
// pattern.
template <class Body>
auto with_grid_home(const Batch& batch, const GridPattern& pattern, bool transpose, Body&& body) {
  const Stored values{batch.transition, batch.is_double};
  if (batch.sparse())
    return body(GridCsrRows{values, batch.states, batch.actions, batch.crow, batch.col, batch.nnz,
                            pattern});
  return body(GridDenseRows{values, batch.states, batch.actions, transpose});
}

template <class Body>
auto with_grid_solve(const Batch& batch, const Solve& request, const GridPattern& pattern,
                     Body&& body) {
  return with_grid_home(batch, pattern, false, [&](const auto& home) {
    return body(GridSolveKernel<std::decay_t<decltype(home)>>{home, batch, request});
  });
}

template <class Body>
auto with_grid_policy_solve(const Batch& batch, const PolicySolve& request,
                            const GridPattern& pattern, Body&& body) {
  return with_grid_home(batch, pattern, request.transpose, [&](const auto& home) {
    using Home = std::decay_t<decltype(home)>;
    if (request.right_sides == 1) return body(GridPolicySolveKernel<Home, 1>{home, batch, request});
    return body(GridPolicySolveKernel<Home, 4>{home, batch, request});
  });
}

}  // namespace birl::device
