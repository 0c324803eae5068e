// The fixed point of a problem of any size, dense or sparse: Newton's method with a Krylov inner
// solve, modified policy iteration, value iteration, or Newton with elimination as a last resort.
#pragma once

#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include "core/control.h"
#include "cpu/entry/policy_solve.h"
#include "cpu/model/sweep.h"
#include "cpu/solvers/elimination.h"
#include "cpu/solvers/krylov.h"
#include "cpu/solvers/outcome.h"
#include "cpu/solvers/policy_matrix.h"
#include "cpu/solvers/refinement.h"

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
  using Matrix = typename PolicyMatrixOf<Model, Real>::type;

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
    const Defect defect = problem_defect(found_, problem, request_.validate, model_->actions);
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
    kernels().soft_maximum({S, A, q_.data(), problem_.log_reference, problem_.temperature,
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
      for (std::size_t row = 0; row < policy.size(); ++row)
        weight_[row] = policy[row] * inverse_sum_[row];
      form_matrix();
      sum_of_products(x, control_.means.most);
    };
    weight_.resize(inverse_sum_.size());
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
    control_.mode = request_.method == kSweep     ? Mode::kValueIteration
                    : request_.method != 0        ? static_cast<Mode>(request_.method)
                    : kKernel == Kernel::kCpuRows ? Mode::kKrylov
                                                  : Mode::kSeries;
    for (Index row = 0; row < rows; ++row)
      if (inverse_sum_[row] == 0.0 && available(row)) control_.continues = false;
    expected_ = kInf;
    if (initial_) {
      control_.at_zero = false;
      std::transform(initial_, initial_ + S, w_.begin(),
                     [&](double start) { return control_.start(start); });
      const auto ends = std::minmax_element(w_.begin(), w_.end());
      control_.centre(*ends.first, *ends.second);
      take_middle_off();
    }
    weight_ready_ = matrix_ready_ = false;
  }

  bool available(Index row) const {
    return !(problem_.log_reference && problem_.log_reference[row] == -kInf);
  }

  void take_middle_off() {
    for (double& e : w_) e -= control_.middle;
  }

  // q', tw and δ at (c, W). With `form`, also the policy and P_π while P's rows are in cache.
  void sweep(bool form) {
    const Model& model = *model_;
    const Index S = model.states, A = model.actions, chunk = model.chunk();
    const Index chunks = (S + chunk - 1) / chunk;
    const double constant = (1.0 - problem_.discount) * control_.c;
    const bool sum = !summed_ && !control_.at_zero;
    if (form) make_matrix();
    ranges_.resize(chunks);
    const double work = 2.0 * model.work() + 40.0 * static_cast<double>(S * A);
    const auto one = [&](Index item, int worker) {
      SweepScratch<Model>& mine = scratch_[worker];
      const Index s0 = item * chunk, s1 = std::min(S, s0 + chunk);
      if (control_.at_zero)
        std::copy(problem_.reward + s0 * A, problem_.reward + s1 * A, q_.data() + s0 * A);
      else
        read_rows(s0, s1, sum, mine.product.data());
      kernels().soft_maximum({s1 - s0, A, q_.data() + s0 * A, reference(s0), problem_.temperature,
                              next_.data() + s0, form ? policy_.data() + s0 * A : nullptr, nullptr,
                              nullptr, mine.soft_maximum.data()});
      ranges_[item] = kernels().difference(s1 - s0, next_.data() + s0, w_.data() + s0, constant,
                                           delta_.data() + s0);
      if (form) form_rows(s0, s1, worker);
    };
    // Neighbouring chunks in one piece, so that what comes next is known and can be fetched ahead.
    const Index length = std::max<Index>(1, chunks / (8 * team_.size()));
    team_.run((chunks + length - 1) / length, work, [&](Index piece, int worker) {
      for (Index item = piece * length; item < std::min(chunks, (piece + 1) * length); ++item)
        one(item, worker);
    });
    SweepRange found;
    for (const Range& part : ranges_)
      found = SweepRange::join(found, {part.low, part.high, part.least, part.most, part.finite});
    control_.take(found);
    summed_ = summed_ || sum;
    weight_ready_ = matrix_ready_ = form;
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

  // π/σ for states [s0, s1), and their rows of P_π.
  void form_rows(Index s0, Index s1, int worker) {
    const Index A = model_->actions;
    for (Index row = s0 * A; row < s1 * A; ++row) weight_[row] = policy_[row] * inverse_sum_[row];
    matrix_->form_rows(*model_, weight_.data(), s0, s1, rows_[worker].data());
  }

  void make_matrix() {
    const Index S = model_->states;
    weight_.resize(S * model_->actions);
    if (matrix_) return;
    rows_.assign(team_.size(), std::vector<double>(S));
    if constexpr (std::is_same<Matrix, CsrPolicyMatrix>::value)
      matrix_ = std::make_unique<Matrix>(*pattern_);
    else
      matrix_ = std::make_unique<Matrix>(S);
  }

  // The policy of the last sweep, if that sweep was made without one.
  void make_weight() {
    if (weight_ready_) return;
    const Index S = model_->states, A = model_->actions;
    weight_.resize(S * A);
    std::vector<double> value(S);
    kernels().soft_maximum({S, A, q_.data(), problem_.log_reference, problem_.temperature,
                            value.data(), policy_.data(), nullptr, nullptr,
                            scratch_[0].soft_maximum.data()});
    for (Index row = 0; row < S * A; ++row) weight_[row] = policy_[row] * inverse_sum_[row];
    weight_ready_ = true;
  }

  void ensure_matrix() {
    if (matrix_ready_) return;
    make_weight();
    form_matrix();
    matrix_ready_ = true;
  }

  void form_matrix() {
    make_matrix();
    const Index S = model_->states, chunk = model_->chunk();
    team_.run((S + chunk - 1) / chunk, 2.0 * model_->work(), [&](Index item, int worker) {
      const Index s0 = item * chunk, s1 = std::min(S, s0 + chunk);
      matrix_->form_rows(*model_, weight_.data(), s0, s1, rows_[worker].data());
    });
  }

  // ---- iteration --------------------------------------------------------------------------------

  void iterate() {
    for (;;) {
      interrupt_.check();
      sweep(uses_matrix() && !control_.at_zero && !(expected_ <= control_.target()));
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

  bool uses_matrix() const {
    return control_.mode == Mode::kKrylov || control_.mode == Mode::kSeries;
  }

  bool some_row_ends() const {
    for (Index row = 0; row < model_->states * model_->actions; ++row)
      if (sum_[row] == 0.0 && available(row)) return true;
    return false;
  }

  void improve() {
    if (control_.mode == Mode::kElimination) return newton_direct();
    if (control_.mode == Mode::kKrylov) return newton_krylov();
    modified_policy();
  }

  void accept_sweep() {
    control_.accept_sweep();
    w_ = next_;
    take_middle_off();
  }

  // W := W + x.
  void accept_step(const std::vector<double>& x, double share) {
    double least = kInf, most = -kInf;
    for (std::size_t i = 0; i < w_.size(); ++i) {
      w_[i] += x[i];
      least = smaller(least, w_[i]);
      most = larger(most, w_[i]);
    }
    control_.accept_step(share, least, most);
    take_middle_off();
  }

  // δ without a share of the constants, which are eigenvectors where every row continues.
  std::vector<double> right_side(double share) const {
    std::vector<double> b = delta_;
    for (double& e : b) e -= share;
    return b;
  }

  void newton_direct() {
    const Index S = model_->states, A = model_->actions;
    const double gamma = problem_.discount;
    make_weight();
    if (!elimination_) elimination_ = std::make_unique<Elimination>(S);
    const Index chunk = model_->chunk();
    team_.run((S + chunk - 1) / chunk, 2.0 * model_->work(), [&](Index item, int) {
      std::vector<double> scaled(A);
      for (Index s = item * chunk; s < std::min(S, (item + 1) * chunk); ++s) {
        elimination_->set_row(*model_, s, policy_.data() + s * A, inverse_sum_.data() + s * A,
                              gamma, scaled.data());
      }
    });
    elimination_->factor(team_, interrupt_);
    const double share = control_.step_share();
    std::vector<double> x = right_side(share);
    elimination_->solve(x.data(), false);
    accept_step(x, share);
  }

  void newton_krylov() {
    ensure_matrix();
    const double half = control_.half_span(), share = control_.delta_middle();
    const std::vector<double> b = right_side(share);
    std::vector<double> x(b.size());
    const PolicyOperator<Matrix> op(*matrix_, problem_.discount, false, control_.continues, 1,
                                    team_, interrupt_);
    std::vector<double> deflated = b;
    if (control_.continues) op.remove_mean(deflated.data());
    const double size = norm2(deflated), wanted = size * control_.reduction();
    KrylovResult result =
        bicgstab(op, deflated, x, wanted, 200 + 4 * static_cast<Index>(control_.crossing()));
    control_.products += result.products;
    if (!(result.residual <= wanted)) {
      std::vector<double> rest(b.size());
      op(x, rest);
      for (std::size_t i = 0; i < rest.size(); ++i) rest[i] = deflated[i] - rest[i];
      result = gmres(op, std::move(rest), x, wanted, 400);
      control_.products += result.products;
      if (!(result.residual <= 0.5 * size)) control_.stalled = 4;  // Krylov is of no use here
    }
    // What is left of the linear system, and T's curvature over the spread of γPx ≈ x − δ.
    std::vector<double> ahead(x.size());
    std::transform(x.begin(), x.end(), b.begin(), ahead.begin(), std::minus<double>());
    const double range = 2.0 * spread(ahead);
    expected_ = result.residual / size * half + range * range / (8.0 * problem_.temperature);
    accept_step(x, share);
  }

  // Truncated policy evaluation Σ_j (γP_π)^j δ, 20 to 120 terms, until the terms' span is a tenth.
  void modified_policy() {
    ensure_matrix();
    const double share = control_.delta_middle();
    std::vector<double> x = right_side(share);
    sum_of_products(x, control_.means.fewest);
    accept_step(x, share);
  }

  // x := Σ_j (γP_π)^j x, at least so many terms.
  void sum_of_products(std::vector<double>& x, Index fewest) {
    const PolicyOperator<Matrix> op(*matrix_, problem_.discount, false, false, 1, team_,
                                    interrupt_);
    std::vector<double> term = x, next(term.size());
    const auto spread_of_term = [&] {
      Columns low, high;
      op.range(term.data(), low, high);
      return control_.continues ? high[0] - low[0] : std::max(std::abs(low[0]), std::abs(high[0]));
    };
    const double start = spread_of_term();
    for (Index j = 1; j <= control_.means.most; ++j) {
      op.accumulate(term.data(), next.data(), x.data());
      term.swap(next);
      ++control_.products;
      if (j % 10 != 0) continue;
      const double now = spread_of_term();
      if (j >= fewest && (now <= 0.1 * start || now <= 0.1 * control_.target())) break;
    }
  }

  double spread(const std::vector<double>& x) const {
    const auto ends = std::minmax_element(x.begin(), x.end());
    return control_.continues ? *ends.second - *ends.first
                              : std::max(std::abs(*ends.first), std::abs(*ends.second));
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
  bool summed_ = false, checked_ = false, weight_ready_ = false, matrix_ready_ = false;
  std::vector<double> q_, policy_, log_policy_;  // q' until the end, then Q − V
  std::vector<double> w_, next_, delta_, inverse_sum_, sum_, least_, weight_;
  std::vector<Range> ranges_;
  std::vector<SweepScratch<Model>> scratch_;
  std::vector<std::vector<double>> rows_;
  std::unique_ptr<Matrix> matrix_;
  std::unique_ptr<Refinement<Model>> refinement_;
  std::unique_ptr<Elimination> elimination_;

  double expected_ = kInf;  // half-span after the step just made
};

}  // namespace birl
