// cuda/block/soft_maximum.h for a group of lanes: τ log Σ_a μ exp(q/τ) over the actions of one
// state.
#pragma once

#include "cuda/layer/log_reference.h"
#include "cuda/layer/warp.h"

namespace birl::device {

struct GroupSoftMaximum {
  const double* q;         // (A) of the state
  LogReference reference;  // (A)
  Index actions;
  double inverse;  // 1/τ
  double best = 0.0, peak = 0.0, total = 0.0;

  // log μ + (q − max q)/τ, less its maximum over the state; −inf where masked.
  BIRL_DEVICE double exponent(Index a) const { return scaled(a) - peak; }

  // tw(s), once measured.
  BIRL_DEVICE double value(double temperature) const {
    return best + temperature * peak + temperature * log_from_one(total);
  }

  template <class Group>
  BIRL_DEVICE void measure(const Group& g) {
    const auto over = [&](auto&& of) {
      return g.template join<double>(
          [&](int lane) {
            double largest = nothing<double>();
            for (Index a = lane; a < actions; a += Group::kLanes) largest = higher(largest, of(a));
            return largest;
          },
          [](double x, double y) { return higher(x, y); });
    };
    peak = 0.0;
    best = over([&](Index a) { return reference.values ? available(q[a], reference[a]) : q[a]; });
    if (reference.values) peak = over([&](Index a) { return scaled(a); });
    double sum[1];
    g.sums(sum, [&](int lane, double (&part)[1]) {
      for (Index a = lane; a < actions; a += Group::kLanes) part[0] += exp_nonpositive(exponent(a));
    });
    total = sum[0];
  }

 private:
  BIRL_DEVICE double scaled(Index a) const {
    return reference.values ? log_weight(q[a], best, inverse, reference[a])
                            : (q[a] - best) * inverse;
  }
};

}  // namespace birl::device
