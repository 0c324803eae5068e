// What a solver hands back of one problem.
#pragma once

#include "certificate.h"
#include "solve.h"
#include "validate.h"

namespace birl {

struct Outcome {
  Status status;
  double residual, error_bound;
  Index passes, products;
  double offset = 0.0;
};

// Where one problem's results go: the tables in the type of P and r.
template <class Real>
struct Tables {
  double *value, *relative;                   // (S): value = offset + relative
  Real *q, *advantage, *policy, *log_policy;  // (S,A)
};

template <class Real>
Tables<Real> tables_at(const Solve& request, Index i, Index S, Index A) {
  const auto at = [&](void* table) { return static_cast<Real*>(table) + i * S * A; };
  return {request.value + i * S, request.relative + i * S, at(request.q),
          at(request.advantage), at(request.policy),       at(request.log_policy)};
}

// Whether a number is too large for the type in which it is handed out.
template <class Real>
bool overflows(const Certificate& last, const Problem<Real>& problem, const Tables<Real>& out,
               Index rows) {
  constexpr double kMost = std::numeric_limits<Real>::max();
  const double value = std::max(std::abs(last.lowest), std::abs(last.highest));
  if (!(value <= kMost)) return true;
  if (2.0 * (value + last.scale()) <= kMost) return false;  // no entry of a table is as large
  for (Index row = 0; row < rows; ++row)
    if (!(problem.log_reference && problem.log_reference[row] == -kInf) &&
        !(std::isfinite(out.q[row]) && std::isfinite(out.advantage[row])))
      return true;
  return false;
}

inline void report(const Solve& request, Index i, const Outcome& outcome, double temperature,
                   Kernel kernel) {
  request.status[i] = static_cast<Index>(outcome.status);
  const double row[kInfo] = {outcome.residual,
                             outcome.error_bound,
                             static_cast<double>(outcome.passes),
                             0.0,
                             0.0,
                             static_cast<double>(outcome.products),
                             temperature,
                             outcome.offset,
                             static_cast<double>(kernel)};
  std::copy(row, row + kInfo, request.info + kInfo * i);
}

// An invalid input: its place and value, and NaN for everything else.
template <class Real>
void report(const Solve& request, Index i, const Defect& defect, double temperature, Kernel kernel,
            Index S, Index A) {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  const Tables<Real> out = tables_at<Real>(request, i, S, A);
  std::fill_n(out.value, S, nan);
  std::fill_n(out.relative, S, nan);
  for (Real* table : {out.q, out.advantage, out.policy, out.log_policy})
    std::fill_n(table, S * A, static_cast<Real>(nan));
  report(request, i, {defect.status, nan, nan, 0, 0, nan}, temperature, kernel);
  request.info[kInfo * i + 3] = static_cast<double>(defect.place);
  request.info[kInfo * i + 4] = defect.value;
}

}  // namespace birl
