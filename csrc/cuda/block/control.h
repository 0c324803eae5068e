// The decisions of one fixed-point iteration: certificate, stopping, and which step comes next.
// Scalars only, executed by one thread of the team (Team::decide); the vectors are the kernel's.
//
// The rules are those of cpu/solvers/certificate.h and cpu/solvers/packed_solver.h: value iteration
// with the constant mode deflated, and Newton's method with an elimination once the measured
// contraction of the half-span predicts more sweeps than Newton costs.
#pragma once

#include "core/request.h"
#include "core/scalar_math.h"
#include "cuda/layer/layer.h"

namespace birl::device {

constexpr double kEps = 2.220446049250313e-16;
constexpr double kInf = __builtin_huge_val();
constexpr double kLeast = 4.9406564584124654e-324;

BIRL_DEVICE double smaller(double x, double y) { return y < x ? y : x; }
BIRL_DEVICE double larger(double x, double y) { return y > x ? y : x; }
BIRL_DEVICE double magnitude(double x) { return x < 0.0 ? -x : x; }
BIRL_DEVICE bool is_finite(double x) { return x - x == 0.0; }

// log x for finite x > 0
BIRL_DEVICE double log_positive(double x) {
  return x >= 1.0 ? log_from_one(x) : -log_from_one(1.0 / x);
}

// No value is larger than that.
BIRL_DEVICE double largest_possible(double reward, double reference, Index actions,
                                    double temperature, double discount) {
  const double entropy = log_from_one(static_cast<double>(actions)) + reference;
  return (reward + temperature * entropy) / (1.0 - discount);
}

// A start that V* cannot be as large as is no nearer to it; NaN and infinities stay.
BIRL_DEVICE double within(double start, double most) {
  return is_finite(start) ? smaller(larger(start, -most), most) : start;
}

// How far below zero a probability may lie, as in cpu/model/validate.h.
template <class Real>
BIRL_DEVICE double below_zero(Index states) {
  return static_cast<double>(states) * (sizeof(Real) == 4 ? 1.1920928955078125e-7 : kEps);
}

enum class Mode : int { kValueIteration, kNewton };
enum class Step : int { kStop, kAcceptSweep, kNewton };

struct SolveOptions {
  Index method;          // 0 auto, 1 value iteration; 2, 3 and 4 are Newton with an elimination
  double tol;            // relative and certified; 0: as far as rounding allows
  Index max_iterations;  // passes over P; 0: enough for the contraction to reach rounding level
  Rigour validate;
};

// What one sweep found, over all states.
struct SweepRange {
  double delta_low, delta_high;  // of δ = TV − V
  double image_low, image_high;  // of tw
  bool finite;

  BIRL_DEVICE static SweepRange nothing() { return {kInf, -kInf, kInf, -kInf, true}; }

  BIRL_DEVICE void add(double delta, double image) {
    delta_low = smaller(delta_low, delta);
    delta_high = larger(delta_high, delta);
    image_low = smaller(image_low, image);
    image_high = larger(image_high, image);
    finite = finite && is_finite(delta);
  }

  BIRL_DEVICE static SweepRange join(const SweepRange& x, const SweepRange& y) {
    return {smaller(x.delta_low, y.delta_low), larger(x.delta_high, y.delta_high),
            smaller(x.image_low, y.image_low), larger(x.image_high, y.image_high),
            x.finite && y.finite};
  }
};

// Lives in the team's on-chip memory; V = c + W.
struct SolveControl {
  // the problem
  SolveOptions options;
  double discount, temperature;
  double states, actions;
  double largest_reward, largest_reference;  // of available actions, by magnitude
  double additions;                          // dependent ones in a row sum
  bool continues;                            // no available row without continuation
  bool direct;                               // whether there is memory for an elimination
  // the iterate
  double c, low, high;  // W lies in [low, high]
  SweepRange range;     // of the last sweep
  double largest;       // magnitude of the value that it hands out, or τ
  double middle;        // what to take off the next W, so that c carries the constant mode
  // the iteration
  Mode mode;
  Status status;
  Index passes, switched_at;
  double best;       // smallest half-span so far
  Index since_best;  // sweeps since it fell by a tenth
  double previous;   // half-span
  bool from_zero;    // the next sweep is at V = 0 and needs no P

  BIRL_DEVICE void begin(bool zero) {
    const bool newton = options.method >= 2 && options.method != kSweep && direct;
    mode = newton ? Mode::kNewton : Mode::kValueIteration;
    status = Status::kMaxIterations;
    passes = switched_at = since_best = 0;
    best = previous = kInf;
    from_zero = zero;
  }

  // Takes W's middle into c: where every row continues, T commutes with constants.
  BIRL_DEVICE void centre(double w_low, double w_high) {
    middle = continues ? 0.5 * (w_low + w_high) : 0.0;
    c += middle;
    low = w_low - middle;
    high = w_high - middle;
  }

  // ---- certificate ----------------------------------------------------------------------------

  BIRL_DEVICE double half_span() const {
    return continues ? 0.5 * (range.delta_high - range.delta_low)
                     : larger(magnitude(range.delta_low), magnitude(range.delta_high));
  }

  BIRL_DEVICE double delta_middle() const {
    return continues ? 0.5 * (range.delta_low + range.delta_high) : 0.0;
  }

  // What an exact Newton step leaves out of δ, as in cpu/solvers/certificate.h.
  BIRL_DEVICE double step_share() const {
    return continues ? smaller(larger(0.0, range.delta_low), range.delta_high) : 0.0;
  }

  // (M6): V* lies in TV + γ/(1−γ) [min δ, max δ]; the middle is added where that is valid.
  BIRL_DEVICE double shift() const {
    return options.method == kSweep ? 0.0 : discount / (1.0 - discount) * delta_middle();
  }

  // The constant of the solution handed out, tw + offset.
  BIRL_DEVICE double offset() const { return discount * c + shift(); }

  // Size of the numbers whose rounding enters δ, as in cpu/solvers/certificate.h.
  BIRL_DEVICE double scale() const {
    return size(2.0 * larger(magnitude(low), magnitude(high)), magnitude(c),
                larger(magnitude(range.delta_low), magnitude(range.delta_high)));
  }

  // Rounding error of one component of δ: units of eps·scale as in cpu/solvers/certificate.h, 8 for
  // the operations after the row sums, and the dependent additions of row sums and soft maximum. Of
  // a subnormal τ there is no 1/τ, and no bound.
  BIRL_DEVICE double rounding() const {
    if (!is_finite(1.0 / temperature)) return kInf;
    const double beyond = 0.5 * kEps * larger(actions - 64.0, 0.0) * temperature;
    return (8.0 + additions + 0.5 * smaller(actions, 64.0)) * larger(kEps * scale(), kLeast) +
           beyond;
  }

  // Whether the numbers of the last sweep were of the size of what it hands out.
  BIRL_DEVICE bool settled() const {
    const double span = continues ? range.image_high - range.image_low : 2.0 * largest;
    return scale() <= 8.0 * size(span, largest, 0.0);
  }

  BIRL_DEVICE double error_bound() const {
    return (discount * half_span() + rounding()) / (1.0 - discount);
  }

  // Takes what a sweep found, and the size of the value that it hands out.
  BIRL_DEVICE void take(const SweepRange& found) {
    range = found;
    const double constant = offset();
    largest = larger(
        larger(magnitude(range.image_low + constant), magnitude(range.image_high + constant)),
        temperature);
  }

  // How the iteration ended for a value handed out in single or in double precision.
  BIRL_DEVICE Status verdict(bool single) const {
    constexpr double most = 3.4028234663852886e38;
    return single && !(largest <= most) ? Status::kNonFinite : status;
  }

  // ---- decisions ------------------------------------------------------------------------------

  BIRL_DEVICE Step next(const SweepRange& found) {
    take(found);
    if (!from_zero) ++passes;
    const double half = half_span();
    if (!range.finite || !is_finite(c)) return stop(Status::kNonFinite);
    if (options.tol > 0.0 && error_bound() <= options.tol * largest)
      return stop(Status::kConverged);
    since_best = half < 0.9 * best ? 0 : since_best + 1;
    if (since_best == 0) best = half;
    const double floor = rounding();
    if (passes > 0 && exhausted(half, floor))
      return stop(options.tol > 0.0 ? Status::kStagnated : Status::kConverged);
    if (out_of_passes()) return stop(Status::kMaxIterations);
    if (options.method == 0) choose(half, half <= floor && since_best > 0);
    if (mode == Mode::kNewton && passes - switched_at >= 1000) {
      // As in cpu/solvers/certificate.h: unless the sweeps would not come to an end.
      if (options.max_iterations == 0 && !(60.0 / (1.0 - discount) <= 999000.0))
        return stop(Status::kMaxIterations);
      switch_to(Mode::kValueIteration);
      best = kInf;
      since_best = 0;
    }
    previous = half;
    // T0 is free, and a better start than zero
    const Step step = mode == Mode::kNewton && passes > 0 ? Step::kNewton : Step::kAcceptSweep;
    from_zero = false;
    return step;
  }

  // V := TV, corrected by the middle of (M6).
  BIRL_DEVICE void accept_sweep() {
    c = continues ? offset() : 0.0;
    centre(range.image_low, range.image_high);
  }

  // V := V + x with (I − γP_π) x = δ − share: where every row continues, a constant in δ
  // contributes a constant to x.
  BIRL_DEVICE void accept_newton(double share, double w_low, double w_high) {
    c += share / (1.0 - discount);
    centre(w_low, w_high);
  }

  // Units of rounding() up to which a half-span that has long ceased to fall is left at. Where it
  // contracts but for rounding, errors may add up along a cycle to what one at each sweep would
  // keep.
  BIRL_DEVICE double level(bool contracts) const {
    return contracts ? larger(8.0, 2.0 / (1.0 - discount)) : 8.0;
  }

 protected:
  // From a start far off, what looks like the end only drowns.
  BIRL_DEVICE bool at_end(bool seems) {
    if (!seems || settled()) return seems;
    best = kInf;
    since_best = 0;
    return false;
  }

 private:
  // A reward counts where it is taken.
  BIRL_DEVICE double size(double span, double constant, double change) const {
    const double values = span + (1.0 - discount) * constant +
                          temperature * (1.0 + log_from_one(actions) + largest_reference);
    return values + smaller(largest_reward, values + change);
  }

  BIRL_DEVICE Step stop(Status reason) {
    status = reason;
    return Step::kStop;
  }

  BIRL_DEVICE void switch_to(Mode next) {
    mode = next;
    switched_at = passes;
  }

  // At the rounding level: nothing is left, or nothing more is gained.
  BIRL_DEVICE bool exhausted(double half, double floor) {
    return at_end(
        half <= kEps * scale() || (half <= floor && since_best >= patience()) ||
        (half <= level(mode == Mode::kValueIteration) * floor && since_best >= 10 * patience()));
  }

  // Sweeps within which the half-span falls by a tenth if it still falls: γ^n <= 0.9.
  BIRL_DEVICE Index patience() const {
    return 2 + (mode == Mode::kValueIteration ? static_cast<Index>(0.11 / (1.0 - discount)) : 0);
  }

  BIRL_DEVICE bool out_of_passes() const {
    if (options.max_iterations > 0) return passes >= options.max_iterations;
    const double contraction = smaller(1e9, 60.0 / (1.0 - discount)) + 1000.0;
    return mode == Mode::kValueIteration &&
           static_cast<double>(passes - switched_at) >= contraction;
  }

  // Value iteration as long as its measured contraction beats Newton's price, and Newton at the
  // rounding level, where a jittering half-span tells nothing of the contraction.
  BIRL_DEVICE void choose(double half, bool at_rounding_level) {
    if (mode == Mode::kNewton || !direct || passes < 2 || switched_at > 0) return;
    const double wanted =
        larger(options.tol * largest * (1.0 - discount) / larger(discount, 0.1), kEps * scale());
    if (half <= wanted) return;
    const double rate = half / previous;
    const double sweeps = rate < 1.0 && !at_rounding_level
                              ? log_positive(half / wanted) / log_positive(1.0 / rate)
                              : kInf;
    // From contracting value iterates Newton needs about three steps to rounding level.
    if (sweeps * sweep_cost() > 3.0 * newton_cost()) switch_to(Mode::kNewton);
  }

  // Clocks of one team, from instruction counts (not measured on a GPU): latency first, then work
  // over some hundred lanes. They depend on the shape alone, so all kernels decide alike.
  BIRL_DEVICE double sweep_cost() const {
    return 1000.0 + states * actions * (states + 100.0) / 128.0;
  }
  BIRL_DEVICE double newton_cost() const {
    return sweep_cost() + states * (150.0 + 0.75 * states + states * states / 256.0);
  }
};

}  // namespace birl::device
