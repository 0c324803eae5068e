// Python's view of the CUDA kernels: requests by name, with device pointers and a stream handle as
// integers. Importing it needs no driver. Nothing here has run on a GPU yet; the same file is
// tested over the kernels' host double (tests/native).
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "core/named.h"
#include "cuda/block/selection.h"
#include "cuda/entry/block.h"
#include "cuda/entry/grid.h"

namespace py = pybind11;
using birl::Batch;
using birl::Index;

namespace {

// A launch that the driver refused; Python lets PyTorch stand in.
struct LaunchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw LaunchError(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes a device current, and the caller's again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

py::dict build_info() {
  py::dict info;
  info["version"] = BIRL_VERSION;
  info["sources"] = BIRL_SOURCES;
  info["toolkit"] =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["architectures"] = BIRL_CUDA_ARCHITECTURES;
  return info;
}

// How and where a request runs.
#define BIRL_LAUNCH(NEED, MAY)                                                               \
  NEED(bool, grid)                         /* the whole device works on each problem */      \
  MAY(const Index*, pattern_crow, nullptr) /* of P_π or its transpose, if sparse and grid */ \
  MAY(const std::int32_t*, pattern_col, nullptr)                                             \
  MAY(const Index*, pattern_slot, nullptr)                                                   \
  MAY(void*, workspace, nullptr)                                                             \
  NEED(cudaStream_t, stream)                                                                 \
  NEED(int, device)

struct Launch {
  BIRL_FIELDS(Launch, BIRL_LAUNCH)
};

birl::GridPattern pattern_of(const Launch& launch, const Batch& batch) {
  return {launch.pattern_crow, launch.pattern_col, launch.pattern_slot, batch.nnz};
}

bool solve_fits(const py::dict& problem) {
  return birl::device::worthwhile(birl::batch_from(problem));
}

std::size_t solve_workspace(const py::dict& problem, const py::dict&, const py::dict& where) {
  const Batch batch = birl::batch_from(problem);
  const auto launch = birl::filled<Launch>(where);
  const DeviceGuard guard(launch.device);
  std::size_t bytes = 0;
  check(launch.grid ? birl::grid_solve_workspace(batch, pattern_of(launch, batch), bytes)
                    : birl::solve_workspace(batch, bytes),
        "solve_workspace");
  return bytes;
}

void solve(const py::dict& problem, const py::dict& how, const py::dict& where) {
  const Batch batch = birl::batch_from(problem);
  const birl::Solve request = birl::solve_from(how);
  const auto launch = birl::filled<Launch>(where);
  py::gil_scoped_release release;
  const DeviceGuard guard(launch.device);
  check(launch.grid ? birl::launch_grid_solve(batch, request, pattern_of(launch, batch),
                                              launch.workspace, launch.stream)
                    : birl::launch_solve(batch, request, launch.workspace, launch.stream),
        "solve");
}

Batch policy_batch(const py::dict& given) {
  return birl::batch_from(given, {"reward", "temperature"});
}

std::size_t policy_solve_workspace(const py::dict& problem, const py::dict& how,
                                   const py::dict& where) {
  const Batch batch = policy_batch(problem);
  const Index right_sides = birl::policy_solve_from(how).right_sides;
  const auto launch = birl::filled<Launch>(where);
  const DeviceGuard guard(launch.device);
  std::size_t bytes = 0;
  check(launch.grid ? birl::grid_policy_solve_workspace(batch, pattern_of(launch, batch),
                                                        right_sides, bytes)
                    : birl::policy_solve_workspace(batch, right_sides, bytes),
        "policy_solve_workspace");
  return bytes;
}

void policy_solve(const py::dict& problem, const py::dict& how, const py::dict& where) {
  const Batch batch = policy_batch(problem);
  const birl::PolicySolve request = birl::policy_solve_from(how);
  const auto launch = birl::filled<Launch>(where);
  py::gil_scoped_release release;
  const DeviceGuard guard(launch.device);
  check(launch.grid ? birl::launch_grid_policy_solve(batch, request, pattern_of(launch, batch),
                                                     launch.workspace, launch.stream)
                    : birl::launch_policy_solve(batch, request, launch.workspace, launch.stream),
        "policy_solve");
}

void outer(const py::dict& problem, const py::dict& how, const py::dict& where) {
  const Batch batch =
      birl::batch_from(problem, {"transition", "reward", "discount", "temperature"});
  const auto request = birl::filled<birl::Outer>(how);
  const auto launch = birl::filled<Launch>(where);
  py::gil_scoped_release release;
  const DeviceGuard guard(launch.device);
  check(birl::launch_outer(batch, request, launch.stream), "outer");
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of birl_ext; see csrc/ and birl_ext/ops/backends/cuda.py.";
  py::register_exception<LaunchError>(module, "LaunchError", PyExc_RuntimeError);
  module.attr("DIRECT_LIMIT") = birl::kDirectLimit;
  module.def("build_info", &build_info);
  module.def("solve_fits", &solve_fits);
  module.def("solve_workspace", &solve_workspace);
  module.def("solve", &solve);
  module.def("policy_solve_workspace", &policy_solve_workspace);
  module.def("policy_solve", &policy_solve);
  module.def("outer", &outer);
}
