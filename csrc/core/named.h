// Requests filled by name, for the glue of every device: Python gives a dict of addresses and
// numbers, and each fills the field of its name. The caller owns the memory and has checked device,
// type, shape and contiguity.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>
#include <type_traits>

#include "core/request.h"

namespace birl {

template <class T>
T from_python(PyObject* given) {
  T value;
  if constexpr (std::is_pointer_v<T>)
    value = static_cast<T>(PyLong_AsVoidPtr(given));
  else if constexpr (std::is_same_v<T, double>)
    value = PyFloat_AsDouble(given);
  else
    value = static_cast<T>(PyLong_AsLongLong(given));
  if (PyErr_Occurred()) throw pybind11::error_already_set();
  return value;
}

template <class Request>
struct Field {
  PyObject* name;
  void (*fill)(Request&, PyObject*);
  bool needed;
};

template <class Request, class T, T Request::* member>
void fill(Request& request, PyObject* given) {
  request.*member = from_python<T>(given);
}

// One that has to be given, and one that may be absent: then it is null, zero or its default.
#define BIRL_FIELD(Request, name, needed)                                       \
  ::birl::Field<Request> {                                                      \
    PyUnicode_InternFromString(#name),                                          \
        &::birl::fill<Request, decltype(Request::name), &Request::name>, needed \
  }
#define BIRL_NEEDED(Request, name) BIRL_FIELD(Request, name, true)
#define BIRL_OPTIONAL(Request, name) BIRL_FIELD(Request, name, false)

// A request from a dict. The names in `without` need not be there either; no other may be.
template <class Request, std::size_t count>
Request filled(const Field<Request> (&fields)[count], const pybind11::dict& given,
               std::initializer_list<std::string_view> without = {}) {
  Request request{};
  Py_ssize_t known = 0;
  for (const auto& field : fields)
    if (PyObject* value = PyDict_GetItemWithError(given.ptr(), field.name)) {
      field.fill(request, value);
      ++known;
    } else if (field.needed) {
      const std::string name = PyUnicode_AsUTF8(field.name);
      if (std::find(without.begin(), without.end(), name) == without.end())
        throw pybind11::type_error(name + " is missing");
    }
  if (known != PyDict_Size(given.ptr()))
    for (const auto& [key, _] : given)
      if (std::none_of(fields, fields + count, [&, key = key](const Field<Request>& field) {
            return PyUnicode_Compare(key.ptr(), field.name) == 0;
          }))
        throw pybind11::type_error(std::string(pybind11::str(key)) + " is not asked for");
  return request;
}

// `without`: of "transition", "reward", "discount" and "temperature", what the operation does not
// look at.
inline Batch batch_from(const pybind11::dict& given,
                        std::initializer_list<std::string_view> without = {}) {
  static const Field<Batch> kFields[] = {
      BIRL_NEEDED(Batch, is_double),       BIRL_NEEDED(Batch, transitions),
      BIRL_NEEDED(Batch, problems),        BIRL_NEEDED(Batch, states),
      BIRL_NEEDED(Batch, actions),         BIRL_NEEDED(Batch, transition),
      BIRL_OPTIONAL(Batch, crow),          BIRL_OPTIONAL(Batch, col),
      BIRL_OPTIONAL(Batch, nnz),           BIRL_NEEDED(Batch, reward),
      BIRL_OPTIONAL(Batch, log_reference), BIRL_NEEDED(Batch, discount),
      BIRL_NEEDED(Batch, temperature),
  };
  const Batch batch = filled(kFields, given, without);
  if (batch.transitions < 0 || batch.problems < 0 || batch.states < 1 || batch.actions < 1 ||
      batch.nnz < 0)
    throw pybind11::value_error(
        "sizes: expected transitions, problems, nnz >= 0 and states, actions >= 1");
  return batch;
}

inline Solve solve_from(const pybind11::dict& given) {
  static const Field<Solve> kFields[] = {
      BIRL_OPTIONAL(Solve, initial),  BIRL_NEEDED(Solve, value),
      BIRL_OPTIONAL(Solve, relative), BIRL_NEEDED(Solve, q),
      BIRL_NEEDED(Solve, advantage),  BIRL_NEEDED(Solve, policy),
      BIRL_NEEDED(Solve, log_policy), BIRL_NEEDED(Solve, info),
      BIRL_NEEDED(Solve, status),     BIRL_OPTIONAL(Solve, method),
      BIRL_OPTIONAL(Solve, tol),      BIRL_OPTIONAL(Solve, max_iterations),
      BIRL_NEEDED(Solve, validate),   BIRL_OPTIONAL(Solve, threads),
  };
  const Solve request = filled(kFields, given);
  if (request.method < 0 || request.method > kSweep)
    throw pybind11::value_error("method: expected 0 to 5");
  if (request.validate < Rigour::kOff || request.validate > Rigour::kStochastic)
    throw pybind11::value_error("validate: expected 0 to 2");
  return request;
}

inline PolicySolve policy_solve_from(const pybind11::dict& given) {
  static const Field<PolicySolve> kFields[] = {
      BIRL_NEEDED(PolicySolve, right_sides),
      BIRL_NEEDED(PolicySolve, policy),
      BIRL_NEEDED(PolicySolve, rhs),
      BIRL_NEEDED(PolicySolve, out),
      BIRL_NEEDED(PolicySolve, residual),
      BIRL_NEEDED(PolicySolve, transpose),
      BIRL_OPTIONAL(PolicySolve, tol),
      BIRL_OPTIONAL(PolicySolve, method),
      BIRL_OPTIONAL(PolicySolve, max_iterations),
      BIRL_OPTIONAL(PolicySolve, threads),
  };
  const PolicySolve request = filled(kFields, given);
  if (request.right_sides < 0) throw pybind11::value_error("sizes: expected right_sides >= 0");
  return request;
}

}  // namespace birl
