// What a sweep proves of the distance to V* (M6), rounding included, and when nothing more can be
// had.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/common.h"

namespace birl {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kLeast = std::numeric_limits<double>::denorm_min();

// Passes after which Newton's method with elimination makes way for value iteration.
constexpr Index kMostNewton = 1000;

// Values that many times the typical one do not set the scale of `tol` for the others.
constexpr double kOutlier = 100.0;

// What a sixteenth of all |V| do not exceed, but τ where that is more.
inline double typical_size(std::vector<double> sizes, double temperature) {
  const auto low = sizes.begin() + static_cast<std::ptrdiff_t>((sizes.size() - 1) / 16);
  std::nth_element(sizes.begin(), low, sizes.end());
  return std::max(*low, temperature);
}

// A start that V* cannot be as large as is no nearer to it; NaN and infinities stay.
inline double within(double start, double most) {
  return std::isfinite(start) ? std::clamp(start, -most, most) : start;
}

struct Certificate {
  // Of the problem:
  double discount = 0.0, temperature = 1.0;
  double horizon = 1.0;                                  // 1/(1 − γ)
  double largest_reward = 0.0, largest_reference = 0.0;  // |r|, |log μ| over available actions
  bool continues = true;                                 // every available row
  double log_actions = 0.0;
  double additions = 0.0;  // dependent additions in the row sums P·W and σ and in that over actions
  double long_sum = 0.0;   // rounding of what the latter has beyond that, per unit of temperature
  double underflow = 0.0;  // what a value below the normal numbers loses where it is handed out
  double tol = 0.0;        // relative; 0: as far as rounding allows
  bool sweep = false;      // one pass is asked for, and its image as it is
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
        long_sum(0.5 * kEps * static_cast<double>(std::max<Index>(actions - 64, 0))),
        tol(tol_),
        relative_target(tol_ * (1.0 - discount_) / std::max(discount_, 0.1)) {}

  double half_span() const {
    return continues ? 0.5 * (high - low) : std::max(std::abs(low), std::abs(high));
  }

  // (M6): V* lies in TV + γ/(1−γ) [min δ, max δ]; the middle is added where that is valid.
  double shift() const {
    return continues && !sweep ? discount * horizon * (0.5 * (low + high)) : 0.0;
  }

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

  // What the soft maximum adds to the size of its arguments.
  double soft() const { return temperature * (1.0 + log_actions + largest_reference); }

  // Size of the numbers whose rounding enters δ.
  double scale() const {
    const double span = 2.0 * std::max(std::abs(least), std::abs(most));
    return size(span, (1.0 - discount) * std::abs(c), std::max(std::abs(low), std::abs(high)));
  }

  // Rounding error of one component of δ: 8 units for the handful of operations after the sums, and
  // half an ulp for each dependent addition in them.
  double rounding() const {
    return (8.0 + additions) * std::max(kEps * scale(), kLeast) + long_sum * temperature;
  }

  double error_bound() const { return (discount * half_span() + rounding()) * horizon; }

  // In units of which `tol` is meant. A reward that is taken is hardly larger.
  double largest_value() const {
    return std::max(std::max(std::abs(lowest), std::abs(highest)), temperature);
  }

  // Whether the numbers of the last sweep were of the size of what it hands out: from a start far
  // off, what looks converged only drowns.
  bool settled() const {
    const double largest = std::max(std::abs(lowest), std::abs(highest));
    const double span = continues ? highest - lowest : 2.0 * largest;
    return scale() <= 8.0 * size(span, (1.0 - discount) * largest, 0.0);
  }

  // No value is larger than that.
  double largest_possible() const {
    if (sweep) return kInf;
    return horizon * (largest_reward + temperature * (log_actions + largest_reference));
  }

  // Whether values differ so much in size that small ones lose digits in the rounding of large
  // ones, or would be judged by the tolerance of those. `image` is of the last sweep.
  bool drowns(const double* image, Index states) const {
    if (sweep) return false;
    if (converged()) {
      if (kOutlier * least_size(image, states) >= largest_value()) return false;
      std::vector<double> sizes(states);
      for (Index s = 0; s < states; ++s) sizes[s] = std::abs(image[s] + offset());
      return kOutlier * typical_size(std::move(sizes), temperature) < largest_value();
    }
    constexpr double kDigits = 1e-12, kFold = 16.0;
    const double smallest = least_size(image, states) + soft(), largest = scale();
    return largest > kFold * smallest && error_bound() > kDigits * smallest;
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

  bool converged() const { return tol > 0.0 && error_bound() + underflow <= tol * largest_value(); }

  // Half-span at which iteration ends, as far as it can be told now.
  double target() const {
    const double rest = kEps * scale();
    if (tol == 0.0) return rest;
    return std::max(relative_target * largest_value(), rest);
  }

 private:
  // min |V|
  double least_size(const double* image, Index states) const {
    if (lowest > 0.0) return lowest;
    if (highest < 0.0) return -highest;
    double smallest = kInf;
    for (Index s = 0; s < states; ++s) smallest = std::min(smallest, std::abs(image[s] + offset()));
    return smallest;
  }

  // Of the rewards only those count that are taken: rounding of an action without weight does not
  // reach the soft maximum, and one with weight has r + γPW near it.
  double size(double span, double constant, double change) const {
    const double values = span + constant + soft();
    return values + std::min(largest_reward, values + change);
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
    const bool ended = half <= kEps * certificate.scale() ||
                       (half <= floor && since_best_ >= patience) ||
                       (half <= level * floor && since_best_ >= 10 * patience);
    if (!ended || certificate.settled()) return ended;
    *this = {};
    return false;
  }

  // Whether a jittering half-span tells nothing of the contraction any more.
  bool at_rounding_level() const { return at_rounding_level_; }

 private:
  double best_ = kInf;
  Index since_best_ = 0;
  bool at_rounding_level_ = false;
};

}  // namespace birl
