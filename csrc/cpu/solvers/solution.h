// What a solve writes out: the tables of each problem, and its row of `info`.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/certificate.h"
#include "core/soft_maximum.h"
#include "cpu/model/batch.h"
#include "cpu/model/validate.h"
#include "cpu/support/parallel.h"

namespace birl {

// Where one problem's results go: the tables in the type of P and r.
template <class Real>
struct Tables {
  double *value, *relative;                   // (S): value = offset + relative, or null
  Real *q, *advantage, *policy, *log_policy;  // (S,A)
};

template <class Real>
Tables<Real> tables_at(const Solve& request, Index i, Index S, Index A) {
  const auto at = [&](void* table) { return static_cast<Real*>(table) + i * S * A; };
  return {request.value + i * S, request.relative ? request.relative + i * S : nullptr,
          at(request.q),         at(request.advantage),
          at(request.policy),    at(request.log_policy)};
}

// The tables from q', the soft maximum of it, and the policy; V = image + offset.
template <class Real>
void hand_out(const Problem<Real>& problem, Index S, Index A, const double* q, const double* image,
              const double* policy, const double* log_policy, double offset,
              const Tables<Real>& out) {
  for (Index s = 0; s < S; ++s) {
    const double value = image[s] + offset;
    out.value[s] = value;
    if (out.relative) out.relative[s] = image[s];
    for (Index row = s * A; row < (s + 1) * A; ++row) {
      const double advantage = masked(problem.log_reference, row) ? 0.0 : q[row] - image[s];
      out.advantage[row] = static_cast<Real>(advantage);
      out.q[row] = static_cast<Real>(advantage + value);
      out.policy[row] = static_cast<Real>(policy[row]);
      out.log_policy[row] = static_cast<Real>(log_policy[row]);
    }
  }
}

// Whether a number is too large for the type in which it is handed out.
template <class Real>
bool overflows(const Certificate& last, const Problem<Real>& problem, const Tables<Real>& out,
               Index rows) {
  constexpr double kMost = std::numeric_limits<Real>::max();
  if (last.overflows()) return true;
  if (2.0 * (last.largest_size() + last.scale() + last.largest_reward) <= kMost)
    return false;  // no entry of a table is as large
  for (Index row = 0; row < rows; ++row)
    if (!masked(problem.log_reference, row) &&
        !(std::isfinite(out.q[row]) && std::isfinite(out.advantage[row])))
      return true;
  return false;
}

inline void report(const Solve& request, Index i, const Outcome& outcome, double temperature,
                   Kernel kernel, Index S, const Defect& defect = {}) {
  request.status[i] = static_cast<Index>(outcome.status);
  double* const info = request.info + (kInfo + S) * i;
  write_info(outcome, defect, temperature, kernel, info);
  if (outcome.bounds)
    std::copy(outcome.bounds, outcome.bounds + S, info + kInfo);
  else
    std::fill_n(info + kInfo, S, outcome.error_bound);
}

// An invalid input: its place and value, and NaN for everything else.
template <class Real>
void report(const Solve& request, Index i, const Defect& defect, double temperature, Kernel kernel,
            Index S, Index A) {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  const Tables<Real> out = tables_at<Real>(request, i, S, A);
  std::fill_n(out.value, S, nan);
  if (out.relative) std::fill_n(out.relative, S, nan);
  for (Real* table : {out.q, out.advantage, out.policy, out.log_policy})
    std::fill_n(table, S * A, static_cast<Real>(nan));
  report(request, i, {defect.status, nan, nan, 0, 0, nan}, temperature, kernel, S, defect);
}

}  // namespace birl
