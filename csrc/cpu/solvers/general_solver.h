// The fixed point of a problem of any size, dense or sparse: Newton's method with a Krylov inner
// solve, modified policy iteration, value iteration, or Newton with elimination as a last resort.
#pragma once

#include <memory>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "core/control.h"
#include "cpu/model/sweep.h"
#include "cpu/solvers/policy_system_solver.h"
#include "cpu/solvers/refinement.h"
#include "cpu/solvers/solution.h"

namespace birl {

// Solves one problem after another on transitions of one shape; keeps its memory between them.
//
// P is read once per pass and the first pass also sums its rows: T0 needs no P and is a better
// start than zero, so that pass already is a useful sweep. Until then every row is taken to
// continue; if one turns out to end, the problem starts again.
template <class Model>
class GeneralSolver {
  using Real = typename Model::Real;
  // A dense policy matrix is kept in P's own precision: it only has to give a good Newton step,
  // the certificate is always computed from P.
  using System = PolicySystem<Model, Real>;

 public:
  static constexpr Kernel kKernel =
      std::is_same<Model, DenseTransition<Real>>::value ? Kernel::kCpuRows : Kernel::kCpuCsr;

  GeneralSolver(const Solve& request, const PolicyPattern* pattern, Team& team,
                Interrupt& interrupt)
      : request_(request), pattern_(pattern), team_(team), interrupt_(interrupt) {}

  void take(const Model& model) {
    model_ = &model;
    const Index rows = model.states * model.actions;
    inverse_sum_.assign(rows, 1.0);
    sum_.resize(rows);
    least_.resize(rows);
    summed_ = checked_ = false;
    defect_ = {};
  }

  // The solution, or the first thing wrong with the input.
  Defect solve(const Problem<Real>& problem, const double* initial, const Tables<Real>& out,
               Outcome& outcome) {
    found_ = look_at(problem, model_->states, model_->actions);
    const Defect defect = problem_defect(found_, problem, request_.validate);
    if (defect.status != Status::kConverged) return defect;
    problem_ = problem;
    initial_ = initial;
    if (defect_.status == Status::kConverged) {
      begin();
      iterate();
      outcome = control_.outcome();
    }
    if (defect_.status == Status::kConverged && !refined(out, outcome)) {
      write(outcome.offset, out);
      if (overflows(control_, problem, out, model_->states * model_->actions))
        outcome.status = Status::kNonFinite;
    }
    return defect_;
  }

 private:
  // Everything comes from the last sweep; P is not read again.
  void write(double offset, const Tables<Real>& out) {
    const Index S = model_->states, A = model_->actions;
    log_policy_.resize(S * A);
    dense_routines().soft_maximum({S, A, q_.data(), problem_.log_reference, problem_.temperature,
                                   next_.data(), policy_.data(), log_policy_.data(), nullptr,
                                   scratch_[0].soft_maximum.data()});
    hand_out(problem_, S, A, q_.data(), next_.data(), policy_.data(), log_policy_.data(), offset,
             out);
  }

  // Hands out what sweeps that round each state by itself find from here, where that matters.
  bool refined(const Tables<Real>& out, Outcome& outcome) {
    const bool ended = outcome.status == Status::kConverged || outcome.status == Status::kStagnated;
    if (!ended || !drowns(control_, next_.data(), model_->states)) return false;
    if (!refinement_)
      refinement_ = std::make_unique<Refinement<Model>>(*model_, request_, team_, interrupt_);
    const auto evaluate = [&](const std::vector<double>& policy, std::vector<double>& x) {
      form(policy);
      system_->sum_of_products(control_, x);
    };
    const bool done =
        refinement_->run(*model_, problem_, inverse_sum_.data(), control_, control_.rounding(),
                         outcome.offset, next_.data(), evaluate, out, outcome);
    outcome.products = control_.products;
    return done;
  }

  void begin() {
    const Index S = model_->states, A = model_->actions, rows = S * A;
    if (scratch_.empty()) scratch_.assign(team_.size(), SweepScratch<Model>(*model_));
    q_.resize(rows);
    policy_.resize(rows);
    w_.assign(S, 0.0);
    next_.resize(S);
    delta_.resize(S);
    control_ = {};
    control_.pose(request_, problem_.discount, problem_.temperature, S, A, sizeof(Real) == 8);
    control_.count_additions(model_->additions());
    control_.largest_reward = found_.largest_reward;
    control_.largest_reference = found_.largest_reference;
    control_.means.elimination = S <= kDirectLimit;
    control_.means.krylov = true;
    control_.mode = request_.method == Method::kSweep  ? Mode::kValueIteration
                    : request_.method != Method::kAuto ? static_cast<Mode>(request_.method)
                    : kKernel == Kernel::kCpuRows      ? Mode::kKrylov
                                                       : Mode::kSeries;
    for (Index row = 0; row < rows; ++row)
      if (inverse_sum_[row] == 0.0 && available(row)) control_.continues = false;
    expected_ = kInf;
    system_.reset();
    formed_ = false;
    if (initial_) {
      control_.at_zero = false;
      std::transform(initial_, initial_ + S, w_.begin(),
                     [&](double start) { return control_.start(start); });
      const auto ends = std::minmax_element(w_.begin(), w_.end());
      control_.centre_start(*ends.first, *ends.second);
      take_middle_off();
    }
  }

  bool available(Index row) const { return !masked(problem_.log_reference, row); }

  void take_middle_off() {
    for (double& e : w_) e -= control_.middle;
  }

  // q', tw and δ at (c, W). With the policy also that and P_π while P's rows are in cache.
  void sweep(bool with_policy) {
    const Model& model = *model_;
    const Index S = model.states, A = model.actions, chunk = model.chunk();
    const Index chunks = (S + chunk - 1) / chunk;
    const double constant = (1.0 - problem_.discount) * control_.c;
    const bool sum = !summed_ && !control_.at_zero;
    if (with_policy) make_system();
    ranges_.resize(chunks);
    const double work = 2.0 * model.work() + 40.0 * static_cast<double>(S * A);
    const auto one = [&](Index item, int worker) {
      SweepScratch<Model>& mine = scratch_[worker];
      const Index s0 = item * chunk, s1 = std::min(S, s0 + chunk);
      if (control_.at_zero)
        std::copy(problem_.reward + s0 * A, problem_.reward + s1 * A, q_.data() + s0 * A);
      else
        read_rows(s0, s1, sum, mine.product.data());
      dense_routines().soft_maximum({s1 - s0, A, q_.data() + s0 * A, reference(s0),
                                     problem_.temperature, next_.data() + s0,
                                     with_policy ? policy_.data() + s0 * A : nullptr, nullptr,
                                     nullptr, mine.soft_maximum.data()});
      ranges_[item] = dense_routines().difference(s1 - s0, next_.data() + s0, w_.data() + s0,
                                                  constant, delta_.data() + s0);
      if (with_policy) form(policy_, s0, s1, worker);
    };
    // Neighbouring chunks in one piece, so that what comes next is known and can be fetched ahead.
    const Index length = std::max<Index>(1, chunks / (8 * team_.size()));
    team_.run((chunks + length - 1) / length, work, [&](Index piece, int worker) {
      for (Index item = piece * length; item < std::min(chunks, (piece + 1) * length); ++item)
        one(item, worker);
    });
    control_.take(std::accumulate(ranges_.begin(), ranges_.end(), SweepRange(), SweepRange::join));
    summed_ = summed_ || sum;
    formed_ = with_policy;
  }

  // q' for states [s0, s1); one reading of their rows of P, their sums with it if `sum`.
  void read_rows(Index s0, Index s1, bool sum, double* product) {
    const Index row0 = s0 * model_->actions, row1 = s1 * model_->actions;
    double* const inverse = inverse_sum_.data() + row0;
    if (sum) {
      model_->products_and_sums(row0, row1, w_.data(), product, sum_.data() + row0,
                                least_.data() + row0);
      std::transform(sum_.data() + row0, sum_.data() + row1, inverse, inverse_row_sum);
    } else {
      model_->products(row0, row1, w_.data(), product);
    }
    q_values(problem_, product, inverse, row0, row1, q_.data() + row0);
  }

  const double* reference(Index s) const {
    return problem_.log_reference ? problem_.log_reference + s * model_->actions : nullptr;
  }

  void make_system() {
    if (system_) return;
    if (!matrix_) matrix_ = make_policy_matrix<Model, Real>(*model_, pattern_, false);
    rows_.assign(team_.size(), std::vector<double>(model_->states));
    system_.emplace(*model_, *matrix_, elimination_, problem_.discount, PolicySystemOptions{},
                    team_, interrupt_);
  }

  // The rows of P_π of states [s0, s1).
  void form(const std::vector<double>& policy, Index s0, Index s1, int worker) {
    system_->form(s0, s1, inverse_sum_.data(), policy.data(), rows_[worker].data());
  }

  void form(const std::vector<double>& policy) {
    make_system();
    const Index S = model_->states, chunk = model_->chunk();
    team_.run((S + chunk - 1) / chunk, 2.0 * model_->work(), [&](Index item, int worker) {
      form(policy, item * chunk, std::min(S, (item + 1) * chunk), worker);
    });
  }

  // ---- iteration --------------------------------------------------------------------------------

  void iterate() {
    for (;;) {
      interrupt_.check();
      sweep(control_.mode != Mode::kValueIteration && !control_.at_zero &&
            !(expected_ <= control_.target()));
      if (summed_ && !checked_) {
        checked_ = true;
        if (request_.validate != Rigour::kOff)
          defect_ = transition_defect(*model_, request_.validate, sum_.data(), least_.data());
        if (defect_.status != Status::kConverged) return;
        if (some_row_ends()) {  // as if known from the start: problems that follow know it
          begin();
          continue;
        }
      }
      // T0 has seen nothing of P, neither what is wrong with it nor whether all rows continue.
      const Step step = control_.at_zero ? Step::kSweep : control_.next();
      if (step == Step::kStop) return;
      if (step == Step::kSweep)
        accept_sweep();
      else
        improve();
    }
  }

  bool some_row_ends() const {
    for (Index row = 0; row < model_->states * model_->actions; ++row)
      if (sum_[row] == 0.0 && available(row)) return true;
    return false;
  }

  void accept_sweep() {
    control_.accept_sweep();
    w_ = next_;
    take_middle_off();
  }

  // W := W + x with (I − γP_π) x = δ less the share that c takes.
  void improve() {
    const Index S = model_->states, A = model_->actions;
    if (!formed_) {  // the last sweep was expected to be that: its policy is not known yet
      dense_routines().soft_maximum({S, A, q_.data(), problem_.log_reference, problem_.temperature,
                                     next_.data(), policy_.data(), nullptr, nullptr,
                                     scratch_[0].soft_maximum.data()});
      form(policy_);
    }
    const double half = control_.half_span();
    const double share =
        control_.mode == Mode::kElimination ? control_.step_share() : control_.delta_middle();
    std::vector<double> x(S);
    for (Index s = 0; s < S; ++s) x[s] = delta_[s] - share;
    const double left = system_->improve(control_, x);
    SweepRange ahead;  // of γPx ≈ x − δ, and of W
    for (Index s = 0; s < S; ++s) {
      w_[s] += x[s];
      ahead.add(x[s] - (delta_[s] - share), w_[s]);
    }
    // What is left of the linear system, and T's curvature.
    const double range = control_.continues ? ahead.high - ahead.low
                                            : std::max(std::abs(ahead.low), std::abs(ahead.high));
    expected_ = left * half + range * range / (2.0 * problem_.temperature);
    control_.accept_step(share, ahead.least, ahead.most);
    take_middle_off();
  }

  const Solve& request_;
  const PolicyPattern* pattern_;
  Team& team_;
  Interrupt& interrupt_;

  const Model* model_ = nullptr;
  Problem<Real> problem_{};
  const double* initial_ = nullptr;
  Control control_;  // V = c + W
  Findings found_;
  Defect defect_;
  bool summed_ = false, checked_ = false, formed_ = false;
  std::vector<double> q_, policy_, log_policy_;  // q' until the end, then Q − V
  std::vector<double> w_, next_, delta_, inverse_sum_, sum_, least_;
  std::vector<SweepRange> ranges_;
  std::vector<SweepScratch<Model>> scratch_;
  std::vector<std::vector<double>> rows_;
  std::unique_ptr<typename System::Matrix> matrix_;
  std::optional<System> system_;
  std::unique_ptr<Refinement<Model>> refinement_;
  std::unique_ptr<Elimination> elimination_;

  double expected_ = kInf;  // half-span after the step just made
};

}  // namespace birl
