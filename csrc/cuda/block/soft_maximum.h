// τ log Σ_a μ exp(q/τ) over the actions of one state, its exponents shifted so that the largest is
// zero; the same arithmetic as the CPU's soft_maximum (cpu/isa/dense.cpp).
#pragma once

#include "cuda/layer/log_reference.h"

namespace birl::device {

struct SoftMaximum {
  const double* q;  // (S, A)
  LogReference reference;
  int actions;
  double temperature;

  // log μ + (q − max q)/τ, less its maximum over the state; −inf where masked.
  BIRL_DEVICE double exponent(int row) const {
    const int first = row / actions * actions;
    const double best = largest_q(first), inverse = inverse_temperature(temperature);
    const double x = scaled(row, best, inverse);
    return reference.values ? x - peak(first, best, inverse) : x;
  }

  // tw(s), given Σ_a exp(exponent).
  BIRL_DEVICE double value(int s, double total) const {
    const int first = s * actions;
    double best = largest_q(first);
    if (reference.values) best += temperature * peak(first, best, inverse_temperature(temperature));
    return best + temperature * log_from_one(total);
  }

 private:
  BIRL_DEVICE double largest_q(int first) const {
    double best = nothing<double>();
    for (int row = first; row < first + actions; ++row)
      best = higher(best, available(q[row], reference[row]));
    return best;
  }

  BIRL_DEVICE double scaled(int row, double best, double inverse) const {
    return log_weight(q[row], best, inverse, reference[row]);
  }

  BIRL_DEVICE double peak(int first, double best, double inverse) const {
    double highest = nothing<double>();
    for (int row = first; row < first + actions; ++row) {
      const double x = scaled(row, best, inverse);
      highest = x > highest ? x : highest;
    }
    return highest;
  }
};

}  // namespace birl::device
