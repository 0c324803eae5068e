// log Σ exp in one reading: a commutative monoid of (maximum, sum relative to it).
#pragma once

#include "core/scalar_math.h"

namespace birl {

struct LogSumExp {
  double maximum = -__builtin_huge_val();
  double sum = 0.0;  // Σ exp(x - maximum)

  // Adds one term; x = -inf (a masked action) changes nothing.
  BIRL_HD void add(double x) {
    if (x > maximum) {
      sum = sum * exp_nonpositive(maximum - x) + 1.0;
      maximum = x;
    } else if (x == x && maximum > -__builtin_huge_val()) {
      sum += exp_nonpositive(x - maximum);
    } else if (x != x) {
      sum = x;
    }
  }

  BIRL_HD double value() const { return maximum + log_from_one(sum); }
};

}  // namespace birl
