// The decisions of one fixed-point iteration on a large problem: certificate and stopping as in
// cuda/block/control.h. Scalars only; every block of the team keeps a copy and takes the same
// decisions.
#pragma once

#include "cuda/block/control.h"
#include "cuda/layer/wide_layer.h"

namespace birl::device {

enum class LargeStep : int { kStop, kAcceptSweep, kNewton };

struct LargeControl : SolveControl {
  double start_low, start_high;  // of the value that the first pass is made at
  Index products, most;          // of inner solves, and of the next one
  double sought;                 // half-span at which the inner solve may stop
  double newton_best;            // smallest half-span that a Newton step has started from
  double forcing;
  Index without_gain;

  BIRL_DEVICE void start() {
    SolveControl::begin(true);
    products = without_gain = 0;
    most = 60;
    forcing = 0.3;
    newton_best = kInf;
    low = high = c = 0.0;
  }

  // Whether steps are Newton's, with products of P_π for its linear system.
  BIRL_DEVICE bool forms_matrix() const { return options.method != 1 && options.method != kSweep; }

  // After a pass over P.
  BIRL_DEVICE LargeStep next(const SweepRange& found) {
    take(found);
    ++passes;
    const double half = half_span(), floor = rounding();
    if (!range.finite || !is_finite(c)) return end(Status::kNonFinite);
    if (options.tol > 0.0 && error_bound() <= options.tol * largest) return end(Status::kConverged);
    since_best = half < 0.9 * best ? 0 : since_best + 1;
    if (since_best == 0) best = half;
    if (at_end(half <= kEps * scale() || (half <= floor && since_best >= patience()) ||
               (half <= level(!forms_matrix()) * floor && since_best >= 10 * patience())))
      return end(options.tol > 0.0 ? Status::kStagnated : Status::kConverged);
    if (out_of_passes()) return end(Status::kMaxIterations);
    if (!forms_matrix()) return LargeStep::kAcceptSweep;
    sought = half * reduction(half);
    return LargeStep::kNewton;
  }

  // Whether an inner solve goes on that has made `used` products and is left with a term of this
  // size. Where they do not suffice the policy is hardly worth another pass yet, so the next solve
  // may make more.
  BIRL_DEVICE bool another_product(double size, Index used) {
    ++products;
    if (!(size > sought)) return false;
    if (used < most) return true;
    if (most < 4000) most *= 2;
    return false;
  }

 private:
  BIRL_DEVICE LargeStep end(Status reason) {
    status = reason;
    return LargeStep::kStop;
  }

  // Of the residual asked of the next linear solve: Eisenstat & Walker (1996), choice 2, capped at
  // 0.3. Exact steps rise monotonically in V but not in the residual, so growth is no reason to
  // reject; if the certificate stalls for three passes the steps are made more exact.
  BIRL_DEVICE double reduction(double half) {
    if (half < 0.7 * newton_best) {
      const double ratio = half / newton_best;
      newton_best = half;
      without_gain = 0;
      forcing = smaller(0.3, larger(0.9 * ratio * ratio, 1e-10));
    } else if (++without_gain >= 3) {
      without_gain = 0;
      forcing = larger(0.1 * forcing, 1e-12);
    }
    return larger(forcing, smaller(0.1, 0.1 * target() / half));
  }

  // Half-span at which iteration ends, as far as it can be told now.
  BIRL_DEVICE double target() const {
    return larger(options.tol * largest * (1.0 - discount) / larger(discount, 0.1), kEps * scale());
  }

  // Passes within which the half-span falls by a tenth if it still falls: γ^n <= 0.9, and a Newton
  // step has sixty products and more where it mixes slowly.
  BIRL_DEVICE Index patience() const {
    const double slowest = 0.11 / (1.0 - discount);
    return 2 + static_cast<Index>(forms_matrix() ? slowest / 60.0 : slowest);
  }

  BIRL_DEVICE bool out_of_passes() const {
    if (options.max_iterations > 0) return passes >= options.max_iterations;
    return static_cast<double>(passes) >= smaller(1e9, 60.0 / (1.0 - discount)) + 1000.0;
  }
};

}  // namespace birl::device
