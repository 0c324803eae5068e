// The whole fixed point of a small problem (lanes.h): value iteration in single precision as far as
// it carries, then in double, and Newton's method with elimination where sweeps contract slowly.
#pragma once

#include <memory>
#include <vector>

#include "certificate.h"
#include "elimination.h"
#include "lanes.h"
#include "outcome.h"

namespace birl {

template <class Model>
class LaneSolver {
  using Real = typename Model::Real;

 public:
  // P packed and a problem's tables should stay in a core's second-level cache.
  static bool fits(Index states, Index actions) {
    constexpr Index kLargest = 128, kBytes = 1 << 20;
    return states <= kLargest && padded(states, lane_kernels<Real>().width) * states * actions <=
                                     kBytes / static_cast<Index>(sizeof(Real));
  }

  LaneSolver(const Solve& request, Team& alone, Interrupt& interrupt, Index states, Index actions)
      : request_(request),
        alone_(alone),
        interrupt_(interrupt),
        states_(states),
        actions_(actions),
        width_(lane_kernels<Real>().width),
        entries_(padded(states, width_) * actions),
        transition_(entries_ * states),
        reward_(entries_),
        inverse_sum_(entries_, 1.0),  // stays one in vectors beyond the last state
        scale_(entries_),
        log_reference_(entries_),
        q_(entries_),
        value_(padded(states, width_)),
        image_(value_.size()),
        w_(value_.size()),
        scratch_(6 * width_ * actions) {}

  static constexpr Kernel kKernel = Kernel::kCpuLanes;

  // Packs a transition, and finds the first thing wrong with it.
  void take(const Model& model) {
    model_ = &model;
    transition_defect_ = {};
    pack(model);
    const bool checked = request_.validate != Rigour::kOff;
    const bool sound = lane_kernels<Real>().row_sums(
        transition_.data(), states_, actions_, row_sum_tolerance<Real>(states_),
        request_.validate != Rigour::kStochastic, inverse_sum_.data());
    if (checked && !sound) {
      const Index rows = states_ * actions_;
      std::vector<double> sum(rows), least(rows);
      model.row_sums(0, rows, sum.data(), least.data());
      transition_defect_ = transition_defect(model, request_.validate, sum.data(), least.data());
    }
    for (double& x : inverse_sum_) x = x == 0.0 ? 0.0 : 1.0 / x;
  }

  // The solution, or the first thing wrong with the input.
  Defect solve(const Problem<Real>& problem, const double* initial, const Tables<Real>& out,
               Outcome& outcome) {
    Defect defect = pack(problem);
    if (defect.status == Status::kConverged) defect = transition_defect_;
    if (defect.status == Status::kConverged) outcome = run(initial, out);
    return defect;
  }

 private:
  Defect pack(const Problem<Real>& problem) {
    problem_ = problem;
    packed_ = lane_kernels<Real>().pack_problem(
        problem.reward, problem.log_reference, states_, actions_, inverse_sum_.data(),
        problem.discount, reward_.data(), scale_.data(), log_reference_.data());
    const bool suspicious = !packed_.finite || problem.log_reference ||
                            !(problem.discount >= 0.0 && problem.discount < 1.0) ||
                            !(problem.temperature > 0.0 && problem.temperature < kInf);
    if (request_.validate == Rigour::kOff || !suspicious) return {};
    return problem_defect(problem, states_, actions_);
  }

  Outcome run(const double* initial, const Tables<Real>& out) {
    certificate_ = {};
    certificate_.discount = problem_.discount;
    certificate_.temperature = problem_.temperature;
    certificate_.largest_reward = packed_.largest_reward;
    certificate_.largest_reference = packed_.largest_reference;
    certificate_.continues = packed_.continues;
    certificate_.actions = actions_;
    certificate_.additions = 0.5 * static_cast<double>(states_) + 2.0;
    certificate_.tol = request_.tol;
    passes_ = products_ = 0;
    at_zero_ = true;
    if (initial) start(initial);
    if (single_pays(initial)) iterate_single();
    Outcome outcome = iterate();
    outcome.offset = certificate_.discount * certificate_.c + certificate_.shift();
    lane_kernels<Real>().result({states_, actions_, q_.data(), image_.data(), reference(),
                                 problem_.temperature, outcome.offset, out.value, out.q,
                                 out.advantage, out.policy, out.log_policy, scratch_.data()});
    return outcome;
  }

  const double* reference() const {
    return problem_.log_reference ? log_reference_.data() : nullptr;
  }

  template <class R>
  void pack(const DenseTransition<R>& model) {
    lane_kernels<Real>().pack_transition(model.values, states_, actions_, transition_.data());
  }
  template <class R>
  void pack(const CsrTransition<R>& model) {
    std::fill(transition_.begin(), transition_.end(), Real{0});
    for (Index s = 0; s < padded(states_, width_); ++s)
      for (Index a = 0; a < actions_; ++a) {
        const Index row = std::min(s, states_ - 1) * actions_ + a;
        Real* to = transition_.data() + (s / width_ * states_ * actions_ + a) * width_ + s % width_;
        for (Index k = model.crow[row]; k < model.crow[row + 1]; ++k)
          to[model.col[k] * actions_ * width_] += model.values[k];
      }
  }

  // V = c + (value − centre), the middle of W taken out where T commutes with constants.
  void start(const double* initial) {
    for (std::size_t s = 0; s < value_.size(); ++s)
      value_[s] = initial[std::min<Index>(static_cast<Index>(s), states_ - 1)];
    const auto ends = std::minmax_element(value_.begin(), value_.end());
    take(*ends.first, *ends.second);
  }
  void take(double least, double most) {
    centre_ = certificate_.continues ? 0.5 * (least + most) : 0.0;
    certificate_.c = certificate_.continues ? certificate_.c + centre_ : 0.0;
    certificate_.least = least - centre_;
    certificate_.most = most - centre_;
    at_zero_ = false;
  }

  // One sweep at the present V. False if something overflowed.
  bool sweep() {
    const double constant = (1.0 - problem_.discount) * certificate_.c;
    extent_ = lane_kernels<Real>().sweep({states_, actions_, transition_.data(), reward_.data(),
                                          scale_.data(), reference(), problem_.temperature,
                                          at_zero_ ? nullptr : value_.data(), centre_, constant,
                                          image_.data(), q_.data(), w_.data()});
    certificate_.low = extent_.low;
    certificate_.high = extent_.high;
    if (!at_zero_) ++passes_;
    return extent_.finite && std::isfinite(certificate_.c);
  }

  void accept_sweep() {
    certificate_.c = certificate_.discount * certificate_.c + certificate_.shift();
    value_.swap(image_);
    take(extent_.least, extent_.most);
  }

  Outcome iterate() {
    enum { kSweeps, kNewton } mode = request_.method == 2 ? kNewton : kSweeps;
    const Index given = request_.max_iterations;
    const double slowest = 1.0 / (1.0 - problem_.discount);
    const Index contraction = static_cast<Index>(std::min(1e9, 60.0 * slowest)) + 1000;
    const Index patience = 2 + static_cast<Index>(0.11 * slowest);
    double previous = kInf;
    Progress progress;
    Status status = Status::kMaxIterations;
    for (Index count = 0;; ++count) {
      if (count % 64 == 63) interrupt_.check();
      if (!sweep()) {
        status = Status::kNonFinite;
        break;
      }
      if (certificate_.converged()) {
        status = Status::kConverged;
        break;
      }
      const double half = certificate_.half_span();
      const bool exhausted = progress.exhausted(certificate_, mode == kNewton ? 2 : patience);
      if (passes_ > 0 && exhausted) {
        status = request_.tol > 0.0 ? Status::kStagnated : Status::kConverged;
        break;
      }
      if (given > 0 ? passes_ >= given : passes_ >= contraction) break;
      if (mode == kSweeps && request_.method == 0 && passes_ >= 2 && half > certificate_.target() &&
          (progress.at_rounding_level() || newton_pays(half, half / previous, kInf)))
        mode = kNewton;
      previous = half;
      if (mode == kSweeps || passes_ == 0)  // T0 is free, and a better start than zero
        accept_sweep();
      else
        newton();
    }
    return {status, certificate_.half_span(), certificate_.error_bound(), passes_, products_};
  }

  // W := W + x with (I − γP_π) x = δ less its middle. Where every row continues x matters only up
  // to a constant: the next sweep's middle finds it exactly.
  void newton() {
    const LaneKernels<Real>& lanes = lane_kernels<Real>();
    const Index S = states_, A = actions_;
    const double gamma = problem_.discount;
    if (!elimination_) {
      elimination_ = std::make_unique<Elimination>(S);
      table_.resize(S * A);
      policy_.resize(S * A);
      row_inverse_.resize(S * A);
      step_.resize(S);
      soft_maximum_.resize(soft_maximum_scratch(A));
    }
    lanes.unpack(q_.data(), S, A, table_.data());
    lanes.unpack(inverse_sum_.data(), S, A, row_inverse_.data());
    kernels().soft_maximum({S, A, table_.data(), problem_.log_reference, problem_.temperature,
                            step_.data(), policy_.data(), nullptr, nullptr, soft_maximum_.data()});
    for (Index s = 0; s < S; ++s) {
      double stopping = 0.0;
      double* const weight = table_.data() + s * A;
      for (Index a = 0; a < A; ++a) {
        weight[a] = gamma * (policy_[s * A + a] * row_inverse_[s * A + a]);
        if (row_inverse_[s * A + a] == 0.0) stopping += policy_[s * A + a];
      }
      std::fill(elimination_->row(s), elimination_->row(s) + S, 0.0);
      model_->policy_row(s, weight, elimination_->row(s));
      elimination_->defect()[s] = (1.0 - gamma) + gamma * stopping;
    }
    elimination_->factor(alone_, interrupt_);
    const double constant = (1.0 - gamma) * certificate_.c;
    const double middle =
        certificate_.continues ? 0.5 * (certificate_.low + certificate_.high) : 0.0;
    for (Index s = 0; s < S; ++s)
      step_[s] = ((image_[s] - (value_[s] - centre_)) - constant) - middle;
    elimination_->solve(step_.data(), false);
    for (Index s = 0; s < S; ++s) value_[s] = (value_[s] - centre_) + step_[s];
    std::fill(value_.begin() + S, value_.end(), value_[S - 1]);
    const auto ends = std::minmax_element(value_.begin(), value_.begin() + S);
    certificate_.c += middle / (1.0 - gamma);
    take(*ends.first, *ends.second);
  }

  // ---- single precision -------------------------------------------------------------------------

  static constexpr double kEpsSingle = std::numeric_limits<float>::epsilon();

  double noise_single() const { return 2.0 * kEpsSingle * certificate_.scale(); }

  bool single_pays(const double* initial) {
    if (sizeof(Real) != 4 || request_.method > 1 || request_.max_iterations == 1) return false;
    // 0/0 and overflow await temperatures near the ends of single precision's range.
    if (!(problem_.temperature > 1e-30 && problem_.temperature < 1e30)) return false;
    if (!initial) return true;
    if (!sweep() || certificate_.half_span() <= 64.0 * noise_single()) {
      --passes_;  // this sweep is made again, as the first of `iterate`
      return false;
    }
    accept_sweep();
    return true;
  }

  // Value iteration until single precision has nothing more to give.
  void iterate_single() {
    if constexpr (sizeof(Real) == 4) {
      single_.resize(2 * entries_ + (problem_.log_reference ? entries_ : 0) + 3 * value_.size());
      float* const scale = single_.data();
      float* const q = scale + entries_;
      float* value = q + entries_;
      float* image = value + value_.size();
      float* const w = image + value_.size();
      float* const mu = problem_.log_reference ? w + value_.size() : nullptr;
      std::transform(scale_.begin(), scale_.end(), scale, to_single);
      if (mu) std::transform(log_reference_.begin(), log_reference_.end(), mu, to_single);
      if (!at_zero_)
        std::transform(value_.begin(), value_.end(), value,
                       [this](double v) { return to_single(v - centre_); });
      float centre = 0.0f;
      const Certificate before = certificate_;
      const double centre_before = centre_;
      const bool was_zero = at_zero_;
      bool first = at_zero_;
      const Index given = request_.max_iterations;
      double previous = kInf;
      for (;;) {
        const double constant = (1.0 - problem_.discount) * certificate_.c;
        extent_ = lane_kernels<Real>().sweep_single(
            {states_, actions_, transition_.data(), reward_.data(), scale, mu,
             static_cast<float>(problem_.temperature), first ? nullptr : value, centre,
             static_cast<float>(constant), image, q, w});
        if (!first) ++passes_;
        first = false;
        certificate_.low = extent_.low;
        certificate_.high = extent_.high;
        if (!extent_.finite || !std::isfinite(certificate_.c)) {  // once more in double precision
          certificate_ = before;
          centre_ = centre_before;
          at_zero_ = was_zero;
          return;
        }
        const double half = certificate_.half_span(), noise = noise_single();
        certificate_.c = certificate_.discount * certificate_.c + certificate_.shift();
        std::swap(value, image);
        take(extent_.least, extent_.most);
        centre = static_cast<float>(centre_);
        certificate_.c += certificate_.continues ? static_cast<double>(centre) - centre_ : 0.0;
        const double target = std::max(certificate_.target(), noise);
        if (half <= target || (half > 0.9 * previous && half <= 16.0 * noise)) break;
        if (given > 0 && passes_ + 1 >= given) break;
        if (passes_ >= 2 && request_.method == 0 && newton_pays(half, half / previous, noise))
          break;
        if (passes_ >= kMostSingle) break;
        previous = half;
      }
      std::transform(value, value + value_.size(), value_.begin(),
                     [](float x) { return static_cast<double>(x); });
      centre_ = static_cast<double>(centre);
    }
  }
  static constexpr Index kMostSingle = 1000;
  static float to_single(double x) { return static_cast<float>(x); }

  // ---- what pays --------------------------------------------------------------------------------

  // Whether Newton's method costs less than the sweeps still needed at this rate of contraction,
  // those above `noise` in single precision. Nanoseconds on one core of an AVX-512 machine.
  bool newton_pays(double half, double rate, double noise) const {
    const double target = certificate_.target();
    if (half <= target) return false;
    if (!(rate < 1.0)) return true;
    const double E = static_cast<double>(entries_), S = static_cast<double>(states_);
    const double A = static_cast<double>(actions_);
    const double single = 0.012 * E * S + 0.25 * E + 30.0, sweep = 0.035 * E * S + E + 75.0;
    const double newton =
        sweep + 0.03 * S * S * S + 2.5 * S * S + 0.08 * S * S * A + 4.0 * S * A + 700.0;
    const double decade = -1.0 / std::log(rate);  // sweeps by which the half-span falls e-fold
    const double middle = std::min(half, std::max(noise, target));
    const double sweeps = decade * (noise < half ? std::log(half / middle) * single +
                                                       std::log(middle / target) * sweep
                                                 : std::log(half / target) * sweep);
    // Its error is squared at each step, in units of τ; it takes about three steps to get there.
    const double unit = problem_.temperature;
    const double steps =
        half > 0.1 * unit
            ? 3.0
            : std::max(1.0, std::ceil(std::log2(std::log(unit / target) / std::log(unit / half))));
    return sweeps > steps * newton;
  }

  const Solve& request_;
  Team& alone_;
  Interrupt& interrupt_;
  Index states_, actions_, width_, entries_;
  std::vector<Real> transition_, reward_;                        // packed
  std::vector<double> inverse_sum_, scale_, log_reference_, q_;  // packed
  std::vector<double> value_, image_, w_, scratch_;
  std::vector<float> single_;

  const Model* model_ = nullptr;
  Problem<Real> problem_{};
  Defect transition_defect_;
  LaneProblem packed_{};
  Certificate certificate_;
  Extent extent_{};
  double centre_ = 0.0;
  bool at_zero_ = true;
  Index passes_ = 0, products_ = 0;

  std::unique_ptr<Elimination> elimination_;
  std::vector<double> table_, policy_, row_inverse_, step_, soft_maximum_;
};

}  // namespace birl
