// What is known of a linear system with A = I − γP_π or its transpose beforehand, and asked of its
// solution, for every solver of every device.
#pragma once

#include "core/scalar_math.h"

namespace birl {

// Of the row of one state of A, from π(·|s) and 1/σ(s,·).
struct RowMass {
  double mass = 0.0, stopping = 0.0;

  BIRL_CORE void add(double policy, double inverse_sum) {
    mass += policy;
    if (inverse_sum == 0.0) stopping += policy;
  }
  // A softmax sums to one up to rounding; 1 − γ must not inherit that rounding error.
  BIRL_CORE bool normalised(Index actions) const {
    return magnitude(mass - 1.0) <= 4.0 * kEps * static_cast<double>(actions);
  }
  // Whether all that leaves the state arrives somewhere: constants are an eigenvector if it does
  // everywhere.
  BIRL_CORE bool closed(Index actions) const { return normalised(actions) && stopping == 0.0; }
  // Its sum, at least 1 − γ.
  BIRL_CORE double defect(double discount, Index actions) const {
    return (1.0 - discount) + discount * (normalised(actions) ? stopping : 1.0 - (mass - stopping));
  }
};

// Of the residual of a system with ‖b‖ = size and ‖x‖ = length.
struct Tolerance {
  double asked, floor;

  BIRL_CORE Tolerance(double tol, double size, double length)
      // Rounding of one product and one subtraction; the last bits are not worth a round.
      : asked(tol * size), floor(2.0 * kEps * (size + 2.0 * length)) {}

  BIRL_CORE bool met(double residual) const { return residual <= larger(asked, floor); }
  // What a round of corrections should leave.
  BIRL_CORE double target() const { return larger(0.5 * asked, 0.25 * floor); }
  // Whether a residual that falls no further is that of a solution.
  BIRL_CORE bool solved(double residual, double row_additions, Index actions) const {
    const double units = 16.0 + row_additions + 0.25 * static_cast<double>(actions);
    return residual <= larger(asked, 0.5 * units * floor);
  }
};

}  // namespace birl
