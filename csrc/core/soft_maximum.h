// What τ log Σ_a μ exp(q/τ) is made of, for a number or for a vector of numbers: 1/τ, which actions
// count, and how much. Who walks over the actions shifts the logarithms so that the largest is
// zero.
#pragma once

#include "core/scalar_math.h"

namespace birl {

// −∞: log μ of a masked action.
template <class Number>
BIRL_HD Number nothing() {
  return Number{} - __builtin_huge_valf();
}
template <class Number>
BIRL_HD auto masked(Number log_mu) {
  return log_mu == nothing<Number>();
}
// Without a table of log μ, none is.
BIRL_HD bool masked(const double* log_reference, Index row) {
  return log_reference && masked(log_reference[row]);
}

// x of an action that is not masked.
template <class Number>
BIRL_HD Number available(Number x, Number log_mu) {
  return masked(log_mu) ? nothing<Number>() : x;
}

// Whether 1/τ is a number: that of a subnormal τ is not.
BIRL_HD bool has_inverse(double temperature) { return is_finite(1.0 / temperature); }

// 1/τ, or the largest number, which does not turn 0·(1/τ) into NaN.
template <class Number>
BIRL_HD Number inverse_temperature(Number temperature) {
  constexpr Number kLargest =
      static_cast<Number>(Format<Number>::kSingle ? 3.4028234663852886e38 : 1.7976931348623157e308);
  const Number inverse = 1 / temperature;
  return inverse > kLargest ? kLargest : inverse;
}

// log μ + (q − best)/τ
template <class Number>
BIRL_HD Number log_weight(Number q, Number best, Number inverse, Number log_mu) {
  return available((q - best) * inverse + log_mu, log_mu);
}

// NaN wins.
BIRL_HD double higher(double x, double y) { return y > x || y != y ? y : x; }

}  // namespace birl
