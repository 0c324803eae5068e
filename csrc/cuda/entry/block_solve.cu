// Launches of the fixed-point kernels (cuda/block/solve.h), one instance per home of P.
//
// NOT YET RUN ON A GPU: it compiles for every architecture of the build, and the very same kernel
// bodies are tested on the host (tests/native); barriers, shuffles and launches are not.
#include <type_traits>

#include "cuda/block/device.h"
#include "cuda/block/dispatch.h"
#include "cuda/entry/block.h"
#include "cuda/layer/cuda_team.cuh"

namespace birl {

using namespace device;

cudaError_t solve_workspace(const Batch& batch, std::size_t& bytes) {
  DeviceLimits limits{};
  const cudaError_t error = check(batch, limits);
  if (error != cudaSuccess) return error;
  bytes = with_solve(batch, {}, limits,
                     [](const auto&, const auto& config) { return config.workspace(); });
  return cudaSuccess;
}

cudaError_t launch_solve(const Batch& batch, const Solve& request, void* workspace,
                         cudaStream_t stream) {
  DeviceLimits limits{};
  const cudaError_t error = check(batch, limits);
  if (error != cudaSuccess) return error;
  return with_solve(batch, request, limits, [&](const auto& kernel, const auto& config) {
    constexpr bool one_warp = std::decay_t<decltype(kernel)>::kOneWarp;
    using Team = std::conditional_t<one_warp, WarpTeam, BlockTeam>;
    return launch<Team>(kernel, batch.total(), config, workspace, stream);
  });
}

}  // namespace birl
