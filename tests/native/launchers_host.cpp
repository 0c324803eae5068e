// The launchers of cuda/entry/block.h over the host double: with csrc/cuda/entry/module.cpp and
// stub/cuda_runtime_api.h this makes a module `_cuda` that runs the kernels on the host, through
// the same dispatch, selection and glue as on a GPU.
#include "cuda/block/dispatch.h"
#include "cuda/entry/block.h"
#include "cuda/entry/grid.h"
#include "cuda/grid/dispatch.h"
#include "cuda/layer/host_grid_team.h"
#include "cuda/layer/host_team.h"

namespace birl {

using namespace device;

namespace {

// Small, so that small tests meet every residence of P.
constexpr DeviceLimits kLimits{24 * 1024, 2};
constexpr Index kResident = 3;  // blocks at once

cudaError_t check(const Batch& batch) {
  return indexable(batch) ? cudaSuccess : cudaErrorInvalidValue;
}

// As run_items does: the chip's memory in one piece, and so many blocks in the workspace given.
template <class Kernel>
cudaError_t run(const Kernel& kernel, Index items, const LaunchConfig& config, void* workspace) {
  std::vector<double> chip(config.bytes.chip / sizeof(double) + 1);
  for (Index item = 0; item < items; ++item) {
    Arena on_chip(chip.data());
    Arena spill(static_cast<char*>(workspace) + config.bytes.spill * (item % config.blocks));
    const auto arrays = kernel.lay_out(on_chip, spill);
    SerialTeam team(static_cast<int>(config.threads), Order::kShuffled,
                    static_cast<unsigned>(item));
    kernel.run(team, arrays, item);
  }
  return cudaSuccess;
}

// As run_grid does: the items in turn with the teams of the launch, each team in its part of the
// workspace.
template <class Kernel>
cudaError_t run_on_grid(const Kernel& kernel, const Batch& batch, void* workspace) {
  if (const cudaError_t error = check(batch); error != cudaSuccess) return error;
  const GridLaunchConfig config = grid_launch_config(kernel, batch, kLimits, kResident);
  for (Index item = 0; item < batch.total(); ++item) {
    Arena common(static_cast<char*>(workspace) + config.bytes * (item % config.teams));
    common.take<char>(static_cast<Index>(2 * kLargestReduced) * config.blocks);
    const auto arrays = kernel.lay_out(common);
    SerialGrid<Kernel> team(static_cast<int>(config.blocks), 8, Order::kForward,
                            static_cast<unsigned>(item));
    kernel.run(team, arrays, item);
  }
  return cudaSuccess;
}

template <class Kernel>
cudaError_t grid_workspace(const Kernel& kernel, const Batch& batch, std::size_t& bytes) {
  if (const cudaError_t error = check(batch); error != cudaSuccess) return error;
  bytes = grid_launch_config(kernel, batch, kLimits, kResident).workspace();
  return cudaSuccess;
}

}  // namespace

cudaError_t grid_solve_workspace(const Batch& batch, const GridPattern& pattern,
                                 std::size_t& bytes) {
  return with_grid_solve(batch, {}, pattern,
                         [&](const auto& kernel) { return grid_workspace(kernel, batch, bytes); });
}

cudaError_t launch_grid_solve(const Batch& batch, const Solve& request, const GridPattern& pattern,
                              void* workspace, cudaStream_t) {
  return with_grid_solve(batch, request, pattern,
                         [&](const auto& kernel) { return run_on_grid(kernel, batch, workspace); });
}

cudaError_t grid_policy_solve_workspace(const Batch& batch, const GridPattern& pattern,
                                        Index right_sides, std::size_t& bytes) {
  PolicySolve request{};
  request.right_sides = right_sides;
  return with_grid_policy_solve(batch, request, pattern, [&](const auto& kernel) {
    return grid_workspace(kernel, batch, bytes);
  });
}

cudaError_t launch_grid_policy_solve(const Batch& batch, const PolicySolve& request,
                                     const GridPattern& pattern, void* workspace, cudaStream_t) {
  return with_grid_policy_solve(batch, request, pattern, [&](const auto& kernel) {
    return run_on_grid(kernel, batch, workspace);
  });
}

cudaError_t solve_workspace(const Batch& batch, std::size_t& bytes) {
  if (const cudaError_t error = check(batch); error != cudaSuccess) return error;
  bytes = with_solve(batch, {}, kLimits,
                     [](const auto&, const auto& config) { return config.workspace(); });
  return cudaSuccess;
}

cudaError_t launch_solve(const Batch& batch, const Solve& request, void* workspace, cudaStream_t) {
  if (const cudaError_t error = check(batch); error != cudaSuccess) return error;
  return with_solve(batch, request, kLimits, [&](const auto& kernel, const auto& config) {
    return run(kernel, batch.total(), config, workspace);
  });
}

cudaError_t policy_solve_workspace(const Batch& batch, Index right_sides, std::size_t& bytes) {
  if (const cudaError_t error = check(batch); error != cudaSuccess) return error;
  PolicySolve request{};
  request.right_sides = right_sides;
  bytes = with_policy_solve(batch, request, kLimits,
                            [](const auto&, const auto& config) { return config.workspace(); });
  return cudaSuccess;
}

cudaError_t launch_policy_solve(const Batch& batch, const PolicySolve& request, void* workspace,
                                cudaStream_t) {
  if (const cudaError_t error = check(batch); error != cudaSuccess) return error;
  return with_policy_solve(batch, request, kLimits, [&](const auto& kernel, const auto& config) {
    return run(kernel, batch.total(), config, workspace);
  });
}

cudaError_t launch_outer(const Batch& batch, const Outer& request, cudaStream_t) {
  if (const cudaError_t error = check(batch); error != cudaSuccess) return error;
  return with_outer(batch, request, [&](const auto& kernel, Index items, const auto& config) {
    return run(kernel, items, config, nullptr);
  });
}

}  // namespace birl
