// The decisions of one fixed-point iteration on a large problem: certificate and stopping as in
// solve_control.h, the choice of method as in the CPU's solver for large problems. Scalars only;
// every block of the team keeps a copy and takes the same decisions.
#pragma once

#include "device/solve_control.h"
#include "device/wide_layer.h"

namespace birl::device {

// What improves V between two passes over P.
enum class Way : int { kSweeps, kKrylov, kModified };
enum class LargeStep : int { kStop, kAcceptSweep, kKrylov, kModified };

struct LargeControl : SolveControl {
  Way way;
  Index products;  // of inner solvers
  Index escalated_at, stalled, without_gain;
  double forcing, krylov_best, window_half;
  bool krylov_failed;

  BIRL_DEVICE void start(Way first) {
    SolveControl::begin(true);
    const Way given[] = {first, Way::kSweeps, Way::kKrylov, Way::kKrylov, Way::kModified};
    way = given[options.method];
    products = escalated_at = stalled = without_gain = 0;
    forcing = 0.3;
    krylov_best = window_half = kInf;
    krylov_failed = false;
    low = high = c = 0.0;
  }

  BIRL_DEVICE bool forms_matrix() const { return way != Way::kSweeps; }

  // After a pass over P.
  BIRL_STAGE LargeStep next(const SweepRange& found) {
    range = found;
    ++passes;
    const double half = half_span(), floor = rounding();
    if (!range.finite || !is_finite(c)) return end(Status::kNonFinite);
    if (options.tol > 0.0 && error_bound() <= options.tol * largest_value())
      return end(Status::kConverged);
    since_best = half < 0.9 * best ? 0 : since_best + 1;
    if (since_best == 0) best = half;
    if (half <= kEps * scale() || (half <= floor && since_best >= patience()) ||
        (half <= 8.0 * floor && since_best >= 10 * patience()))
      return end(options.tol > 0.0 ? Status::kStagnated : Status::kConverged);
    if (out_of_passes()) return end(Status::kMaxIterations);
    const bool formed = forms_matrix();
    give_up_if_slow(half);
    previous = half;
    if (way == Way::kSweeps || !formed) return LargeStep::kAcceptSweep;
    return way == Way::kKrylov ? LargeStep::kKrylov : LargeStep::kModified;
  }

  // Reduction of the residual asked of the next linear solve: Eisenstat & Walker (1996), choice 2,
  // capped at 0.3. Exact steps rise monotonically in V but not in the residual, so growth is no
  // reason to reject; if the certificate stalls for three passes the steps are made more exact.
  BIRL_DEVICE double reduction() {
    const double half = half_span();
    if (half < 0.7 * krylov_best) {
      const double ratio = half / krylov_best;
      krylov_best = half;
      stalled = without_gain = 0;
      forcing = smaller(0.3, larger(0.9 * ratio * ratio, 1e-10));
    } else if (++without_gain >= 3) {
      without_gain = 0;
      ++stalled;
      forcing = larger(0.1 * forcing, 1e-12);
    }
    return larger(forcing, smaller(0.1, 0.1 * target() / half));
  }

  // What the linear solver reached, relative to where it started.
  BIRL_DEVICE void krylov_reached(double relative, Index used) {
    products += used;
    if (!(relative <= 0.5)) stalled = 4;  // Krylov is of no use here
  }

  // Half-span at which iteration ends, as far as it can be told now.
  BIRL_DEVICE double target() const {
    return larger(options.tol * largest_value() * (1.0 - discount) / larger(discount, 0.1),
                  kEps * scale());
  }

 private:
  BIRL_DEVICE LargeStep end(Status reason) {
    status = reason;
    return LargeStep::kStop;
  }

  // Sweeps within which the half-span falls by a tenth if it still falls: γ^n <= 0.9.
  BIRL_DEVICE Index patience() const {
    const double slowest = 0.11 / (1.0 - discount);
    if (way == Way::kSweeps) return 2 + static_cast<Index>(slowest);
    return 2 + (way == Way::kModified ? static_cast<Index>(slowest / 20.0) : 0);
  }

  BIRL_DEVICE bool out_of_passes() const {
    if (options.max_iterations > 0) return passes >= options.max_iterations;
    const double contraction = smaller(1e9, 60.0 / (1.0 - discount)) + 1000.0;
    return way != Way::kKrylov && static_cast<double>(passes - escalated_at) >= contraction;
  }

  // Far more passes than a method should need: hand over to the other.
  BIRL_DEVICE void give_up_if_slow(double half) {
    const Index used = passes - escalated_at;
    Way following = way;
    if (way == Way::kModified && options.method == 0 && !krylov_failed && mixes_slowly(used, half))
      following = Way::kKrylov;
    else if (way == Way::kKrylov && (used >= 200 || (used >= 4 && stalled >= 4))) {
      krylov_failed = true;
      following = Way::kModified;
    }
    if (following == way) return;
    way = following;
    escalated_at = passes;
    stalled = 0;
    window_half = kInf;
  }

  // Whether modified policy iteration, at the pace of its last passes, would need more than a
  // Krylov method is likely to.
  BIRL_DEVICE bool mixes_slowly(Index used, double half) {
    // News crosses a large grid at 20 to 60 states a pass, and nothing contracts before it has.
    constexpr Index kWindow = 32;
    if (used % kWindow != 0) return false;
    const double before = window_half;
    window_half = half;
    if (used < 2 * kWindow || half <= target()) return false;
    constexpr double kPatience = 150.0;  // passes of up to 60 products
    return !(half < before) || log_positive(half / target()) * static_cast<double>(kWindow) >=
                                   kPatience * log_positive(before / half);
  }
};

}  // namespace birl::device
