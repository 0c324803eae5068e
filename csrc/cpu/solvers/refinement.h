// The last sweeps of a problem whose values differ so much in size that the digits of small ones
// drown in the rounding of large ones: behind a wall, say, or where no policy ever gets. Sweeps
// round each state relative to what it reaches. What mixes states is left out (constants, Krylov
// methods) or is an elimination, which does the same; and convergence, tolerance and certificate
// are each state's own.
//
// The certificate: with δ = TV − V known up to ρ, and as T(V + e) − TV = τ log Σ_a π exp(γPe/τ),
//     |δ| + ρ + τ log Σ_a π exp(γPe/τ) <= e   implies   |V* − V| <= e,
// because T is monotone and its derivative grows with V. The left side is a soft Bellman operator
// of non-negative numbers: whatever e is guessed, it is verified without cancellation.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "core/control.h"
#include "cpu/model/sweep.h"
#include "cpu/solvers/elimination.h"
#include "cpu/solvers/solution.h"

namespace birl {

// Values that many times the typical one do not set the scale of `tol` for the others.
constexpr double kOutlier = 100.0;

// What a sixteenth of all |V| do not exceed, but τ where that is more.
inline double typical_size(std::vector<double> sizes, double temperature) {
  const auto low = sizes.begin() + static_cast<std::ptrdiff_t>((sizes.size() - 1) / 16);
  std::nth_element(sizes.begin(), low, sizes.end());
  return std::max(*low, temperature);
}

// Whether the values V = image + offset that a solver ended at differ so much in size that small
// ones lose digits in the rounding of large ones, or would be judged by the tolerance of those.
inline bool drowns(const Certificate& last, const double* image, Index states) {
  if (last.sweep) return false;
  const auto size = [&](Index s) { return std::abs(image[s] + last.offset()); };
  double least = kInf;  // |V|
  if (last.lowest > 0.0 || last.highest < 0.0)
    least = std::min(std::abs(last.lowest), std::abs(last.highest));
  else
    for (Index s = 0; s < states; ++s) least = std::min(least, size(s));
  if (last.converged()) {
    if (kOutlier * least >= last.largest_value()) return false;
    std::vector<double> sizes(states);
    for (Index s = 0; s < states; ++s) sizes[s] = size(s);
    return kOutlier * typical_size(std::move(sizes), last.temperature) < last.largest_value();
  }
  constexpr double kDigits = 1e-12, kFold = 16.0;
  const double smallest = least + last.soft();
  return last.scale() > kFold * smallest && last.error_bound() > kDigits * smallest;
}

template <class Model>
class Refinement {
  using Real = typename Model::Real;

 public:
  // x := about (I − γP_π)⁻¹x by products, where there are too many states for an elimination.
  using Evaluate = std::function<void(const std::vector<double>& policy, std::vector<double>& x)>;

  Refinement(const Model& model, const Solve& request, Team& team, Interrupt& interrupt)
      : request_(request), team_(team), interrupt_(interrupt), S_(model.states), A_(model.actions) {
    scratch_.assign(team.size(), SweepScratch<Model>(model));
    for (auto* table : {&q_, &policy_, &log_policy_, &ahead_, &blur_}) table->resize(S_ * A_);
    for (auto* vector : {&image_, &delta_, &floor_, &rounding_, &size_, &bound_, &trial_})
      vector->resize(S_);
  }

  // From V = c + `value`, where a solver has ended whose rounding was `coarse` at every state.
  // False if that is not much more than some state's own: then nothing is written.
  bool run(const Model& model, const Problem<Real>& problem, const double* inverse_sum,
           const Control& control, double coarse, double c, const double* value,
           const Evaluate& evaluate, const Tables<Real>& out, Outcome& outcome) {
    model_ = &model;
    problem_ = problem;
    inverse_sum_ = inverse_sum;
    certificate_ = control;
    certificate_.additions = std::max(certificate_.additions, model.additions());
    certificate_.c = certificate_.continues ? c : 0.0;
    w_.assign(value, value + S_);
    if (certificate_.used_up(outcome.passes)) {
      outcome.status = Status::kMaxIterations;
      return false;
    }
    // Sweeps until every |δ| is at its rounding level, and one step more, or nothing is gained.
    double best = kInf;
    Index since_best = 0;
    bool settled = false, noisy = false;
    for (Index count = 0;; ++count) {
      interrupt_.check();
      centre();
      sweep();
      const double worst = measure();
      if (count == 0 && !(finite_ && coarser(coarse))) return false;
      ++outcome.passes;
      if (!finite_) break;
      since_best = worst < 0.5 * best ? 0 : since_best + 1;
      best = std::min(best, worst);
      if (settled || since_best >= (worst <= kNear ? 4 : 30 + S_)) break;
      settled = count > 0 && worst <= 1.0;  // the start has the rounding of another method
      if (certificate_.used_up(outcome.passes) || count >= most(evaluate)) break;
      noisy = noisy || since_best >= 3;
      advance(evaluate, count, noisy);
    }
    outcome.status = best <= kNear ? Status::kConverged : Status::kMaxIterations;
    outcome.residual = certificate_.half_span();
    outcome.offset = problem_.discount * certificate_.c;
    hand_out(problem_, S_, A_, q_.data(), image_.data(), policy_.data(), log_policy_.data(),
             outcome.offset, out);
    certificate_.lowest = certificate_.range.least + outcome.offset;
    certificate_.highest = certificate_.range.most + outcome.offset;
    if (overflows(certificate_, problem_, out, S_ * A_)) finite_ = false;
    if (!finite_) outcome.status = Status::kNonFinite;
    std::fill(bound_.begin(), bound_.end(), kInf);
    if (finite_) {
      certify();
      judge(outcome);
    }
    outcome.error_bound = *std::max_element(bound_.begin(), bound_.end());
    outcome.bounds = bound_.data();
    return true;
  }

 private:
  static constexpr Index kEliminated = 512;  // states; where products do not suffice kDirectLimit
  static constexpr double kNear = 8.0;       // units of rounding, where nothing more may be gained

  bool direct(const Evaluate& evaluate) const { return S_ <= kEliminated || !evaluate; }
  Index most(const Evaluate& evaluate) const {
    return direct(evaluate) ? kMostPasses : 100 + certificate_.most_sweeps() / 20;
  }

  // body(first state, last, worker) over all states
  template <class Body>
  void over_states(double work, Body&& body) const {
    const Index chunk = model_->chunk();
    team_.run((S_ + chunk - 1) / chunk, work, [&](Index item, int worker) {
      body(item * chunk, std::min(S_, (item + 1) * chunk), worker);
    });
  }

  // y(s,a) = γ Σ_t P(t|s,a) x(t) / σ(s,a)
  void look_ahead(const std::vector<double>& x, std::vector<double>& y) {
    over_states(2.0 * model_->work(), [&](Index s0, Index s1, int) {
      const Index row0 = s0 * A_, row1 = s1 * A_;
      model_->products(row0, row1, x.data(), y.data() + row0);
      for (Index row = row0; row < row1; ++row) y[row] *= problem_.discount * inverse_sum_[row];
    });
  }

  // The value nearest to zero is the constant: no W is then more than twice as large as V.
  void centre() {
    if (!certificate_.continues) return;
    double middle = w_[0];
    for (const double w : w_)
      if (std::abs(certificate_.c + w) < std::abs(certificate_.c + middle)) middle = w;
    certificate_.c += middle;
    for (double& w : w_) w -= middle;
  }

  void sweep() {
    const double constant = (1.0 - problem_.discount) * certificate_.c;
    over_states(2.0 * model_->work(), [&](Index s0, Index s1, int worker) {
      const Index row0 = s0 * A_, row1 = s1 * A_;
      double* const product = scratch_[worker].product.data();
      model_->products(row0, row1, w_.data(), product);
      q_values(problem_, product, inverse_sum_ + row0, row0, row1, q_.data() + row0);
      dense_routines().soft_maximum(
          {s1 - s0, A_, q_.data() + row0,
           problem_.log_reference ? problem_.log_reference + row0 : nullptr, problem_.temperature,
           image_.data() + s0, policy_.data() + row0, log_policy_.data() + row0, nullptr,
           scratch_[worker].soft_maximum.data()});
    });
    certificate_.range =
        dense_routines().difference(S_, image_.data(), w_.data(), constant, delta_.data());
    finite_ = certificate_.finite();
  }

  // ρ of the last sweep, and the largest |δ|/ρ.
  double measure() {
    std::transform(w_.begin(), w_.end(), size_.begin(), [](double w) { return std::abs(w); });
    look_ahead(size_, blur_);
    const double units = 4.0 + certificate_.additions;
    const double constant = (1.0 - problem_.discount) * std::abs(certificate_.c);
    double worst = 0.0;
    for (Index s = 0; s < S_; ++s) {
      const double image = std::abs(image_[s]);
      for (Index row = s * A_; row < (s + 1) * A_; ++row)
        blur_[row] = kEps * (units * blur_[row] + 4.0 * (std::abs(q_[row]) + image));
      const double own = image + size_[s] + constant + certificate_.soft();
      // The last part is for those that look at this state: so no Q is off by more than its bound.
      floor_[s] = certificate_.rounding(8.0, own) + kEps * units * size_[s];
      rounding_[s] = floor_[s] + excess(s, [&](Index row) { return blur_[row]; });
      worst = std::max(worst, std::abs(delta_[s]) / rounding_[s]);
    }
    return worst;
  }

  // Whether that rounding is much more than some state's.
  bool coarser(double rounding) const {
    return !(rounding <= 8.0 * *std::min_element(rounding_.begin(), rounding_.end()));
  }

  // τ log Σ_a π exp(x/τ) of a state for x >= 0: exact where it is small, and where it is large.
  template <class At>
  double excess(Index s, At&& at) const {
    const double tau = problem_.temperature;
    const double* const reference = problem_.log_reference;
    const auto weight = [&](Index row) {  // τ log (π exp(x/τ))
      return (q_[row] - image_[s]) + at(row) + (reference ? tau * reference[row] : 0.0);
    };
    double sum = 0.0, peak = -kInf;
    for (Index row = s * A_; row < (s + 1) * A_; ++row) {
      if (masked(reference, row)) continue;
      const double x = at(row) / tau;
      if (x < 1.0) {
        sum += policy_[row] * std::expm1(x);
      } else {
        peak = std::max(peak, weight(row));
        sum += std::exp(weight(row) / tau) - policy_[row];
      }
    }
    if (peak < 700.0 * tau) return tau * std::log1p(sum);
    sum = 0.0;
    for (Index row = s * A_; row < (s + 1) * A_; ++row)
      if (!masked(reference, row)) sum += std::exp((weight(row) - peak) / tau);
    return peak + tau * std::log(sum);
  }

  void factor() {
    if (!elimination_) elimination_ = std::make_unique<Elimination>(S_);
    over_states(2.0 * model_->work(), [&](Index s0, Index s1, int) {
      std::vector<double> scaled(A_);
      for (Index s = s0; s < s1; ++s)
        elimination_->set_row(*model_, s, policy_.data() + s * A_, inverse_sum_ + s * A_,
                              problem_.discount, scaled.data());
    });
    elimination_->factor(team_, interrupt_);
  }

  // V := V + (I − γP_π)⁻¹δ. Where one part of a chain is hardly ever left, what is only rounding in
  // δ there becomes a step of many times the size that others are known to: if `noisy`, it is left.
  void advance(const Evaluate& evaluate, Index count, bool noisy) {
    trial_ = delta_;
    if (noisy)
      for (Index s = 0; s < S_; ++s)
        if (std::abs(delta_[s]) <= 0.125 * rounding_[s]) trial_[s] = 0.0;
    if (direct(evaluate) || (S_ <= kDirectLimit && count >= 60)) {
      factor();
      elimination_->solve(trial_.data(), false);
    } else {
      // The constant mode at once, as one state sees it whose rounding is least.
      const auto clear = std::min_element(rounding_.begin(), rounding_.end()) - rounding_.begin();
      const double seen = certificate_.continues && std::abs(delta_[clear]) > rounding_[clear]
                              ? delta_[clear]
                              : 0.0;
      for (double& x : trial_) x -= seen;
      evaluate(policy_, trial_);
      certificate_.c += seen / (1.0 - problem_.discount);
    }
    for (Index s = 0; s < S_; ++s) w_[s] += trial_[s];
  }

  // ---- certificate ------------------------------------------------------------------------------

  void certify() {
    std::vector<double>& own = size_;
    for (Index s = 0; s < S_; ++s) own[s] = std::abs(delta_[s]) + rounding_[s];
    const double uniform = *std::max_element(own.begin(), own.end()) * certificate_.horizon;
    std::fill(bound_.begin(), bound_.end(), uniform * (1.0 + 1e-9));
    guess(own);
    for (int attempt = 0; attempt < 3; ++attempt) {
      if (holds(trial_)) {
        for (Index s = 0; s < S_; ++s) bound_[s] = std::min(bound_[s], trial_[s]);
        return;
      }
      for (double& e : trial_) e *= 4.0;
    }
  }

  // Twice (I − γP_π)⁻¹ of `own`.
  void guess(const std::vector<double>& own) {
    if (S_ <= kEliminated || !by_products(own, S_ <= kDirectLimit ? 50 : 400)) {
      if (S_ > kDirectLimit) return;
      trial_ = own;
      factor();
      elimination_->solve(trial_.data(), false);
      // Where most of it comes from afar, twice is no margin for the rounding of holds().
      for (Index s = 0; s < S_; ++s) trial_[s] = 2.0 * own[s] + 8.0 * (slack() - 1.0) * trial_[s];
      elimination_->solve(trial_.data(), false);
    }
  }

  // For the rounding of holds().
  double slack() const { return 1.0 + 4.0 * kEps * (8.0 + certificate_.additions); }

  bool by_products(const std::vector<double>& own, int most) {
    // With v = Σ_{j<k} (γP_π)^j own and (γP_π)^k own <= ρ own, it is at most v/(1 − ρ).
    trial_ = own;
    std::vector<double> term = own;
    double expected = 1.0;  // γ^k, which ρ is where all are of a size
    for (int k = 1; k <= most; ++k) {
      look_ahead(term, ahead_);
      double ratio = 0.0;
      for (Index s = 0; s < S_; ++s) {
        double next = 0.0;
        for (Index row = s * A_; row < (s + 1) * A_; ++row) next += policy_[row] * ahead_[row];
        term[s] = next;
        ratio = std::max(ratio, next / own[s]);
      }
      expected *= problem_.discount;
      if (1.0 - ratio >= 0.25 * (1.0 - expected)) {
        for (double& e : trial_) e *= 2.0 / (1.0 - ratio);
        return true;
      }
      for (Index s = 0; s < S_; ++s) trial_[s] += term[s];
    }
    return false;
  }

  // Whether |δ| + ρ + τ log Σ π exp(γPe/τ) <= e, its own rounding included.
  bool holds(const std::vector<double>& e) {
    look_ahead(e, ahead_);
    for (Index s = 0; s < S_; ++s) {
      const double change =
          excess(s, [&](Index row) { return blur_[row] + slack() * ahead_[row]; });
      if (!((std::abs(delta_[s]) + floor_[s] + change) * slack() <= e[s])) return false;
    }
    return true;
  }

  // Each state by a tolerance of its own; values far beyond the typical one do not count for
  // others.
  void judge(Outcome& outcome) const {
    if (certificate_.tol == 0.0) return;
    std::vector<double> sizes(S_);
    for (Index s = 0; s < S_; ++s) sizes[s] = std::abs(image_[s] + outcome.offset);
    const double typical = typical_size(sizes, problem_.temperature);
    double unit = typical;
    for (const double size : sizes)
      if (size <= kOutlier * typical) unit = std::max(unit, size);
    bool met = true;
    for (Index s = 0; s < S_; ++s)
      met = met && certificate_.meets(bound_[s], std::max(sizes[s], unit));
    if (met)
      outcome.status = Status::kConverged;
    else if (outcome.status != Status::kMaxIterations)
      outcome.status = Status::kStagnated;
  }

  const Solve& request_;
  Team& team_;
  Interrupt& interrupt_;
  const Index S_, A_;

  const Model* model_ = nullptr;
  Problem<Real> problem_{};
  const double* inverse_sum_ = nullptr;  // (S,A)
  Control certificate_;                  // V = c + W
  bool finite_ = true;
  std::vector<double> w_, image_, delta_, q_, policy_, log_policy_;
  std::vector<double> blur_, floor_, rounding_;  // of q, of δ without that, and of δ
  std::vector<double> bound_, size_, trial_, ahead_;
  std::vector<SweepScratch<Model>> scratch_;
  std::unique_ptr<Elimination> elimination_;
};

}  // namespace birl
