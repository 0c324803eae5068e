// The decisions of one fixed-point iteration, for every walker of every device: whether it has
// ended, and what comes next. Scalars only, for one thread; the vectors and loops are the walker's,
// and so is what things cost (Means).
//
// A walker makes a sweep at V = c + W, hands what it found to `take`, asks `next`, and does that:
// stop, accept the image (accept_sweep), or improve W by (about) (I − γP_π)⁻¹δ, by the method that
// `mode` names (accept_step).
#pragma once

#include "core/certificate.h"
#include "core/request.h"

namespace birl {

// The numbers are those of the methods that begin so.
enum class Mode : Index { kValueIteration = 1, kElimination, kKrylov, kSeries };
enum class Step : int { kStop, kSweep, kImprove };

// What a walker can do besides sweeps and series, and what it costs, in any unit.
struct Means {
  bool elimination = false, krylov = false;
  double coarse_sweep = 0.0, sweep = 0.0, elimination_step = 0.0;
  // Products of a truncated series: at least, at most, and at most where those do not suffice.
  Index fewest = 20, most = 120, limit = 120;
  double pass_products = 20.0;  // expected of one where the process mixes slowly
};

// Passes after which a method that should long have ended makes way for the next one.
constexpr Index kMostPasses = 1000;

struct Control : Certificate {
  // What is asked, and what there is:
  Method method = Method::kAuto;
  Index max_iterations = 0;
  double states = 1.0;
  Means means;
  // The iteration:
  Mode mode = Mode::kValueIteration;
  Status status = Status::kMaxIterations;
  Index passes = 0, products = 0, switched_at = 0;
  bool at_zero = true;   // the sweep is T0, which needs no P and is a better start than zero
  bool gave_up = false;  // on a method, for one that converges globally
  double best = kInf;    // smallest half-span so far
  Index since_best = 0;  // sweeps since it fell by a tenth
  bool at_rounding_level = false;  // a jittering half-span tells nothing of the contraction
  double previous = kInf;          // half-span of the sweep before
  double rate = 0.0;               // at which it fell in the last sweep that told
  double window = kInf;            // half-span a window of passes ago
  // Of Newton's method with an inexact linear solve:
  double forcing = 0.3;
  double newton_best = kInf;  // smallest half-span that a step has started from
  Index without_gain = 0, stalled = 0;
  double sought = 0.0;  // half-span at which a series may stop

  BIRL_CORE void pose(const Solve& request, double discount_, double temperature_, Index states_,
                      Index actions_, bool is_double) {
    Certificate::pose(discount_, temperature_, actions_, request.tol, is_double);
    method = request.method;
    sweep = method == Method::kSweep;
    max_iterations = request.max_iterations;
    states = static_cast<double>(states_);
  }

  // After a sweep.
  BIRL_CORE Step next() {
    if (!at_zero) ++passes;
    const double half = half_span();
    if (!finite()) return stop(Status::kNonFinite);
    if (converged()) return stop(Status::kConverged);
    if (exhausted(half) && passes > 0)
      return stop(tol > 0.0 ? Status::kStagnated : Status::kConverged);
    if (out_of_passes()) return stop(Status::kMaxIterations);
    if (mode == Mode::kElimination && passes - switched_at >= kMostPasses) {
      // Unless the sweeps are not worth waiting for.
      if (max_iterations == 0 && most_sweeps() > 1000000) return stop(Status::kMaxIterations);
      give_up(Mode::kValueIteration);
      forget();
    }
    measure_rate(half);
    choose(half);
    return mode == Mode::kValueIteration || at_zero ? Step::kSweep : Step::kImprove;
  }

  BIRL_CORE void accept_sweep() {
    Certificate::accept_sweep();
    at_zero = false;
  }

  // After a sweep in single precision, which leaves that `noise` in the half-span: accepts it, and
  // says whether another one has more to give. A last pass is left for one in double.
  BIRL_CORE bool accept_single_sweep(double noise) {
    if (!at_zero) ++passes;
    const double half = half_span();
    const bool ended = half > 0.9 * previous && half <= 16.0 * noise;
    measure_rate(half);
    accept_sweep();
    round_middle();
    return half > larger(target(), noise) && !ended && passes < kMostPasses &&
           !used_up(passes + 1) &&
           !(passes % 8 == 6 && method == Method::kAuto && elimination_pays(half, noise));
  }

  BIRL_CORE void measure_rate(double half) {
    if (previous < kInf) rate = half / previous;
    previous = half;
  }

  // Whether those are all that may be made.
  BIRL_CORE bool used_up(Index used) const { return max_iterations > 0 && used >= max_iterations; }

  // By which value iteration has contracted to the rounding level.
  BIRL_CORE Index most_sweeps() const {
    return static_cast<Index>(smaller(1e9, 60.0 * horizon)) + 1000;
  }

  // Whether an elimination costs less than the sweeps still needed at the measured contraction,
  // coarse ones above `noise`.
  BIRL_CORE bool elimination_pays(double half, double noise) const {
    const double end = target();
    if (half <= end) return false;
    if (!(rate < 1.0)) return true;
    const double between = smaller(half, larger(noise, end));
    const double sweeps = log_positive(half / between) * means.coarse_sweep +
                          log_positive(between / end) * means.sweep;
    // Its error is squared at each step, in units of τ; it takes about three steps to get there.
    double steps = 3.0;
    if (half <= 0.1 * temperature) {
      steps = 1.0;
      const double digits = log_positive(temperature / end);
      for (double x = 2.0 * log_positive(temperature / half); x < digits; x *= 2.0) steps += 1.0;
    }
    return sweeps > steps * means.elimination_step * -log_positive(rate);
  }

  // Of the residual asked of the next linear solve: Eisenstat & Walker (1996), choice 2, capped at
  // 0.3. Exact steps rise monotonically in V but not in the residual, so growth is no reason to
  // reject; if the certificate stalls for three passes the steps are made more exact instead.
  BIRL_CORE double reduction() {
    const double half = half_span();
    if (half < 0.7 * newton_best) {
      const double ratio = newton_best < kInf ? half / newton_best : 1.0;
      newton_best = half;
      without_gain = stalled = 0;
      forcing = within(1e-10, 0.9 * ratio * ratio, 0.3);
    } else if (++without_gain >= 3) {
      without_gain = 0;
      // The first steps may raise the residual: what counts is whether it falls from there.
      if (stalled++ == 0) newton_best = larger(newton_best, half);
      forcing = larger(0.1 * forcing, 1e-12);
    }
    return larger(forcing, smaller(0.1, 0.1 * target() / half));
  }

  // Whether a series goes on that has made `used` products and is left with a term of this
  // half-span. Where they do not suffice the policy is hardly worth another pass yet, so the next
  // series may make more.
  BIRL_CORE bool another_product(double term, Index used) {
    if (used < means.fewest || (term > sought && used < means.most)) return true;
    if (term > sought && means.most < means.limit) means.most *= 2;
    products += used;
    return false;
  }

  // Products in which news crosses a square grid.
  BIRL_CORE double crossing() const { return 2.0 * __builtin_sqrt(states); }

  BIRL_CORE Outcome outcome() const {
    return {status, half_span(), error_bound(), passes, products, offset()};
  }

 private:
  BIRL_CORE Step stop(Status reason) {
    status = reason;
    return Step::kStop;
  }

  BIRL_CORE void give_up(Mode next) {
    gave_up = true;
    switch_to(next);
  }
  BIRL_CORE void switch_to(Mode next) {
    mode = next;
    switched_at = passes;
    stalled = 0;
  }

  BIRL_CORE void forget() {
    best = kInf;
    since_best = 0;
    at_rounding_level = false;
  }

  // Whether the half-span has come down as far as rounding lets it: nothing is left, or nothing
  // more is gained. Where it contracts but for rounding, errors may add up along a cycle to the
  // level that one of them would keep at each sweep.
  BIRL_CORE bool exhausted(double half) {
    const double floor = rounding();
    since_best = half < 0.9 * best ? 0 : since_best + 1;
    if (since_best == 0) best = half;
    at_rounding_level = half <= floor && since_best > 0;
    const double level = mode == Mode::kValueIteration ? larger(8.0, 2.0 * horizon) : 8.0;
    const bool ended = half <= kEps * scale() || (half <= floor && since_best >= patience()) ||
                       (half <= level * floor && since_best >= 10 * patience());
    if (!ended || settled()) return ended;
    forget();
    return false;
  }

  // Passes within which the half-span falls by a tenth if it still falls: γ^n <= 0.9.
  BIRL_CORE Index patience() const {
    const double sweeps = 0.11 / (1.0 - discount);
    if (mode == Mode::kValueIteration) return 2 + static_cast<Index>(sweeps);
    return 2 + (mode == Mode::kSeries ? static_cast<Index>(sweeps / means.pass_products) : 0);
  }

  BIRL_CORE bool out_of_passes() const {
    if (max_iterations > 0) return used_up(passes);
    return (mode == Mode::kValueIteration || mode == Mode::kSeries) &&
           passes - switched_at >= most_sweeps();
  }

  // An elimination once it pays, or at the rounding level; and where a method needs far more passes
  // than it should, one that converges globally.
  BIRL_CORE void choose(double half) {
    const Index used = passes - switched_at;
    if (mode == Mode::kValueIteration) {
      if (method == Method::kAuto && means.elimination && !gave_up && passes >= 2 &&
          half > target() && (at_rounding_level || elimination_pays(half, kInf)))
        switch_to(Mode::kElimination);
    } else if (mode == Mode::kSeries) {
      if (means.krylov && !gave_up && mixes_slowly(used, half)) switch_to(Mode::kKrylov);
    } else if (mode == Mode::kKrylov) {
      if (used >= 200 || (used >= 4 && stalled >= 4))
        give_up(means.elimination ? Mode::kElimination : Mode::kSeries);
    }
  }

  // Whether series, at the pace of the last passes, would need more products than a Krylov method
  // or an elimination is likely to. Nothing contracts before news has crossed the states.
  BIRL_CORE bool mixes_slowly(Index used, double half) {
    // Where an elimination may be what comes next, thousands of products cost less than one.
    const Index length = means.elimination ? 32 : 8 + static_cast<Index>(crossing()) / means.most;
    const double limit = means.elimination ? 18000.0 : 6000.0;  // products
    if (used % length != 0) return false;
    const double before = window;
    window = half;
    if (used < 2 * length || half <= target()) return false;
    if (!(half < before)) return true;
    const double pace = log_positive(before / half) / static_cast<double>(length * means.most);
    return !(log_positive(half / target()) < limit * pace);
  }
};

}  // namespace birl
