// The launchers of cuda_kernels.h over the host double: with csrc/module_cuda.cpp and
// stub/cuda_runtime_api.h this makes a module `_cuda` that runs the kernels on the host, through
// the same dispatch, selection and glue as on a GPU.
#include "bellman_cuda.h"
#include "cuda_kernels.h"
#include "device/dispatch.h"
#include "device/host_team.h"

namespace birl {

using namespace device;

namespace {

// Small, so that small tests meet every residence of P.
constexpr DeviceLimits kLimits{24 * 1024, 2};

cudaError_t check(const DeviceBatch& batch) {
  return indexable(batch) ? cudaSuccess : cudaErrorInvalidValue;
}

// As run_items does: the chip's memory in one piece, and so many blocks in the workspace given.
template <class Kernel>
cudaError_t run(const Kernel& kernel, Index items, const Grid& grid, void* workspace) {
  std::vector<double> chip(grid.bytes.chip / sizeof(double) + 1);
  for (Index item = 0; item < items; ++item) {
    Arena on_chip(chip.data());
    Arena spill(static_cast<char*>(workspace) + grid.bytes.spill * (item % grid.blocks));
    const auto arrays = kernel.lay_out(on_chip, spill);
    SerialTeam team(static_cast<int>(grid.threads), Order::kShuffled, static_cast<unsigned>(item));
    kernel.run(team, arrays, item);
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_sweep(const DeviceSweep&, cudaStream_t) { return cudaErrorNotSupported; }

cudaError_t solve_workspace(const DeviceBatch& batch, std::size_t& bytes) {
  if (const cudaError_t error = check(batch); error != cudaSuccess) return error;
  bytes = with_solve(batch, {}, kLimits,
                     [](const auto&, const Grid& grid) { return grid.workspace(); });
  return cudaSuccess;
}

cudaError_t launch_solve(const DeviceBatch& batch, const DeviceSolve& request, void* workspace,
                         cudaStream_t) {
  if (const cudaError_t error = check(batch); error != cudaSuccess) return error;
  return with_solve(batch, request, kLimits, [&](const auto& kernel, const Grid& grid) {
    return run(kernel, batch.total(), grid, workspace);
  });
}

cudaError_t policy_solve_workspace(const DeviceBatch& batch, Index right_sides,
                                   std::size_t& bytes) {
  if (const cudaError_t error = check(batch); error != cudaSuccess) return error;
  DevicePolicySolve request{};
  request.right_sides = right_sides;
  bytes = with_policy_solve(batch, request, kLimits,
                            [](const auto&, const Grid& grid) { return grid.workspace(); });
  return cudaSuccess;
}

cudaError_t launch_policy_solve(const DeviceBatch& batch, const DevicePolicySolve& request,
                                void* workspace, cudaStream_t) {
  if (const cudaError_t error = check(batch); error != cudaSuccess) return error;
  return with_policy_solve(batch, request, kLimits, [&](const auto& kernel, const Grid& grid) {
    return run(kernel, batch.total(), grid, workspace);
  });
}

cudaError_t launch_outer(const DeviceBatch& batch, const DeviceOuter& request, cudaStream_t) {
  if (const cudaError_t error = check(batch); error != cudaSuccess) return error;
  return with_outer(batch, request, [&](const auto& kernel, Index items, const Grid& grid) {
    return run(kernel, items, grid, nullptr);
  });
}

}  // namespace birl
