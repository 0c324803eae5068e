// Python's view of the CUDA kernels: device pointers and a stream handle as integers. Importing it
// needs no driver. Nothing here has run on a GPU yet; see bellman.cu.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bellman_cuda.h"

namespace py = pybind11;
using birl::Index;

namespace {

using Pointer = std::uintptr_t;

template <class T>
T* at(Pointer p) {
  return reinterpret_cast<T*>(p);
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

py::dict build_info() {
  py::dict info;
  info["version"] = BIRL_VERSION;
  info["toolkit"] =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["architectures"] = BIRL_CUDA_ARCHITECTURES;
  return info;
}

int sweep(int dtype, Index N, Index G, Index S, Index A, Pointer transition, Pointer crow,
          Pointer col, Index nnz, Pointer reward, Pointer log_reference, Pointer discount,
          Pointer temperature, Pointer value, Pointer value_out, Pointer advantage_out,
          Pointer policy_out, Pointer log_policy_out, Pointer stream, int device) {
  if (dtype != 0 && dtype != 1) throw py::value_error("dtype: expected 0 (float32) or 1 (float64)");
  if (N < 0 || G < 0 || S < 1 || A < 1 || nnz < 0)
    throw py::value_error("sizes: expected N, G, nnz >= 0 and S, A >= 1");
  const birl::DeviceSweep request{dtype == 1,
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
                                  at<const double>(temperature),
                                  at<const double>(value),
                                  at<double>(value_out),
                                  at<double>(advantage_out),
                                  at<double>(policy_out),
                                  at<double>(log_policy_out)};
  py::gil_scoped_release release;
  check(cudaSetDevice(device), "cudaSetDevice");
  check(birl::launch_sweep(request, at<CUstream_st>(stream)), "sweep");
  return 0;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of birl_ext; see csrc/ and birl_ext/_native.py.";
  module.def("build_info", &build_info);
  module.def("sweep", &sweep);
}
