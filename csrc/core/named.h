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
#include <vector>

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

// A request from a dict. The names in `without` need not be there either; no other may be.
template <class Request>
Request filled(const pybind11::dict& given, std::initializer_list<std::string_view> without = {}) {
  static const std::vector<PyObject*> names = [] {
    std::vector<PyObject*> interned;
    Request::each_field([&](const char* name, auto, bool) {
      interned.push_back(PyUnicode_InternFromString(name));
    });
    return interned;
  }();
  Request request{};
  auto next = names.begin();
  Py_ssize_t known = 0;
  Request::each_field([&](std::string_view name, auto member, bool needed) {
    if (PyObject* value = PyDict_GetItemWithError(given.ptr(), *next++)) {
      request.*member = from_python<std::decay_t<decltype(request.*member)>>(value);
      ++known;
    } else if (needed && std::find(without.begin(), without.end(), name) == without.end()) {
      throw pybind11::type_error(std::string(name) + " is missing");
    }
  });
  if (known != PyDict_Size(given.ptr()))
    for (const auto& [key, _] : given)
      if (std::none_of(names.begin(), names.end(), [&, key = key](PyObject* name) {
            return PyUnicode_Compare(key.ptr(), name) == 0;
          }))
        throw pybind11::type_error(std::string(pybind11::str(key)) + " is not asked for");
  return request;
}

// `without`: of "transition", "reward", "discount" and "temperature", what the operation does not
// look at.
inline Batch batch_from(const pybind11::dict& given,
                        std::initializer_list<std::string_view> without = {}) {
  const auto batch = filled<Batch>(given, without);
  if (batch.transitions < 0 || batch.problems < 0 || batch.states < 1 || batch.actions < 1 ||
      batch.nnz < 0)
    throw pybind11::value_error(
        "sizes: expected transitions, problems, nnz >= 0 and states, actions >= 1");
  return batch;
}

inline Solve solve_from(const pybind11::dict& given) {
  const auto request = filled<Solve>(given);
  if (request.method < Method::kAuto || request.method > Method::kSweep)
    throw pybind11::value_error("method: expected 0 to 5");
  if (request.validate < Rigour::kOff || request.validate > Rigour::kStochastic)
    throw pybind11::value_error("validate: expected 0 to 2");
  return request;
}

inline PolicySolve policy_solve_from(const pybind11::dict& given) {
  const auto request = filled<PolicySolve>(given);
  if (request.right_sides < 0) throw pybind11::value_error("sizes: expected right_sides >= 0");
  return request;
}

}  // namespace birl
