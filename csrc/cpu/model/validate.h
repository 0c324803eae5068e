// What can be wrong with the numbers of one problem, and where.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/model/batch.h"

namespace birl {

struct Defect {
  Status status = Status::kConverged;
  Index place = 0;     // flat index inside the problem; what it counts depends on the status
  double value = 0.0;  // the offending number
};

// Status codes 14 to 17 and 13. Without rigour the tables are not read; the two numbers are checked
// all the same, since no certificate means anything at others.
template <class Real>
Defect problem_defect(const Problem<Real>& problem, Rigour rigour, Index states, Index actions) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  if (!(problem.discount >= 0.0 && problem.discount < 1.0))
    return {Status::kDiscount, 0, problem.discount};
  if (!(problem.temperature > 0.0 && problem.temperature < kInf))
    return {Status::kTemperature, 0, problem.temperature};
  if (rigour == Rigour::kOff) return {};
  if (problem.log_reference)
    for (Index s = 0; s < states; ++s) {
      bool available = false;
      for (Index row = s * actions; row < (s + 1) * actions; ++row) {
        const double reference = problem.log_reference[row];
        if (!(reference < kInf)) return {Status::kReference, row, reference};
        available = available || reference > -kInf;
      }
      if (!available) return {Status::kNoAction, s, 0.0};
    }
  for (Index row = 0; row < states * actions; ++row)
    if (!std::isfinite(problem.reward[row]))
      return {Status::kNonFiniteReward, row, static_cast<double>(problem.reward[row])};
  return {};
}

// What S subtractions leave of one: how far below zero a probability may lie.
template <class Real>
double below_zero(Index states) {
  return static_cast<double>(states) * std::numeric_limits<Real>::epsilon();
}

// Rounding of single precision data, and of their sum, is no mistake.
template <class Real>
double row_sum_tolerance(Index states) {
  return (sizeof(Real) == 4 ? 1e-5 : 1e-8) + below_zero<Real>(states);
}

// Status codes 10 to 12, from row sums and row minima. Only a transition that fails is searched.
template <class Model>
Defect transition_defect(const Model& model, Rigour rigour, const double* sum,
                         const double* least) {
  const double tolerance = row_sum_tolerance<typename Model::Real>(model.states);
  const double lowest = -below_zero<typename Model::Real>(model.states);
  for (Index row = 0; row < model.states * model.actions; ++row) {
    if (std::isfinite(sum[row]) && least[row] >= lowest &&
        ((sum[row] == 0.0 && rigour == Rigour::kOrEnding) || std::abs(sum[row] - 1.0) <= tolerance))
      continue;
    for (Index k = 0; k < model.count(); ++k)
      if (!std::isfinite(model.values[k]))
        return {Status::kNonFiniteProbability, k, static_cast<double>(model.values[k])};
    for (Index k = 0; k < model.count(); ++k)
      if (model.values[k] < lowest)
        return {Status::kNegativeProbability, k, static_cast<double>(model.values[k])};
    return {Status::kRowSum, row, sum[row]};
  }
  return {};
}

}  // namespace birl
