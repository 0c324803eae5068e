// Python's view of the CPU: integers in, status out, the GIL released. Pointers are
// integers from the caller, who owns the memory and has checked device, type, shape and contiguity.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <stdexcept>

#include "cpu/entry/policy_solve.h"
#include "cpu/entry/solve.h"
#include "cpu/entry/solve_vjp.h"
#include "cpu/isa/isa.h"

namespace py = pybind11;
using birl::Index;

namespace {

using Pointer = std::uintptr_t;

template <class T>
T* at(Pointer p) {
  return reinterpret_cast<T*>(p);
}

// A product of sizes; OverflowError if that many numbers have no address.
Index product(std::initializer_list<Index> sizes) {
  constexpr Index kMost = std::numeric_limits<Index>::max() / static_cast<Index>(sizeof(double));
  Index total = 1;
  for (const Index size : sizes)
    if (__builtin_mul_overflow(total, size, &total) || total > kMost)
      throw std::overflow_error("sizes: a table of so many numbers has no 64-bit address");
  return total;
}

// A number per problem: an array of the caller, or one number for all.
class PerProblem {
 public:
  PerProblem(const py::object& given, Index N, Index G) {
    if (PyFloat_Check(given.ptr()))
      own_.assign(std::max<Index>(product({N, G}), 0), given.cast<double>());
    else
      theirs_ = given.cast<Pointer>();
  }
  Pointer pointer() const {
    return own_.empty() ? theirs_ : reinterpret_cast<Pointer>(own_.data());
  }

 private:
  std::vector<double> own_;
  Pointer theirs_ = 0;
};

birl::Batch make_batch(int dtype, Index N, Index G, Index S, Index A, Pointer transition,
                       Pointer crow, Pointer col, Index nnz, Pointer reward, Pointer log_reference,
                       Pointer discount, Pointer temperature) {
  if (dtype != 0 && dtype != 1) throw py::value_error("dtype: expected 0 (float32) or 1 (float64)");
  if (N < 0 || G < 0 || S < 1 || A < 1 || nnz < 0)
    throw py::value_error("sizes: expected N, G, nnz >= 0 and S, A >= 1");
  product({S, A, std::max<Index>(N, 1), std::max<Index>(G, 1), birl::kInfo});
  product({N, crow ? nnz : product({S, A, S})});
  const birl::Batch batch{dtype == 1,
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
  if (batch.sparse()) {
    if (const char* defect = birl::csr_defect(batch.crow, batch.col, nnz, S * A, S))
      throw py::value_error(defect);
  }
  return batch;
}

bool ask_python() {
  py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

// Runs without the GIL; a signal handler's exception (KeyboardInterrupt) ends the work.
template <class Body>
void run(Body&& body) {
  try {
    py::gil_scoped_release release;
    birl::Interrupt interrupt(ask_python);
    body(interrupt);
  } catch (const birl::Interrupted&) {
    throw py::error_already_set();
  }
}

py::dict build_info() {
  py::dict info;
  info["version"] = BIRL_VERSION;
  info["sources"] = BIRL_SOURCES;
#if defined(__VERSION__)
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["instruction_sets"] = py::str(birl::compiled_instruction_sets()).attr("split")();
  info["instruction_set"] = birl::isa().name;
  return info;
}

Index solve(int dtype, Index N, Index G, Index S, Index A, Pointer transition, Pointer crow,
            Pointer col, Index nnz, Pointer reward, Pointer log_reference,
            const py::object& discount, const py::object& temperature, Pointer initial,
            Pointer value_out, Pointer relative_out, Pointer q_out, Pointer advantage_out,
            Pointer policy_out, Pointer log_policy_out, Pointer info_out, Pointer status_out,
            Index method, double tol, Index max_iterations, Index validate, int threads) {
  if (method < 0 || method > birl::kSweep) throw py::value_error("method: expected 0 to 5");
  if (validate < 0 || validate > 2) throw py::value_error("validate: expected 0 to 2");
  const PerProblem discounts(discount, N, G), temperatures(temperature, N, G);
  const birl::Batch batch = make_batch(dtype, N, G, S, A, transition, crow, col, nnz, reward,
                                       log_reference, discounts.pointer(), temperatures.pointer());
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
                            static_cast<birl::Rigour>(validate),
                            threads};
  run([&](birl::Interrupt& interrupt) { birl::solve(batch, request, interrupt); });
  return std::count_if(request.status, request.status + batch.total(),
                       [](Index status) { return status != 0; });
}

py::tuple solve_vjp(int dtype, Index N, Index G, Index S, Index A, Pointer transition, Pointer crow,
                    Pointer col, Index nnz, const py::object& discount,
                    const py::object& temperature, Pointer relative, Pointer advantage,
                    Pointer policy, Pointer info, Pointer status, Pointer value_bar, Pointer q_bar,
                    Pointer advantage_bar, Pointer policy_bar, Pointer log_policy_bar,
                    Pointer transition_bar, Pointer reward_bar, Pointer log_reference_bar,
                    Pointer discount_bar, Pointer temperature_bar, int threads) {
  const PerProblem discounts(discount, N, G), temperatures(temperature, N, G);
  const birl::Batch batch = make_batch(dtype, N, G, S, A, transition, crow, col, nnz, 0, 0,
                                       discounts.pointer(), temperatures.pointer());
  const birl::SolveVjp request{at<const double>(relative),    at<const void>(advantage),
                               at<const void>(policy),        at<const double>(info),
                               at<const Index>(status),       at<const double>(value_bar),
                               at<const void>(q_bar),         at<const void>(advantage_bar),
                               at<const void>(policy_bar),    at<const void>(log_policy_bar),
                               at<void>(transition_bar),      at<void>(reward_bar),
                               at<double>(log_reference_bar), at<double>(discount_bar),
                               at<double>(temperature_bar),   threads};
  birl::Conditioning worst;
  run([&](birl::Interrupt& interrupt) { worst = birl::solve_vjp(batch, request, interrupt); });
  return py::make_tuple(worst.condition, worst.problem);
}

Index policy_solve(int dtype, Index N, Index G, Index K, Index S, Index A, Pointer transition,
                   Pointer crow, Pointer col, Index nnz, Pointer policy, Pointer discount,
                   Pointer rhs, Pointer out, Pointer residual_out, bool transpose, Index method,
                   double tol, Index max_iterations, int threads) {
  if (method != 0 && method != 2 && method != 3 && method != 5)
    throw py::value_error("method: expected 0, 2, 3 or 5");
  if (K < 0) throw py::value_error("sizes: expected K >= 0");
  if (N > 0 && G > 0) product({N, G, K, S});
  const birl::Batch batch =
      make_batch(dtype, N, G, S, A, transition, crow, col, nnz, 0, 0, discount, 0);
  const birl::PolicySolve request{K,
                                  at<const double>(policy),
                                  at<const double>(rhs),
                                  at<double>(out),
                                  at<double>(residual_out),
                                  transpose,
                                  tol,
                                  method,
                                  max_iterations,
                                  threads};
  Index failed = 0;
  run([&](birl::Interrupt& interrupt) { failed = birl::policy_solve(batch, request, interrupt); });
  return failed;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU routines of birl_ext; see csrc/ and birl_ext/ops/backends/native.py.";
  module.def("build_info", &build_info);
  module.def("solve", &solve);
  module.def("solve_vjp", &solve_vjp);
  module.def("policy_solve", &policy_solve);
}
