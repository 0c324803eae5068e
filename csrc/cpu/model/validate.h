// What can be wrong with the numbers of one problem, and where.
#pragma once

#include "core/findings.h"
#include "cpu/model/batch.h"

namespace birl {

template <class Real>
Findings look_at(const Problem<Real>& problem, Index states, Index actions) {
  Findings found;
  for (Index s = 0; s < states; ++s) {
    bool any = false;
    for (Index a = 0; a < actions; ++a) {
      const Index row = s * actions + a;
      const double reference = problem.log_reference ? problem.log_reference[row] : 0.0;
      any |= found.see_action(s, a, actions, static_cast<double>(problem.reward[row]), reference);
    }
    if (!any) found.see_no_action(s);
  }
  return found;
}

// Status codes 14 to 17 and 13.
template <class Real>
Defect problem_defect(const Findings& found, const Problem<Real>& problem, Rigour rigour) {
  return found.of_problem(rigour, problem.discount, problem.temperature, problem.log_reference,
                          [&](Index row) { return static_cast<double>(problem.reward[row]); });
}

// Status codes 10 to 12, from row sums and row minima. Only a transition that fails is searched.
template <class Model>
Defect transition_defect(const Model& model, Rigour rigour, const double* sum,
                         const double* least) {
  constexpr bool kDouble = sizeof(typename Model::Real) == 8;
  const double tolerance = row_sum_tolerance(kDouble, model.states);
  const double spare = below_zero(kDouble, model.states);
  const auto stored = [&](Index k) { return static_cast<double>(model.values[k]); };
  for (Index row = 0; row < model.states * model.actions; ++row) {
    if (least[row] >= -spare && is_row_sum(sum[row], rigour, tolerance)) continue;
    Findings found;
    found.see_bad_row(row, sum[row]);
    for (Index k = 0; k < model.count(); ++k) found.see_entry(k, stored(k), spare);
    return found.of_transition(stored);
  }
  return {};
}

}  // namespace birl
