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

// A thread takes every `stride`-th state and row from its `first`. Count: what counts states, which
// costs a block's threads fewer registers as an int.
template <class Count>
struct Results {
  const Solve& request;
  Kernel name;
  bool is_double;  // that of the batch, a constant where the kernel knows it
  Index item;
  Count states, actions;
  double temperature;

  BIRL_DEVICE void state(Count s, double relative, double offset) const {
    request.value[item * states + s] = relative + offset;
    request.relative[item * states + s] = relative;
  }

  // q and the state's value are both relative.
  BIRL_DEVICE void row(Count row, double q, bool masked, double relative, double offset,
                       double policy, double log_policy) const {
    const double advantage = masked ? 0.0 : q - relative;
    put(begin() + row, advantage + (relative + offset), advantage, policy, log_policy);
  }

  BIRL_DEVICE void finish(Count first, Count stride, const Control& control) const {
    Outcome outcome = control.outcome();
    if (control.overflows()) outcome.status = Status::kNonFinite;
    report(first, stride, outcome, {});
  }

  // NaN everywhere.
  BIRL_DEVICE void refuse(Count first, Count stride, const Defect& defect) const {
    const double nan = kInf - kInf;
    const Index end = begin() + static_cast<Index>(states) * actions;
    for (Count s = first; s < states; s += stride) state(s, nan, nan);
    for (Index at = begin() + first; at < end; at += stride) put(at, nan, nan, nan, nan);
    report(first, stride, {defect.status, nan, nan, 0, 0, nan}, defect);
  }

 private:
  BIRL_DEVICE Index begin() const { return item * states * actions; }

  BIRL_DEVICE void put(Index at, double q, double advantage, double policy,
                       double log_policy) const {
    store(request.q, is_double, at, q);
    store(request.advantage, is_double, at, advantage);
    store(request.policy, is_double, at, policy);
    store(request.log_policy, is_double, at, log_policy);
  }

  // The bounds of the states are all the same.
  BIRL_DEVICE void report(Count first, Count stride, const Outcome& outcome,
                          const Defect& defect) const {
    double* const info = request.info + item * (kInfo + states);
    for (Count s = first; s < states; s += stride) info[kInfo + s] = outcome.error_bound;
    if (first != 0) return;
    request.status[item] = static_cast<Index>(outcome.status);
    write_info(outcome, defect, temperature, name, info);
  }
};

}  // namespace birl::device
