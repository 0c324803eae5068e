// Python's view of the CUDA kernels: device pointers and a stream handle as integers. Importing it
// needs no driver. Nothing here has run on a GPU yet; the same file is tested over the kernels'
// host double (tests/native).
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/block/selection.h"
#include "cuda/entry/block.h"
#include "cuda/entry/grid.h"

namespace py = pybind11;
using birl::Batch;
using birl::Index;

namespace {

using Pointer = std::uintptr_t;

template <class T>
T* at(Pointer p) {
  return reinterpret_cast<T*>(p);
}

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

Batch batch_of(int dtype, Index N, Index G, Index S, Index A, Pointer transition, Pointer crow,
               Pointer col, Index nnz, Pointer reward, Pointer log_reference, Pointer discount,
               Pointer temperature) {
  if (dtype != 0 && dtype != 1) throw py::value_error("dtype: expected 0 (float32) or 1 (float64)");
  if (N < 0 || G < 0 || S < 1 || A < 1 || nnz < 0)
    throw py::value_error("sizes: expected N, G, nnz >= 0 and S, A >= 1");
  return {dtype == 1,
          N,
          G,
          S,
          A,
          at<const void>(transition),
          at<const Index>(crow),
          at<const Index>(col),
          nnz,
          at<const void>(reward),
          at<const double>(log_reference),
          at<const double>(discount),
          at<const double>(temperature)};
}

bool solve_fits(Index N, Index G, Index S, Index A) {
  return birl::device::worthwhile(batch_of(0, N, G, S, A, 0, 0, 0, 0, 0, 0, 0, 0));
}

// Of P_π or its transpose; zeros where P is dense, or one block solves the problem.
birl::WidePattern pattern_of(Pointer crow, Pointer col, Pointer slot, Index count) {
  return {at<const Index>(crow), at<const std::int32_t>(col), at<const Index>(slot), count};
}

std::size_t solve_workspace(int dtype, Index N, Index G, Index S, Index A, Pointer crow, Index nnz,
                            bool large, int device) {
  const Batch batch = batch_of(dtype, N, G, S, A, 0, crow, 0, nnz, 0, 0, 0, 0);
  const DeviceGuard guard(device);
  std::size_t bytes = 0;
  check(large ? birl::large_solve_workspace(batch, pattern_of(0, 0, 0, nnz), bytes)
              : birl::solve_workspace(batch, bytes),
        "solve_workspace");
  return bytes;
}

int solve(int dtype, Index N, Index G, Index S, Index A, Pointer transition, Pointer crow,
          Pointer col, Index nnz, Pointer reward, Pointer log_reference, Pointer discount,
          Pointer temperature, Pointer initial, Pointer value_out, Pointer relative_out,
          Pointer q_out, Pointer advantage_out, Pointer policy_out, Pointer log_policy_out,
          Pointer info_out, Pointer status_out, Index method, double tol, Index max_iterations,
          Index validate, bool large, Pointer pattern_crow, Pointer pattern_col,
          Pointer pattern_slot, Pointer workspace, Pointer stream, int device) {
  const Batch batch = batch_of(dtype, N, G, S, A, transition, crow, col, nnz, reward, log_reference,
                               discount, temperature);
  const birl::Solve request{at<const double>(initial),
                            at<double>(value_out),
                            at<double>(relative_out),
                            at<void>(q_out),
                            at<void>(advantage_out),
                            at<void>(policy_out),
                            at<void>(log_policy_out),
                            at<double>(info_out),
                            at<Index>(status_out),
                            method,
                            tol,
                            max_iterations,
                            static_cast<birl::Rigour>(validate)};
  const birl::WidePattern pattern = pattern_of(pattern_crow, pattern_col, pattern_slot, nnz);
  py::gil_scoped_release release;
  const DeviceGuard guard(device);
  check(large ? birl::launch_large_solve(batch, request, pattern, at<void>(workspace),
                                         at<CUstream_st>(stream))
              : birl::launch_solve(batch, request, at<void>(workspace), at<CUstream_st>(stream)),
        "solve");
  return 0;
}

std::size_t policy_solve_workspace(int dtype, Index N, Index G, Index K, Index S, Index A,
                                   Pointer crow, Index nnz, bool large, int device) {
  const Batch batch = batch_of(dtype, N, G, S, A, 0, crow, 0, nnz, 0, 0, 0, 0);
  const DeviceGuard guard(device);
  std::size_t bytes = 0;
  check(large ? birl::large_policy_solve_workspace(batch, pattern_of(0, 0, 0, nnz), K, bytes)
              : birl::policy_solve_workspace(batch, K, bytes),
        "policy_solve_workspace");
  return bytes;
}

int policy_solve(int dtype, Index N, Index G, Index K, Index S, Index A, Pointer transition,
                 Pointer crow, Pointer col, Index nnz, Pointer policy, Pointer discount,
                 Pointer rhs, Pointer out, Pointer residual_out, bool transpose, double tol,
                 bool large, Pointer pattern_crow, Pointer pattern_col, Pointer pattern_slot,
                 Pointer workspace, Pointer stream, int device) {
  const Batch batch = batch_of(dtype, N, G, S, A, transition, crow, col, nnz, 0, 0, discount, 0);
  const birl::PolicySolve request{K,
                                  at<const double>(policy),
                                  at<const double>(rhs),
                                  at<double>(out),
                                  at<double>(residual_out),
                                  transpose,
                                  tol};
  const birl::WidePattern pattern = pattern_of(pattern_crow, pattern_col, pattern_slot, nnz);
  py::gil_scoped_release release;
  const DeviceGuard guard(device);
  check(large ? birl::launch_large_policy_solve(batch, request, pattern, at<void>(workspace),
                                                at<CUstream_st>(stream))
              : birl::launch_policy_solve(batch, request, at<void>(workspace),
                                          at<CUstream_st>(stream)),
        "policy_solve");
  return 0;
}

int outer(int dtype, Index N, Index G, Index S, Index A, Pointer crow, Pointer col, Index nnz,
          Pointer weight, Pointer vector, Pointer shift, Pointer out, Pointer stream, int device) {
  const Batch batch = batch_of(dtype, N, G, S, A, 0, crow, col, nnz, 0, 0, 0, 0);
  const birl::Outer request{at<const double>(weight), at<const double>(vector),
                            at<const double>(shift), at<void>(out)};
  py::gil_scoped_release release;
  const DeviceGuard guard(device);
  check(birl::launch_outer(batch, request, at<CUstream_st>(stream)), "outer");
  return 0;
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
