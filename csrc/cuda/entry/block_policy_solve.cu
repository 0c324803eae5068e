// Launches of the policy-system and cotangent kernels (cuda/block/policy_solve.h,
// cuda/block/outer.h).
//
// NOT YET RUN ON A GPU: see cuda/entry/block_solve.cu.
#include "cuda/block/device.h"
#include "cuda/block/dispatch.h"
#include "cuda/entry/block.h"
#include "cuda/layer/cuda_team.cuh"

namespace birl {

using namespace device;

namespace {

cudaError_t check(const Batch& batch, Index right_sides, DeviceLimits& limits) {
  if (right_sides < 0 || right_sides > kMostRows) return cudaErrorInvalidValue;
  if (batch.states > kDirectLimit) return cudaErrorNotSupported;
  return device::check(batch, limits);
}

}  // namespace

cudaError_t policy_solve_workspace(const Batch& batch, Index right_sides, std::size_t& bytes) {
  DeviceLimits limits{};
  const cudaError_t error = check(batch, right_sides, limits);
  if (error != cudaSuccess) return error;
  PolicySolve request{};
  request.right_sides = right_sides;
  bytes = with_policy_solve(batch, request, limits,
                            [](const auto&, const auto& config) { return config.workspace(); });
  return cudaSuccess;
}

cudaError_t launch_policy_solve(const Batch& batch, const PolicySolve& request, void* workspace,
                                cudaStream_t stream) {
  DeviceLimits limits{};
  const cudaError_t error = check(batch, request.right_sides, limits);
  if (error != cudaSuccess) return error;
  return with_policy_solve(batch, request, limits, [&](const auto& kernel, const auto& config) {
    return launch<BlockTeam>(kernel, batch.total(), config, workspace, stream);
  });
}

cudaError_t launch_outer(const Batch& batch, const Outer& request, cudaStream_t stream) {
  if (!indexable(batch)) return cudaErrorInvalidValue;
  return with_outer(batch, request, [&](const auto& kernel, Index items, const auto& config) {
    return launch<BlockTeam>(kernel, items, config, nullptr, stream);
  });
}

}  // namespace birl
