// The whole fixed point of a small problem (cpu/isa/packed.h): value iteration in single precision
// as far as it carries, then in double, and Newton's method with elimination where sweeps contract
// slowly.
#pragma once

#include <memory>
#include <vector>

#include "cpu/isa/packed.h"
#include "cpu/solvers/certificate.h"
#include "cpu/solvers/elimination.h"
#include "cpu/solvers/outcome.h"
#include "cpu/solvers/refinement.h"
#include "cpu/support/aligned.h"

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
        scratch_(6 * width_ * actions),
        single_(sizeof(Real) == 4 && request.method <= 1 && request.max_iterations != 1),
        single_scale_(single_ ? entries_ : 0),
        single_reference_(single_scale_.size()),
        single_work_(single_ ? entries_ + 3 * value_.size() : 0) {}

  static constexpr Kernel kKernel = Kernel::kCpuLanes;

  // Packs a transition, and finds the first thing wrong with it.
  void take(const Model& model) {
    model_ = &model;
    transition_defect_ = {};
    ahead_ = 0;
    pack(model);
    const bool checked = request_.validate != Rigour::kOff;
    const bool sound = lane_kernels<Real>().inverse_row_sums(
        transition_.data(), states_, actions_, row_sum_tolerance<Real>(states_),
        request_.validate != Rigour::kStochastic, inverse_sum_.data());
    if (checked && !sound) {
      const Index rows = states_ * actions_;
      std::vector<double> sum(rows), least(rows);
      model.row_sums(0, rows, sum.data(), least.data());
      transition_defect_ = transition_defect(model, request_.validate, sum.data(), least.data());
    }
  }

  // The solution, or the first thing wrong with the input.
  Defect solve(const Problem<Real>& problem, const double* initial, const Tables<Real>& out,
               Outcome& outcome) {
    Defect defect = pack(problem);
    if (defect.status == Status::kConverged) defect = transition_defect_;
    if (defect.status != Status::kConverged) return defect;
    outcome = {};
    start(initial);
    // Of a subnormal τ there is no 1/τ, which the kernels of cpu/isa/packed.h want.
    if (!(1.0 / problem_.temperature < kInf)) {
      value_.assign(value_.size(), 0.0);
      if (refined(kInf, 0.0, value_.data(), out, outcome)) return {};
    }
    for (Index count = 1;; ++count) {
      if (phase_ == kSingle)
        sweep_single();
      else if (sweep_double())
        break;
      if (count % 64 == 0) interrupt_.check();
    }
    const double offset = certificate_.offset();
    const bool ended = status_ == Status::kConverged || status_ == Status::kStagnated;
    if (ended && certificate_.drowns(image_.data(), states_)) {
      outcome.status = status_;
      outcome.passes = passes_;
      if (refined(certificate_.rounding(), offset, image_.data(), out, outcome)) return {};
      status_ = outcome.status;
    }
    lane_kernels<Real>().result({states_, actions_, q_.data(), image_.data(), reference(),
                                 problem_.temperature, offset, out.value, out.relative, out.q,
                                 out.advantage, out.policy, out.log_policy, scratch_.data()});
    if (overflows(certificate_, problem, out, states_ * actions_)) status_ = Status::kNonFinite;
    outcome = {status_, certificate_.half_span(), certificate_.error_bound(), passes_, 0, offset};
    return {};
  }

 private:
  Defect pack(const Problem<Real>& problem) {
    problem_ = problem;
    packed_ = lane_kernels<Real>().pack_problem(
        problem.reward, problem.log_reference, states_, actions_, inverse_sum_.data(),
        problem.discount, reward_.data(), scale_.data(), log_reference_.data(),
        single_ ? single_scale_.data() : nullptr, single_reference_.data());
    const bool suspicious = !packed_.finite || problem.log_reference ||
                            !(problem.discount >= 0.0 && problem.discount < 1.0) ||
                            !(problem.temperature > 0.0 && problem.temperature < kInf);
    if (!suspicious) return {};
    return problem_defect(problem, request_.validate, states_, actions_);
  }

  bool refined(double coarse, double c, const double* value, const Tables<Real>& out,
               Outcome& outcome) {
    if (!refinement_) {
      refinement_ = std::make_unique<Refinement<Model>>(*model_, request_, alone_, interrupt_);
      row_inverse_.resize(states_ * actions_);
    }
    lane_kernels<Real>().unpack(inverse_sum_.data(), states_, actions_, row_inverse_.data());
    return refinement_->run(*model_, problem_, row_inverse_.data(), certificate_, coarse, c, value,
                            nullptr, out, outcome);
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

  void start(const double* initial) {
    certificate_ = Certificate(problem_.discount, problem_.temperature, actions_,
                               0.5 * static_cast<double>(states_) + 2.0,  // two partial sums
                               request_.tol);
    certificate_.underflow = kUnderflow<Real>;
    certificate_.sweep = request_.method == kSweep;
    certificate_.largest_reward = packed_.largest_reward;
    certificate_.largest_reference = packed_.largest_reference;
    certificate_.continues = packed_.continues;
    passes_ = 0;
    rate_ = 0.0;
    previous_ = kInf;
    progress_ = {};
    newton_ = request_.method == 2;
    newton_failed_ = false;
    switched_at_ = 0;
    at_zero_ = initial == nullptr;
    centre_ = 0.0;
    if (initial) {
      const double most = certificate_.largest_possible();
      for (std::size_t s = 0; s < value_.size(); ++s)
        value_[s] = within(initial[std::min<Index>(static_cast<Index>(s), states_ - 1)], most);
      const auto ends = std::minmax_element(value_.begin(), value_.end());
      take(*ends.first, *ends.second);
    }
    phase_ = single_ && !initial ? kSingle : kDouble;
    warm_ = single_ && initial;
  }

  // V = c + (value − centre): the middle of W is taken out where T commutes with constants.
  void take(double least, double most) {
    centre_ = certificate_.continues ? 0.5 * (least + most) : 0.0;
    certificate_.c = certificate_.continues ? certificate_.c + centre_ : 0.0;
    certificate_.least = least - centre_;
    certificate_.most = most - centre_;
    at_zero_ = false;
  }

  // Brings a piece of a transition to come into the second-level cache while this one is worked on.
  void fetch_ahead() {
    if constexpr (std::is_same<Model, DenseTransition<Real>>::value) {
      constexpr Index kLine = 64, kSweeps = 8;
      const Index bytes = states_ * actions_ * states_ * static_cast<Index>(sizeof(Real));
      const Index end = std::min(bytes, ahead_ + std::max<Index>(kLine, bytes / kSweeps));
      const char* const next = reinterpret_cast<const char*>(model_->values) + bytes;
      for (; ahead_ < end; ahead_ += kLine) __builtin_prefetch(next + ahead_, 0, 2);
    }
  }

  // ---- double precision -------------------------------------------------------------------------

  bool sweep_double() {
    fetch_ahead();
    const double constant = (1.0 - problem_.discount) * certificate_.c;
    extent_ = lane_kernels<Real>().sweep({states_, actions_, transition_.data(), reward_.data(),
                                          scale_.data(), reference(), problem_.temperature,
                                          at_zero_ ? nullptr : value_.data(), centre_, constant,
                                          image_.data(), q_.data(), w_.data()});
    certificate_.low = extent_.low;
    certificate_.high = extent_.high;
    certificate_.hands_out(extent_.least, extent_.most);
    const bool free = at_zero_;  // T0 needs no P, and is a better start than zero
    if (!free) ++passes_;
    if (!extent_.finite || !std::isfinite(certificate_.c)) return ends(Status::kNonFinite);
    if (certificate_.converged()) return ends(Status::kConverged);
    const double half = certificate_.half_span();
    const bool exhausted =
        progress_.exhausted(certificate_, newton_ ? 2 : certificate_.patience(1.0), !newton_);
    if (passes_ > 0 && exhausted)
      return ends(request_.tol > 0.0 ? Status::kStagnated : Status::kConverged);
    const Index given = request_.max_iterations;
    if (given > 0 ? passes_ >= given
                  : !newton_ && passes_ - switched_at_ >= certificate_.most_sweeps())
      return ends(Status::kMaxIterations);
    if (newton_ && passes_ - switched_at_ >= kMostNewton) {
      if (given == 0 && !certificate_.sweeps_end()) return ends(Status::kMaxIterations);
      newton_ = false;
      newton_failed_ = true;
      switched_at_ = passes_;
      progress_ = {};
    }
    if (previous_ < kInf) rate_ = half / previous_;
    previous_ = half;
    if (!newton_ && !newton_failed_ && request_.method == 0 && passes_ >= 2 &&
        half > certificate_.target() &&
        (progress_.at_rounding_level() || newton_pays(half, kInf))) {
      newton_ = true;
      switched_at_ = passes_;
    }
    if (newton_ && !free) {
      newton();
    } else {
      accept_sweep();
      // Single precision is no loss where the start was not that good; a last sweep is in double.
      if (warm_ && half > 16.0 * single_noise() && (given == 0 || passes_ + 2 <= given))
        to_single();
      warm_ = false;
    }
    return false;
  }

  bool ends(Status status) {
    status_ = status;
    return true;
  }

  void accept_sweep() {
    certificate_.c = certificate_.offset();
    value_.swap(image_);
    take(extent_.least, extent_.most);
  }

  // W := W + x with (I − γP_π) x = δ less the certificate's share. Where every row continues x
  // matters only up to a constant: the next sweep's middle finds it exactly.
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
    for (Index s = 0; s < S; ++s)
      elimination_->set_row(*model_, s, policy_.data() + s * A, row_inverse_.data() + s * A, gamma,
                            table_.data());
    elimination_->factor(alone_, interrupt_);
    const double constant = (1.0 - gamma) * certificate_.c;
    const double share = certificate_.step_share();
    for (Index s = 0; s < S; ++s)
      step_[s] = ((image_[s] - (value_[s] - centre_)) - constant) - share;
    elimination_->solve(step_.data(), false);
    for (Index s = 0; s < S; ++s) value_[s] = (value_[s] - centre_) + step_[s];
    std::fill(value_.begin() + S, value_.end(), value_[S - 1]);
    const auto ends = std::minmax_element(value_.begin(), value_.begin() + S);
    certificate_.c += share / (1.0 - gamma);
    take(*ends.first, *ends.second);
  }

  // ---- single precision -------------------------------------------------------------------------

  // The next sweep of value iteration; on to double precision when this one has nothing more to
  // give.
  void sweep_single() {
    if constexpr (sizeof(Real) == 4) {
      constexpr Index kMost = 1000;
      const Index length = static_cast<Index>(value_.size());
      float* const value = single_work_.data() + (swapped_ ? length : 0);
      float* const image = single_work_.data() + (swapped_ ? 0 : length);
      float* const w = single_work_.data() + 2 * length;
      fetch_ahead();
      const double constant = (1.0 - problem_.discount) * certificate_.c;
      extent_ = lane_kernels<Real>().sweep_single(
          {states_, actions_, transition_.data(), reward_.data(), single_scale_.data(),
           problem_.log_reference ? single_reference_.data() : nullptr,
           static_cast<float>(problem_.temperature), at_zero_ ? nullptr : value,
           static_cast<float>(centre_), static_cast<float>(constant), image, w + length, w});
      if (!extent_.finite || !std::isfinite(certificate_.c)) return start_double();
      if (!at_zero_) ++passes_;
      certificate_.low = extent_.low;
      certificate_.high = extent_.high;
      certificate_.hands_out(extent_.least, extent_.most);
      const double half = certificate_.half_span();
      const double noise = single_noise();
      if (previous_ < kInf) rate_ = half / previous_;
      certificate_.c = certificate_.offset();
      take(extent_.least, extent_.most);
      round_centre();
      swapped_ = !swapped_;
      const bool exhausted = half > 0.9 * previous_ && half <= 16.0 * noise;
      previous_ = half;
      if (half > std::max(certificate_.target(), noise) && !exhausted && passes_ < kMost &&
          !(request_.max_iterations > 0 && passes_ + 1 >= request_.max_iterations) &&
          !(passes_ % 8 == 6 && request_.method == 0 && newton_pays(half, noise)))
        return;
      std::transform(image, image + length, value_.begin(),
                     [](float x) { return static_cast<double>(x); });
      previous_ = kInf;
      phase_ = kDouble;
    }
  }

  double single_noise() const {
    return 2.0 * std::numeric_limits<float>::epsilon() * certificate_.scale();
  }

  void round_centre() {
    const double rounded = static_cast<double>(static_cast<float>(centre_));
    certificate_.c += rounded - centre_;
    centre_ = rounded;
  }

  void to_single() {
    // A sweep in double writes fewer lanes than one in single reads.
    std::fill(value_.begin() + states_, value_.end(), value_[states_ - 1]);
    std::transform(value_.begin(), value_.end(), single_work_.begin(),
                   [](double x) { return static_cast<float>(x); });
    round_centre();
    swapped_ = false;
    phase_ = kSingle;
  }

  // From the beginning, where single precision overflowed.
  void start_double() {
    start(nullptr);
    phase_ = kDouble;
  }

  // ---- what pays --------------------------------------------------------------------------------

  // Whether Newton's method costs less than the sweeps still needed at the measured contraction,
  // those above `noise` in single precision. Nanoseconds on one core of an AVX-512 machine.
  bool newton_pays(double half, double noise) const {
    const double target = certificate_.target();
    if (half <= target) return false;
    if (!(rate_ < 1.0)) return true;
    const double E = static_cast<double>(entries_), S = static_cast<double>(states_);
    const double A = static_cast<double>(actions_);
    const double single = 0.012 * E * S + 0.25 * E + 30.0, sweep = 0.035 * E * S + E + 75.0;
    const double newton =
        sweep + 0.022 * S * S * S + 1.2 * S * S + 0.08 * S * S * A + 4.0 * S * A + 700.0;
    const double decade = -1.0 / std::log(rate_);  // sweeps by which the half-span falls e-fold
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
  Aligned<Real> transition_, reward_;                        // packed
  Aligned<double> inverse_sum_, scale_, log_reference_, q_;  // packed
  Aligned<double> value_, image_, w_, scratch_;
  const bool single_;  // sweeps in single precision come first
  Aligned<float> single_scale_, single_reference_, single_work_;

  const Model* model_ = nullptr;
  Problem<Real> problem_{};
  Defect transition_defect_;
  LaneProblem packed_{};
  enum { kSingle, kDouble } phase_ = kDouble;
  bool newton_ = false, newton_failed_ = false, swapped_ = false;
  bool warm_ = false;  // a start was given, and may be too good for single precision
  Certificate certificate_;
  Progress progress_;
  Status status_ = Status::kConverged;
  Extent extent_{};
  double centre_ = 0.0;
  double previous_ = kInf;  // half-span of the sweep before
  double rate_ = 0.0;       // at which the half-span fell in the last sweep that told
  bool at_zero_ = true;
  Index passes_ = 0, switched_at_ = 0;
  Index ahead_ = 0;  // bytes of the transition to come asked for already

  std::unique_ptr<Refinement<Model>> refinement_;
  std::unique_ptr<Elimination> elimination_;
  std::vector<double> table_, policy_, row_inverse_, step_, soft_maximum_;
};

}  // namespace birl
