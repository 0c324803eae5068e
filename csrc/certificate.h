// What a sweep proves of the distance to V* (M6), rounding included, and when nothing more can be
// had.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/common.h"

namespace birl {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr double kInf = std::numeric_limits<double>::infinity();

// Passes after which Newton's method with elimination makes way for value iteration.
constexpr Index kMostNewton = 1000;

struct Certificate {
  // Of the problem:
  double discount = 0.0, temperature = 1.0;
  double horizon = 1.0;                                  // 1/(1 − γ)
  double largest_reward = 0.0, largest_reference = 0.0;  // |r|, |log μ| over available actions
  bool continues = true;                                 // every available row
  double log_actions = 0.0;
  double additions = 0.0;  // dependent additions in the row sums P·W and σ and in that over actions
  double tol = 0.0;        // relative; 0: as far as rounding allows
  double relative_target = 0.0;  // half-span at which the bound meets it, per unit of value
  // Of the last sweep, made at V = c + W:
  double c = 0.0;
  double least = 0.0, most = 0.0;      // range of W
  double low = 0.0, high = 0.0;        // range of δ = TV − V
  double lowest = 0.0, highest = 0.0;  // of the value that it hands out

  Certificate() = default;
  Certificate(double discount_, double temperature_, Index actions, double row_additions,
              double tol_)
      : discount(discount_),
        temperature(temperature_),
        horizon(1.0 / (1.0 - discount_)),
        log_actions(std::log(static_cast<double>(actions))),
        additions(row_additions + 0.5 * static_cast<double>(std::min<Index>(actions, 64))),
        tol(tol_),
        relative_target(tol_ * (1.0 - discount_) / std::max(discount_, 0.1)) {}

  double half_span() const {
    return continues ? 0.5 * (high - low) : std::max(std::abs(low), std::abs(high));
  }

  // (M6): V* lies in TV + γ/(1−γ) [min δ, max δ]; the middle is added where that is valid.
  double shift() const { return continues ? discount * horizon * (0.5 * (low + high)) : 0.0; }

  // The value handed out is the image, of this range, and offset().
  double offset() const { return discount * c + shift(); }
  void hands_out(double image_least, double image_most) {
    lowest = image_least + offset();
    highest = image_most + offset();
  }

  // What an exact Newton step leaves out of δ, for c to take: the number of [low, high] next to
  // zero. The rest of the step then is near V_π − V, and hardly larger. The middle would add
  // middle/(1 − γ) to every state and take it off again: where a few passing states have a large δ
  // that costs the others their digits, and near γ = 1 the steps go in circles.
  double step_share() const { return continues ? std::clamp(0.0, low, high) : 0.0; }

  // Size of the numbers whose rounding enters δ.
  double scale() const {
    const double span = 2.0 * std::max(std::abs(least), std::abs(most));
    return largest_reward + span + (1.0 - discount) * std::abs(c) +
           temperature * (1.0 + log_actions + largest_reference);
  }

  // Rounding error of one component of δ: 8 units for the handful of operations after the sums, and
  // half an ulp for each dependent addition in them.
  double rounding() const { return (8.0 + additions) * kEps * scale(); }

  double error_bound() const { return (discount * half_span() + rounding()) * horizon; }

  double largest_value() const {
    return std::max(std::max(std::abs(lowest), std::abs(highest)), largest_reward);
  }

  // Passes of so many sweeps each within which the half-span falls by a tenth if it still falls:
  // γ^n <= 0.9.
  Index patience(double sweeps) const {
    return 2 + static_cast<Index>(0.11 / (1.0 - discount) / sweeps);
  }

  // By which value iteration has contracted to the rounding level.
  Index most_sweeps() const { return static_cast<Index>(std::min(1e9, 60.0 * horizon)) + 1000; }

  // Whether those are worth waiting for where Newton's method did not end.
  bool sweeps_end() const { return most_sweeps() <= 1000000; }

  bool converged() const { return tol > 0.0 && error_bound() <= tol * largest_value(); }

  // Half-span at which iteration ends, as far as it can be told now.
  double target() const {
    const double rest = kEps * scale();
    if (tol == 0.0) return rest;
    return std::max(relative_target * largest_value(), rest);
  }
};

// Tells when the half-span has come down as far as rounding lets it.
class Progress {
 public:
  // `patience`: sweeps within which the half-span falls by a tenth if it still falls. `contracts`:
  // that is certain but for rounding, whose errors may add up along a cycle to the level that one
  // of them would keep at each sweep.
  bool exhausted(const Certificate& certificate, Index patience, bool contracts) {
    const double half = certificate.half_span(), floor = certificate.rounding();
    since_best_ = half < 0.9 * best_ ? 0 : since_best_ + 1;
    if (since_best_ == 0) best_ = half;
    at_rounding_level_ = half <= floor && since_best_ > 0;
    const double level = contracts ? std::max(8.0, 2.0 * certificate.horizon) : 8.0;
    return half <= kEps * certificate.scale() || (half <= floor && since_best_ >= patience) ||
           (half <= level * floor && since_best_ >= 10 * patience);
  }

  // Whether a jittering half-span tells nothing of the contraction any more.
  bool at_rounding_level() const { return at_rounding_level_; }

 private:
  double best_ = kInf;
  Index since_best_ = 0;
  bool at_rounding_level_ = false;
};

}  // namespace birl
