// What a sweep proves of the distance to V* (M6), rounding included. Scalars of one problem; who
// solves it owns the vectors.
#pragma once

#include "core/scalar_math.h"

namespace birl {

// What one sweep found, over all states.
struct SweepRange {
  double low = kInf, high = -kInf;    // of δ = TV − V
  double least = kInf, most = -kInf;  // of the image tw = TV − γc
  bool finite = true;

  BIRL_CORE void add(double delta, double image) {
    low = smaller(low, delta);
    high = larger(high, delta);
    least = smaller(least, image);
    most = larger(most, image);
    finite = finite && is_finite(delta);
  }

  BIRL_CORE static SweepRange join(const SweepRange& x, const SweepRange& y) {
    return {smaller(x.low, y.low), larger(x.high, y.high), smaller(x.least, y.least),
            larger(x.most, y.most), x.finite && y.finite};
  }
};

struct Certificate {
  // Of the problem:
  double discount = 0.0, temperature = 1.0;
  double horizon = 1.0;                                  // 1/(1 − γ)
  double largest_reward = 0.0, largest_reference = 0.0;  // |r|, |log μ| over available actions
  double actions = 1.0, log_actions = 0.0;
  double additions = 0.0;  // dependent ones in the row sums P·W and σ and in that over actions
  double long_sum = 0.0;   // rounding of what the latter has beyond that, per unit of temperature
  bool single = false;     // what is handed out, but for values, is in single precision
  double tol = 0.0;        // relative; 0: as far as rounding allows
  bool continues = true;   // every available row
  bool sweep = false;      // one pass is asked for, and its image as it is
  // The iterate V = c + W:
  double c = 0.0, least = 0.0, most = 0.0;  // range of W
  double middle = 0.0;                      // what has yet to be taken off the vector for W
  // Of the last sweep:
  SweepRange range = {0.0, 0.0, 0.0, 0.0, true};
  double lowest = 0.0, highest = 0.0;  // of the value that it hands out

  BIRL_CORE void pose(double discount_, double temperature_, Index actions_, double tol_,
                      bool is_double) {
    discount = discount_;
    temperature = temperature_;
    horizon = 1.0 / (1.0 - discount);
    actions = static_cast<double>(actions_);
    log_actions = log_from_one(actions);
    long_sum = 0.5 * kEps * larger(actions - 64.0, 0.0);
    tol = tol_;
    single = !is_double;
  }
  BIRL_CORE void count_additions(double of_a_row) {
    additions = of_a_row + 0.5 * smaller(actions, 64.0);
  }

  BIRL_CORE double half_span() const {
    return continues ? 0.5 * (range.high - range.low)
                     : larger(magnitude(range.low), magnitude(range.high));
  }

  BIRL_CORE double delta_middle() const { return continues ? 0.5 * (range.low + range.high) : 0.0; }

  // (M6): V* lies in TV + γ/(1−γ) [min δ, max δ]; the middle is added where that is valid.
  BIRL_CORE double shift() const { return sweep ? 0.0 : discount * horizon * delta_middle(); }

  // The value handed out is the image and this.
  BIRL_CORE double offset() const { return discount * c + shift(); }

  BIRL_CORE void take(const SweepRange& found) {
    range = found;
    lowest = range.least + offset();
    highest = range.most + offset();
  }
  BIRL_CORE bool finite() const { return range.finite && is_finite(c); }

  // W has this range: takes its middle into c where every row continues, as T commutes with
  // constants only there.
  BIRL_CORE void centre(double w_least, double w_most) {
    middle = continues ? 0.5 * (w_least + w_most) : 0.0;
    c = continues ? c + middle : 0.0;
    least = w_least - middle;
    most = w_most - middle;
  }

  // The same of a start. Where one pass is asked for, only if that costs no state digits: values of
  // different size stay as they are.
  BIRL_CORE void centre_start(double w_least, double w_most) {
    if (!sweep || w_most - w_least <= 0.5 * larger(magnitude(w_least), magnitude(w_most)))
      return centre(w_least, w_most);
    least = w_least;
    most = w_most;
  }

  // To single precision; c takes the rest.
  BIRL_CORE void round_middle() {
    const double rounded = static_cast<double>(static_cast<float>(middle));
    c += rounded - middle;
    middle = rounded;
  }

  // V := TV, corrected by the middle of (M6).
  BIRL_CORE void accept_sweep() {
    c = offset();
    centre(range.least, range.most);
  }

  // V := V + x with (I − γP_π) x = δ − share, now of this range: where every row continues, a
  // constant in δ contributes a constant to x. What the rest leaves of one the next sweep's middle
  // finds exactly.
  BIRL_CORE void accept_step(double share, double w_least, double w_most) {
    c += share / (1.0 - discount);
    centre(w_least, w_most);
  }

  // What an exact Newton step leaves out of δ, for c to take: the number of [low, high] next to
  // zero. The rest of the step then is near V_π − V, and hardly larger. The middle would add
  // middle/(1 − γ) to every state and take it off again: where a few passing states have a large δ
  // that costs the others their digits, and near γ = 1 the steps go in circles.
  BIRL_CORE double step_share() const {
    return continues ? within(range.low, 0.0, range.high) : 0.0;
  }

  // What the soft maximum adds to the size of its arguments.
  BIRL_CORE double soft() const { return temperature * (1.0 + log_actions + largest_reference); }

  // Size of the numbers whose rounding enters δ.
  BIRL_CORE double scale() const {
    const double span = 2.0 * larger(magnitude(least), magnitude(most));
    return size(span, (1.0 - discount) * magnitude(c),
                larger(magnitude(range.low), magnitude(range.high)));
  }

  // Rounding error of one component of δ: 8 units for the handful of operations after the sums, and
  // half an ulp for each dependent addition in them.
  BIRL_CORE double rounding() const { return rounding(8.0 + additions, scale()); }
  BIRL_CORE double rounding(double units, double size) const {
    return units * larger(kEps * size, kLeast) + long_sum * temperature;
  }

  BIRL_CORE double error_bound() const { return (discount * half_span() + rounding()) * horizon; }

  // Of the values handed out.
  BIRL_CORE double largest_size() const { return larger(magnitude(lowest), magnitude(highest)); }
  // In units of which `tol` is meant. A reward that is taken is hardly larger.
  BIRL_CORE double largest_value() const { return larger(largest_size(), temperature); }

  // Whether the numbers of the last sweep were of the size of what it hands out: from a start far
  // off, what looks converged only drowns.
  BIRL_CORE bool settled() const {
    const double span = continues ? highest - lowest : 2.0 * largest_size();
    return scale() <= 8.0 * size(span, (1.0 - discount) * largest_size(), 0.0);
  }

  // No value is larger than that.
  BIRL_CORE double largest_possible() const {
    if (sweep) return kInf;
    return horizon * (largest_reward + temperature * (log_actions + largest_reference));
  }

  // A start that V* cannot be as large as is no nearer to it; NaN and infinities stay.
  BIRL_CORE double start(double value) const {
    const double limit = largest_possible();
    return is_finite(value) ? within(-limit, value, limit) : value;
  }

  // Half of the smallest number in which values are handed out, if that is not what computes them.
  BIRL_CORE double underflow() const { return single ? 0x1p-150 : 0.0; }

  // Whether the value itself is too large for the type in which it is handed out.
  BIRL_CORE bool overflows() const {
    return !(largest_size() <= (single ? 0x1.fffffep127 : 0x1.fffffffffffffp1023));
  }

  // Whether a number of that size is known as well as it is asked for.
  BIRL_CORE bool meets(double bound, double size) const {
    return bound + underflow() <= tol * size;
  }
  BIRL_CORE bool converged() const { return tol > 0.0 && meets(error_bound(), largest_value()); }

  // Half-span at which iteration ends, as far as it can be told now.
  BIRL_CORE double target() const {
    return larger(tol * largest_value() * (1.0 - discount) / larger(discount, 0.1), kEps * scale());
  }

 private:
  // Of the rewards only those count that are taken: rounding of an action without weight does not
  // reach the soft maximum, and one with weight has r + γPW near it.
  BIRL_CORE double size(double span, double constant, double change) const {
    const double values = span + constant + soft();
    return values + smaller(largest_reward, values + change);
  }
};

}  // namespace birl
