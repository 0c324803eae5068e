// What is wrong with a problem, from its Findings: the first thing in the order of
// cpu/model/validate.h, its place and its value.
#pragma once

#include "cuda/block/solve.h"

namespace birl::device {

// Of discount, temperature, log_reference and reward.
BIRL_DEVICE Status problem_verdict(const Findings& found, Rigour validate, double discount,
                                   double temperature, Index actions) {
  if (!(discount >= 0.0 && discount < 1.0)) return Status::kDiscount;
  if (!(temperature > 0.0 && temperature < kInf)) return Status::kTemperature;
  if (validate == Rigour::kOff) return Status::kConverged;
  if (found.reference != kNowhere)
    return found.reference % (actions + 1) == actions ? Status::kNoAction : Status::kReference;
  return found.reward != kNowhere ? Status::kNonFiniteReward : Status::kConverged;
}

// Of a transition of which some row is not a distribution.
BIRL_DEVICE Status transition_verdict(const Findings& found) {
  if (found.non_finite != kNowhere) return Status::kNonFiniteProbability;
  return found.negative != kNowhere ? Status::kNegativeProbability : Status::kRowSum;
}

struct Culprit {
  Index place;
  double value;
};

// stored(k) is the transition's entry k, reward(row) and reference the problem's.
template <class Stored, class Reward>
BIRL_DEVICE Culprit culprit(Status verdict, const Findings& found, Index actions, double discount,
                            double temperature, Stored&& stored, Reward&& reward,
                            const double* reference) {
  const Index state = found.reference / (actions + 1);
  switch (verdict) {
    case Status::kDiscount:
      return {0, discount};
    case Status::kTemperature:
      return {0, temperature};
    case Status::kNoAction:
      return {state, 0.0};
    case Status::kReference:
      return {found.reference - state, reference[found.reference - state]};
    case Status::kNonFiniteReward:
      return {found.reward, reward(found.reward)};
    case Status::kNonFiniteProbability:
      return {found.non_finite, stored(found.non_finite)};
    case Status::kNegativeProbability:
      return {found.negative, stored(found.negative)};
    default:
      return {found.row, found.row_sum};
  }
}

}  // namespace birl::device
