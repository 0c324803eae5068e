// What a solve hands out of one problem, stated once for a block and for the grid.
#pragma once

#include "core/control.h"
#include "core/findings.h"
#include "cuda/layer/layer.h"

namespace birl::device {

// Numbers in the storage type of P and r, read and written as double.
struct Stored {
  const void* first;
  bool is_double;

  BIRL_DEVICE double operator[](Index i) const {
    return is_double ? static_cast<const double*>(first)[i]
                     : static_cast<double>(static_cast<const float*>(first)[i]);
  }
};
BIRL_DEVICE void store(void* first, bool is_double, Index i, double x) {
  if (is_double)
    static_cast<double*>(first)[i] = x;
  else
    static_cast<float*>(first)[i] = static_cast<float>(x);
}

// A thread takes every `stride`-th state and row from its `first`.
struct Results {
  const Solve& request;
  Kernel name;
  bool is_double;  // that of the batch, a constant where the kernel knows it
  Index item, states, actions;
  double temperature;

  BIRL_DEVICE void state(Index s, double relative, double offset) const {
    request.value[item * states + s] = relative + offset;
    request.relative[item * states + s] = relative;
  }

  // q and the state's value are both relative.
  BIRL_DEVICE void row(Index row, double q, bool masked, double relative, double offset,
                       double policy, double log_policy) const {
    const double advantage = masked ? 0.0 : q - relative;
    put(request.advantage, row, advantage);
    put(request.q, row, advantage + (relative + offset));
    put(request.policy, row, policy);
    put(request.log_policy, row, log_policy);
  }

  BIRL_DEVICE void finish(Index first, Index stride, const Control& control) const {
    Outcome outcome = control.outcome();
    if (control.overflows()) outcome.status = Status::kNonFinite;
    report(first, stride, outcome, {});
  }

  // NaN everywhere.
  BIRL_DEVICE void refuse(Index first, Index stride, const Defect& defect) const {
    const double nan = kInf - kInf;
    for (Index s = first; s < states; s += stride) state(s, nan, nan);
    for (Index r = first; r < states * actions; r += stride) row(r, nan, false, nan, nan, nan, nan);
    report(first, stride, {defect.status, nan, nan, 0, 0, nan}, defect);
  }

 private:
  BIRL_DEVICE void put(void* table, Index row, double x) const {
    store(table, is_double, item * states * actions + row, x);
  }

  // The bounds of the states are all the same.
  BIRL_DEVICE void report(Index first, Index stride, const Outcome& outcome,
                          const Defect& defect) const {
    double* const info = request.info + item * (kInfo + states);
    for (Index s = first; s < states; s += stride) info[kInfo + s] = outcome.error_bound;
    if (first != 0) return;
    request.status[item] = static_cast<Index>(outcome.status);
    write_info(outcome, defect, temperature, name, info);
  }
};

}  // namespace birl::device
