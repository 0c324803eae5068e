// The whole fixed point of a small problem (cpu/isa/packed.h): value iteration in single precision
// as far as it carries, then in double, and Newton's method with elimination where sweeps contract
// slowly.
#pragma once

#include <memory>
#include <vector>

#include "core/control.h"
#include "cpu/isa/packed.h"
#include "cpu/solvers/elimination.h"
#include "cpu/solvers/refinement.h"
#include "cpu/solvers/solution.h"
#include "cpu/support/aligned.h"

namespace birl {

template <class Model>
class PackedSolver {
  using Real = typename Model::Real;

 public:
  // P packed and a problem's tables should stay in a core's second-level cache.
  static bool fits(Index states, Index actions) {
    constexpr Index kLargest = 128, kBytes = 1 << 20;
    return states <= kLargest && padded(states, packed_routines<Real>().width) * states * actions <=
                                     kBytes / static_cast<Index>(sizeof(Real));
  }

  PackedSolver(const Solve& request, Team& alone, Interrupt& interrupt, Index states, Index actions)
      : request_(request),
        alone_(alone),
        interrupt_(interrupt),
        states_(states),
        actions_(actions),
        width_(packed_routines<Real>().width),
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
        single_(sizeof(Real) == 4 && request.max_iterations != 1 &&
                (request.method == Method::kAuto || request.method == Method::kValueIteration)),
        single_scale_(single_ ? entries_ : 0),
        single_reference_(single_scale_.size()),
        single_work_(single_ ? entries_ + 3 * value_.size() : 0) {}

  static constexpr Kernel kKernel = Kernel::kCpuPacked;

  // Packs a transition, and finds the first thing wrong with it.
  void take(const Model& model) {
    model_ = &model;
    transition_defect_ = {};
    ahead_ = 0;
    pack(model);
    const bool checked = request_.validate != Rigour::kOff;
    const bool sound = packed_routines<Real>().inverse_row_sums(
        transition_.data(), states_, actions_, row_sum_tolerance(sizeof(Real) == 8, states_),
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
    // The loops of cpu/isa/packed.h want 1/τ.
    if (!has_inverse(problem_.temperature)) {
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
    outcome = control_.outcome();
    const bool ended = outcome.status == Status::kConverged || outcome.status == Status::kStagnated;
    if (ended && drowns(control_, image_.data(), states_) &&
        refined(control_.rounding(), outcome.offset, image_.data(), out, outcome))
      return {};
    packed_routines<Real>().result({states_, actions_, q_.data(), image_.data(), reference(),
                                    problem_.temperature, outcome.offset, out.value, out.relative,
                                    out.q, out.advantage, out.policy, out.log_policy,
                                    scratch_.data()});
    if (overflows(control_, problem, out, states_ * actions_)) outcome.status = Status::kNonFinite;
    return {};
  }

 private:
  Defect pack(const Problem<Real>& problem) {
    problem_ = problem;
    packed_ = packed_routines<Real>().pack_problem(
        problem.reward, problem.log_reference, states_, actions_, inverse_sum_.data(),
        problem.discount, reward_.data(), scale_.data(), log_reference_.data(),
        single_ ? single_scale_.data() : nullptr, single_reference_.data());
    const bool suspicious = !packed_.finite || problem.log_reference ||
                            !(problem.discount >= 0.0 && problem.discount < 1.0) ||
                            !(problem.temperature > 0.0 && problem.temperature < kInf);
    if (!suspicious) return {};
    return problem_defect(look_at(problem, states_, actions_), problem, request_.validate);
  }

  bool refined(double coarse, double c, const double* value, const Tables<Real>& out,
               Outcome& outcome) {
    if (!refinement_) {
      refinement_ = std::make_unique<Refinement<Model>>(*model_, request_, alone_, interrupt_);
      row_inverse_.resize(states_ * actions_);
    }
    packed_routines<Real>().unpack(inverse_sum_.data(), states_, actions_, row_inverse_.data());
    return refinement_->run(*model_, problem_, row_inverse_.data(), control_, coarse, c, value,
                            nullptr, out, outcome);
  }

  const double* reference() const {
    return problem_.log_reference ? log_reference_.data() : nullptr;
  }

  template <class R>
  void pack(const DenseTransition<R>& model) {
    packed_routines<Real>().pack_transition(model.values, states_, actions_, transition_.data());
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
    control_ = {};
    control_.pose(request_, problem_.discount, problem_.temperature, states_, actions_,
                  sizeof(Real) == 8);
    control_.count_additions(0.5 * static_cast<double>(states_) + 2.0);  // two partial sums
    control_.largest_reward = packed_.largest_reward;
    control_.largest_reference = packed_.largest_reference;
    control_.continues = packed_.continues;
    control_.means = means();
    if (request_.method == Method::kNewton) control_.mode = Mode::kElimination;
    if (initial) {
      control_.at_zero = false;
      for (std::size_t s = 0; s < value_.size(); ++s)
        value_[s] = control_.start(initial[std::min<Index>(static_cast<Index>(s), states_ - 1)]);
      const auto ends = std::minmax_element(value_.begin(), value_.end());
      control_.centre_start(*ends.first, *ends.second);
    }
    phase_ = single_ && !initial ? kSingle : kDouble;
    warm_ = single_ && initial;
  }

  // Nanoseconds on one core of an AVX-512 machine.
  Means means() const {
    const double E = static_cast<double>(entries_), S = static_cast<double>(states_);
    const double A = static_cast<double>(actions_);
    Means means;
    means.elimination = true;
    means.coarse_sweep = 0.012 * E * S + 0.25 * E + 30.0;
    means.sweep = 0.035 * E * S + E + 75.0;
    means.elimination_step =
        means.sweep + 0.022 * S * S * S + 1.2 * S * S + 0.08 * S * S * A + 4.0 * S * A + 700.0;
    return means;
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

  // Whether that was the end. The vector for W is value − middle.
  bool sweep_double() {
    fetch_ahead();
    const double constant = (1.0 - problem_.discount) * control_.c;
    control_.take(packed_routines<Real>().sweep(
        {states_, actions_, transition_.data(), reward_.data(), scale_.data(), reference(),
         problem_.temperature, control_.at_zero ? nullptr : value_.data(), control_.middle,
         constant, image_.data(), q_.data(), w_.data()}));
    const Step step = control_.next();
    if (step == Step::kStop) return true;
    if (step == Step::kImprove) {
      newton();
    } else {
      value_.swap(image_);
      control_.accept_sweep();
      // Single precision is no loss where the start was not that good; a last sweep is in double.
      if (warm_ && control_.half_span() > 16.0 * single_noise() &&
          !control_.used_up(control_.passes + 1))
        to_single();
    }
    warm_ = false;
    return false;
  }

  // W := W + x with (I − γP_π) x = δ less the certificate's share.
  void newton() {
    const PackedRoutines<Real>& routines = packed_routines<Real>();
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
    routines.unpack(q_.data(), S, A, table_.data());
    routines.unpack(inverse_sum_.data(), S, A, row_inverse_.data());
    dense_routines().soft_maximum({S, A, table_.data(), problem_.log_reference,
                                   problem_.temperature, step_.data(), policy_.data(), nullptr,
                                   nullptr, soft_maximum_.data()});
    for (Index s = 0; s < S; ++s)
      elimination_->set_row(*model_, s, policy_.data() + s * A, row_inverse_.data() + s * A, gamma,
                            table_.data());
    elimination_->factor(alone_, interrupt_);
    const double constant = (1.0 - gamma) * control_.c, middle = control_.middle;
    const double share = control_.step_share();
    for (Index s = 0; s < S; ++s)
      step_[s] = ((image_[s] - (value_[s] - middle)) - constant) - share;
    elimination_->solve(step_.data(), false);
    for (Index s = 0; s < S; ++s) value_[s] = (value_[s] - middle) + step_[s];
    std::fill(value_.begin() + S, value_.end(), value_[S - 1]);
    const auto ends = std::minmax_element(value_.begin(), value_.begin() + S);
    control_.accept_step(share, *ends.first, *ends.second);
  }

  // ---- single precision -------------------------------------------------------------------------

  // The next sweep of value iteration; on to double precision when this one has nothing more to
  // give.
  void sweep_single() {
    if constexpr (sizeof(Real) == 4) {
      const Index length = static_cast<Index>(value_.size());
      float* const value = single_work_.data() + (swapped_ ? length : 0);
      float* const image = single_work_.data() + (swapped_ ? 0 : length);
      float* const w = single_work_.data() + 2 * length;
      fetch_ahead();
      const double constant = (1.0 - problem_.discount) * control_.c;
      control_.take(packed_routines<Real>().sweep_single(
          {states_, actions_, transition_.data(), reward_.data(), single_scale_.data(),
           problem_.log_reference ? single_reference_.data() : nullptr,
           static_cast<float>(problem_.temperature), control_.at_zero ? nullptr : value,
           static_cast<float>(control_.middle), static_cast<float>(constant), image, w + length,
           w}));
      if (!control_.finite()) return start_double();
      swapped_ = !swapped_;
      if (control_.accept_single_sweep(single_noise())) return;
      std::transform(image, image + length, value_.begin(),
                     [](float x) { return static_cast<double>(x); });
      control_.previous = kInf;
      phase_ = kDouble;
    }
  }

  double single_noise() const {
    return 2.0 * std::numeric_limits<float>::epsilon() * control_.scale();
  }

  void to_single() {
    // A sweep in double writes fewer lanes than one in single reads.
    std::fill(value_.begin() + states_, value_.end(), value_[states_ - 1]);
    std::transform(value_.begin(), value_.end(), single_work_.begin(),
                   [](double x) { return static_cast<float>(x); });
    control_.round_middle();
    swapped_ = false;
    phase_ = kSingle;
  }

  // From the beginning, where single precision overflowed.
  void start_double() {
    start(nullptr);
    phase_ = kDouble;
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
  PackedProblem packed_{};
  enum { kSingle, kDouble } phase_ = kDouble;
  bool swapped_ = false;
  bool warm_ = false;  // a start was given, and may be too good for single precision
  Control control_;
  Index ahead_ = 0;  // bytes of the transition to come asked for already

  std::unique_ptr<Refinement<Model>> refinement_;
  std::unique_ptr<Elimination> elimination_;
  std::vector<double> table_, policy_, row_inverse_, step_, soft_maximum_;
};

}  // namespace birl
