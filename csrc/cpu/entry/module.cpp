// Python's view of the CPU: requests by name in, status out, the GIL released.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <tuple>

#include "core/named.h"
#include "cpu/entry/policy_solve.h"
#include "cpu/entry/solve.h"
#include "cpu/entry/solve_vjp.h"
#include "cpu/isa/isa.h"

namespace py = pybind11;
using birl::Batch;
using birl::Index;

namespace {

// A product of sizes; OverflowError if that many numbers have no address.
Index product(std::initializer_list<Index> sizes) {
  constexpr Index kMost = std::numeric_limits<Index>::max() / static_cast<Index>(sizeof(double));
  Index total = 1;
  for (const Index size : sizes)
    if (__builtin_mul_overflow(total, size, &total) || total > kMost)
      throw std::overflow_error("sizes: a table of so many numbers has no 64-bit address");
  return total;
}

Batch checked_batch(const py::dict& given, std::initializer_list<std::string_view> without = {}) {
  const Batch batch = birl::batch_from(given, without);
  const auto [N, G, S, A] =
      std::tuple(batch.transitions, batch.problems, batch.states, batch.actions);
  product({S, A, std::max<Index>(N, 1), std::max<Index>(G, 1), birl::kInfo});
  product({N, batch.sparse() ? batch.nnz : product({S, A, S})});
  if (batch.sparse()) {
    if (const char* defect = birl::csr_defect(batch.crow, batch.col, batch.nnz, S * A, S))
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

Index solve(const py::dict& problem, const py::dict& how) {
  const Batch batch = checked_batch(problem);
  const birl::Solve request = birl::solve_from(how);
  run([&](birl::Interrupt& interrupt) { birl::solve(batch, request, interrupt); });
  return std::count_if(request.status, request.status + batch.total(),
                       [](Index status) { return status != 0; });
}

py::tuple solve_vjp(const py::dict& problem, const py::dict& how) {
  const Batch batch = checked_batch(problem, {"reward"});
  const auto request = birl::filled<birl::SolveVjp>(how);
  birl::Conditioning worst;
  run([&](birl::Interrupt& interrupt) { worst = birl::solve_vjp(batch, request, interrupt); });
  return py::make_tuple(worst.condition, worst.problem);
}

Index policy_solve(const py::dict& problem, const py::dict& how) {
  const Batch batch = checked_batch(problem, {"reward", "temperature"});
  const birl::PolicySolve request = birl::policy_solve_from(how);
  if (batch.total() > 0)
    product({batch.transitions, batch.problems, request.right_sides, batch.states});
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
