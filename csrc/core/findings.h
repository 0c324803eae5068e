// What can be wrong with the numbers of one problem, and where: stated once for whoever looks, in
// whatever order.
#pragma once

#include "core/soft_maximum.h"

namespace birl {

constexpr Index kNowhere = INT64_MAX;
constexpr Index kNoActions = INT64_MAX / 2;  // and on: states, behind all places of tables

// What S subtractions leave of one: how far below zero a probability may lie.
BIRL_CORE double below_zero(bool is_double, Index states) {
  return static_cast<double>(states) * (is_double ? kEps : 0x1p-23);
}

// Rounding of single precision data, and of their sum, is no mistake.
BIRL_CORE double row_sum_tolerance(bool is_double, Index states) {
  return (is_double ? 1e-8 : 1e-5) + below_zero(is_double, states);
}

// Whether the sum of a row is one, or that of a row where the process ends.
BIRL_CORE bool is_row_sum(double sum, Rigour rigour, double tolerance) {
  return (sum == 0.0 && rigour == Rigour::kOrEnding) || magnitude(sum - 1.0) <= tolerance;
}

// The first of everything, and what a certificate needs to know.
struct Findings {
  Index reference = kNowhere;   // entry that is NaN or +inf; else kNoActions + s: no action
  Index reward = kNowhere;      // row of a reward that is not finite
  Index row = kNowhere;         // row that is not a distribution
  Index non_finite = kNowhere;  // entry
  Index negative = kNowhere;    // entry
  double row_sum = 0.0;         // of that row
  double largest_reward = 0.0, largest_reference = 0.0;  // of available actions, by magnitude
  Index longest = 0;                                     // row
  bool continues = true;                                 // every available row

  BIRL_CORE static Index first(Index x, Index y) { return y < x ? y : x; }
  BIRL_CORE static Findings join(const Findings& x, const Findings& y) {
    Findings both;
    both.reference = first(x.reference, y.reference);
    both.reward = first(x.reward, y.reward);
    both.row = first(x.row, y.row);
    both.non_finite = first(x.non_finite, y.non_finite);
    both.negative = first(x.negative, y.negative);
    both.row_sum = y.row < x.row ? y.row_sum : x.row_sum;
    both.largest_reward = larger(x.largest_reward, y.largest_reward);
    both.largest_reference = larger(x.largest_reference, y.largest_reference);
    both.longest = x.longest > y.longest ? x.longest : y.longest;
    both.continues = x.continues && y.continues;
    return both;
  }

  // The action a of state s; whether it is available.
  BIRL_CORE bool see_action(Index s, Index a, Index actions, double r, double log_mu) {
    if (!is_finite(r)) reward = first(reward, s * actions + a);
    if (!(log_mu < kInf)) reference = first(reference, s * actions + a);
    if (masked(log_mu)) return false;
    largest_reward = larger(largest_reward, magnitude(r));
    largest_reference = larger(largest_reference, magnitude(log_mu));
    return true;
  }
  BIRL_CORE void see_no_action(Index s) { reference = first(reference, kNoActions + s); }
  BIRL_CORE void see_entry(Index place, double p, double spare) {
    if (!is_finite(p))
      non_finite = first(non_finite, place);
    else if (p < -spare)
      negative = first(negative, place);
  }
  BIRL_CORE void see_bad_row(Index place, double sum) {
    if (place < row) row_sum = sum;
    row = first(row, place);
  }

  // Of discount, temperature, log_reference and reward(row). Without rigour the tables do not
  // count; the two numbers do all the same, since no certificate means anything at others.
  template <class Reward>
  BIRL_CORE Defect of_problem(Rigour rigour, double discount, double temperature,
                              const double* log_reference, Reward&& reward_of) const {
    if (!(discount >= 0.0 && discount < 1.0)) return {Status::kDiscount, 0, discount};
    if (!(temperature > 0.0 && temperature < kInf)) return {Status::kTemperature, 0, temperature};
    if (rigour == Rigour::kOff) return {};
    if (reference < kNoActions) return {Status::kReference, reference, log_reference[reference]};
    if (reference != kNowhere) return {Status::kNoAction, reference - kNoActions, 0.0};
    if (reward != kNowhere) return {Status::kNonFiniteReward, reward, reward_of(reward)};
    return {};
  }

  // Of a transition with entries stored(place).
  template <class Stored>
  BIRL_CORE Defect of_transition(Stored&& stored) const {
    if (row == kNowhere) return {};
    if (non_finite != kNowhere)
      return {Status::kNonFiniteProbability, non_finite, stored(non_finite)};
    if (negative != kNowhere) return {Status::kNegativeProbability, negative, stored(negative)};
    return {Status::kRowSum, row, row_sum};
  }
};

}  // namespace birl
