// The fixed point of a problem of any size, dense or sparse: Newton's method with a Krylov inner
// solve, modified policy iteration, value iteration, or Newton with elimination as a last resort.
#pragma once

#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/entry/policy_solve.h"
#include "cpu/model/sweep.h"
#include "cpu/solvers/certificate.h"
#include "cpu/solvers/elimination.h"
#include "cpu/solvers/krylov.h"
#include "cpu/solvers/outcome.h"
#include "cpu/solvers/policy_matrix.h"
#include "cpu/solvers/refinement.h"

namespace birl {

constexpr Index kDirectLimit = 2500;  // largest S whose S² matrix is eliminated as a last resort

enum class Mode : Index { kAuto, kValueIteration, kNewtonDirect, kNewtonKrylov, kModifiedPolicy };

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
    const Defect defect =
        problem_defect(problem, request_.validate, model_->states, model_->actions);
    if (defect.status != Status::kConverged) return defect;
    problem_ = problem;
    initial_ = initial;
    if (defect_.status == Status::kConverged) {
      begin();
      outcome = iterate();
    }
    if (defect_.status == Status::kConverged && !refined(out, outcome)) {
      outcome.offset = certificate_.offset();
      write(outcome.offset, out);
      if (overflows(certificate_, problem, out, model_->states * model_->actions))
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
    if (!ended || !certificate_.drowns(next_.data(), model_->states)) return false;
    if (!refinement_)
      refinement_ = std::make_unique<Refinement<Model>>(*model_, request_, team_, interrupt_);
    const auto evaluate = [&](const std::vector<double>& policy, std::vector<double>& x) {
      for (std::size_t row = 0; row < policy.size(); ++row)
        weight_[row] = policy[row] * inverse_sum_[row];
      form_matrix();
      products_ += sum_of_products(x, kMostProducts);
    };
    weight_.resize(inverse_sum_.size());
    const bool done = refinement_->run(*model_, problem_, inverse_sum_.data(), certificate_,
                                       certificate_.rounding(), certificate_.offset(), next_.data(),
                                       evaluate, out, outcome);
    outcome.products = products_;
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
    certificate_ =
        Certificate(problem_.discount, problem_.temperature, A, model_->additions(), request_.tol);
    certificate_.underflow = kUnderflow<Real>;
    certificate_.sweep = request_.method == kSweep;
    for (Index row = 0; row < rows; ++row) {
      const double reference = problem_.log_reference ? problem_.log_reference[row] : 0.0;
      if (reference == -kInf) continue;
      certificate_.largest_reward = std::max(certificate_.largest_reward,
                                             std::abs(static_cast<double>(problem_.reward[row])));
      certificate_.largest_reference =
          std::max(certificate_.largest_reference, std::abs(reference));
      certificate_.continues = certificate_.continues && inverse_sum_[row] != 0.0;
    }
    if (initial_) {
      const double most = certificate_.largest_possible();
      std::transform(initial_, initial_ + S, w_.begin(),
                     [&](double start) { return within(start, most); });
      centre();
    }
    from_zero_ = initial_ == nullptr;
    weight_ready_ = matrix_ready_ = false;
  }

  // W := W − middle, c := c + middle. Only where every row continues does T commute with constants.
  void centre() {
    const auto ends = std::minmax_element(w_.begin(), w_.end());
    certificate_.least = *ends.first;
    certificate_.most = *ends.second;
    if (!certificate_.continues) return;
    const double middle = 0.5 * (certificate_.least + certificate_.most);
    certificate_.c += middle;
    certificate_.least -= middle;
    certificate_.most -= middle;
    for (double& e : w_) e -= middle;
  }

  // q', tw and δ at (c, W). With `form`, also the policy and P_π while P's rows are in cache.
  void sweep(bool form) {
    const Model& model = *model_;
    const Index S = model.states, A = model.actions, chunk = model.chunk();
    const Index chunks = (S + chunk - 1) / chunk;
    const double constant = (1.0 - problem_.discount) * certificate_.c;
    const bool sum = !summed_ && !from_zero_;
    if (form) make_matrix();
    ranges_.resize(chunks);
    const double work = 2.0 * model.work() + 40.0 * static_cast<double>(S * A);
    const auto one = [&](Index item, int worker) {
      SweepScratch<Model>& mine = scratch_[worker];
      const Index s0 = item * chunk, s1 = std::min(S, s0 + chunk);
      if (from_zero_)
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
    certificate_.low = kInf;
    certificate_.high = -kInf;
    double least = kInf, most = -kInf;  // of the image
    finite_ = std::isfinite(certificate_.c);
    for (const Range& part : ranges_) {
      certificate_.low = std::min(certificate_.low, part.low);
      certificate_.high = std::max(certificate_.high, part.high);
      least = std::min(least, part.least);
      most = std::max(most, part.most);
      finite_ = finite_ && part.finite;
    }
    certificate_.hands_out(least, most);
    summed_ = summed_ || sum;
    if (!from_zero_) ++passes_;
    from_zero_ = false;
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

  Outcome iterate() {
    const bool automatic = request_.method == 0;
    const Index given = request_.max_iterations;
    mode_ = automatic                   ? first_mode()
            : request_.method == kSweep ? Mode::kValueIteration
                                        : static_cast<Mode>(request_.method);
    passes_ = products_ = escalated_at_ = stalled_ = passes_without_gain_ = 0;
    forcing_ = 0.3;
    krylov_best_ = kInf;
    window_half_ = kInf;
    krylov_failed_ = false;
    expected_ = kInf;
    Progress progress;
    Status status = Status::kMaxIterations;

    for (;;) {
      interrupt_.check();
      sweep(uses_matrix() && !from_zero_ && !(expected_ <= certificate_.target()));
      if (summed_ && !checked_) {
        checked_ = true;
        if (request_.validate != Rigour::kOff)
          defect_ = transition_defect(*model_, request_.validate, sum_.data(), least_.data());
        if (defect_.status != Status::kConverged) return {defect_.status, kInf, kInf, 0, 0};
        if (some_row_ends()) {  // as if known from the start: problems that follow know it
          begin();
          return iterate();
        }
      }
      // T0 has seen nothing of P, neither what is wrong with it nor whether all rows continue.
      if (passes_ == 0) {
        accept_sweep();
        continue;
      }
      const double half = certificate_.half_span();
      if (!finite_) {
        status = Status::kNonFinite;
        break;
      }
      if (certificate_.converged()) {
        status = Status::kConverged;
        break;
      }
      const bool exhausted =
          progress.exhausted(certificate_, patience(), mode_ == Mode::kValueIteration);
      if (exhausted) {
        status = request_.tol > 0.0 ? Status::kStagnated : Status::kConverged;
        break;
      }
      if (given > 0 ? passes_ >= given
                    : (mode_ == Mode::kValueIteration || mode_ == Mode::kModifiedPolicy) &&
                          passes_ - escalated_at_ >= certificate_.most_sweeps())
        break;
      if (mode_ == Mode::kNewtonDirect && passes_ - escalated_at_ >= kMostNewton) {
        if (given == 0 && !certificate_.sweeps_end()) break;
        switch_to(Mode::kValueIteration);
        progress = {};
      }
      give_up_if_slow(half);
      advance();
    }
    return {status, certificate_.half_span(), certificate_.error_bound(), passes_, products_};
  }

  bool uses_matrix() const {
    return mode_ == Mode::kNewtonKrylov || mode_ == Mode::kModifiedPolicy;
  }

  Index patience() const {
    if (mode_ == Mode::kValueIteration) return certificate_.patience(1.0);
    if (mode_ == Mode::kModifiedPolicy) return certificate_.patience(20.0);
    return 2;
  }

  Mode first_mode() const {
    return std::is_same<Model, DenseTransition<Real>>::value ? Mode::kNewtonKrylov
                                                             : Mode::kModifiedPolicy;
  }

  // Far more passes than a method should need: hand over to one that converges globally.
  void give_up_if_slow(double half) {
    const Index used = passes_ - escalated_at_;
    const bool direct = model_->states <= kDirectLimit;
    Mode next = mode_;
    if (mode_ == Mode::kModifiedPolicy && !krylov_failed_ && mixes_slowly(used, half))
      next = Mode::kNewtonKrylov;
    else if (mode_ == Mode::kNewtonKrylov && (used >= 200 || (used >= 4 && stalled_ >= 4))) {
      krylov_failed_ = true;
      next = direct ? Mode::kNewtonDirect : Mode::kModifiedPolicy;
    }
    if (next != mode_) switch_to(next);
  }

  void switch_to(Mode next) {
    mode_ = next;
    escalated_at_ = passes_;
    stalled_ = 0;
  }

  // Whether modified policy iteration, at the pace of its last passes, would need more than
  // a Krylov method or an elimination is likely to.
  bool mixes_slowly(Index used, double half) {
    // Where an elimination may be what comes next, thousands of products cost less than one.
    const bool direct = model_->states <= kDirectLimit;
    const Index window = direct ? 32 : 8 + static_cast<Index>(crossing()) / kMostProducts;
    const double patience = direct ? 18000.0 : 6000.0;  // products
    if (used % window != 0) return false;
    const double before = window_half_;
    window_half_ = half;
    if (used < 2 * window || half <= certificate_.target()) return false;
    const double rate = std::log(half / before) / static_cast<double>(window * kMostProducts);
    return !(half < before) || !(std::log(certificate_.target() / half) / rate < patience);
  }

  // Products in which news crosses a square grid; before it has, nothing contracts.
  double crossing() const { return 2.0 * std::sqrt(static_cast<double>(model_->states)); }

  bool some_row_ends() const {
    for (Index row = 0; row < model_->states * model_->actions; ++row)
      if (sum_[row] == 0.0 && !(problem_.log_reference && problem_.log_reference[row] == -kInf))
        return true;
    return false;
  }

  void advance() {
    switch (mode_) {
      case Mode::kNewtonDirect:
        return newton_direct();
      case Mode::kNewtonKrylov:
        return newton_krylov();
      case Mode::kModifiedPolicy:
        return modified_policy();
      default:
        return accept_sweep();
    }
  }

  void accept_sweep() {
    certificate_.c = certificate_.offset();
    if (!certificate_.continues) certificate_.c = 0.0;
    w_ = next_;
    centre();
  }

  // W := W + x. Where every row continues x matters only up to a constant: the next sweep's middle
  // finds it exactly.
  void accept_step(const std::vector<double>& x, double share) {
    for (std::size_t i = 0; i < w_.size(); ++i) w_[i] += x[i];
    certificate_.c += share / (1.0 - problem_.discount);
    centre();
  }

  // δ without a share of the constants, which are eigenvectors where every row continues.
  std::vector<double> right_side(double share) const {
    std::vector<double> b = delta_;
    for (double& e : b) e -= share;
    return b;
  }

  double middle() const {
    return certificate_.continues ? 0.5 * (certificate_.low + certificate_.high) : 0.0;
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
    const double share = certificate_.step_share();
    std::vector<double> x = right_side(share);
    elimination_->solve(x.data(), false);
    accept_step(x, share);
  }

  // Inexact Newton: forcing term after Eisenstat & Walker (1996), choice 2, capped at 0.3. Exact
  // steps rise monotonically in V but not in the residual, so growth is no reason to reject; if the
  // certificate stalls for three passes the steps are made more exact instead.
  void newton_krylov() {
    ensure_matrix();
    const double half = certificate_.half_span();
    if (half < 0.7 * krylov_best_) {
      const double ratio = std::isfinite(krylov_best_) ? half / krylov_best_ : 1.0;
      krylov_best_ = half;
      stalled_ = 0;
      passes_without_gain_ = 0;
      forcing_ = std::min(0.3, std::max(0.9 * ratio * ratio, 1e-10));
    } else if (++passes_without_gain_ >= 3) {
      passes_without_gain_ = 0;
      // The first steps may raise the residual: what counts is whether it falls from there.
      if (stalled_++ == 0) krylov_best_ = std::max(krylov_best_, half);
      forcing_ = std::max(0.1 * forcing_, 1e-12);
    }
    const std::vector<double> b = right_side(middle());
    std::vector<double> x(b.size());
    const PolicyOperator<Matrix> op(*matrix_, problem_.discount, false, certificate_.continues, 1,
                                    team_, interrupt_);
    std::vector<double> deflated = b;
    if (certificate_.continues) op.remove_mean(deflated.data());
    const double size = norm2(deflated);
    const double wanted =
        size * std::max(forcing_, std::min(0.1, 0.1 * certificate_.target() / half));
    KrylovResult result =
        bicgstab(op, deflated, x, wanted, 200 + 4 * static_cast<Index>(crossing()));
    products_ += result.products;
    if (!(result.residual <= wanted)) {
      std::vector<double> rest(b.size());
      op(x, rest);
      for (std::size_t i = 0; i < rest.size(); ++i) rest[i] = deflated[i] - rest[i];
      result = gmres(op, std::move(rest), x, wanted, 400);
      products_ += result.products;
      if (!(result.residual <= 0.5 * size)) stalled_ = 4;  // Krylov is of no use here
    }
    // What is left of the linear system, and T's curvature over the spread of γPx ≈ x − δ.
    std::vector<double> ahead(x.size());
    std::transform(x.begin(), x.end(), b.begin(), ahead.begin(), std::minus<double>());
    const double range = 2.0 * spread(ahead);
    expected_ = result.residual / size * half + range * range / (8.0 * problem_.temperature);
    accept_step(x, middle());
  }

  static constexpr Index kMostProducts = 120;  // of a pass of modified policy iteration

  // Truncated policy evaluation Σ_j (γP_π)^j δ, 20 to 120 terms, until the terms' span is a tenth.
  void modified_policy() {
    ensure_matrix();
    std::vector<double> x = right_side(middle());
    products_ += sum_of_products(x, 20);
    accept_step(x, middle());
  }

  // x := Σ_j (γP_π)^j x, at least so many terms; how many.
  Index sum_of_products(std::vector<double>& x, Index fewest) {
    const PolicyOperator<Matrix> op(*matrix_, problem_.discount, false, false, 1, team_,
                                    interrupt_);
    std::vector<double> term = x, next(term.size());
    const auto spread_of_term = [&] {
      Columns low, high;
      op.range(term.data(), low, high);
      return certificate_.continues ? high[0] - low[0]
                                    : std::max(std::abs(low[0]), std::abs(high[0]));
    };
    const double start = spread_of_term();
    Index j = 0;
    while (j < kMostProducts) {
      op.accumulate(term.data(), next.data(), x.data());
      term.swap(next);
      ++j;
      if (j % 10 != 0) continue;
      const double now = spread_of_term();
      if (j >= fewest && (now <= 0.1 * start || now <= 0.1 * certificate_.target())) break;
    }
    return j;
  }

  double spread(const std::vector<double>& x) const {
    const auto ends = std::minmax_element(x.begin(), x.end());
    return certificate_.continues ? *ends.second - *ends.first
                                  : std::max(std::abs(*ends.first), std::abs(*ends.second));
  }

  const Solve& request_;
  const PolicyPattern* pattern_;
  Team& team_;
  Interrupt& interrupt_;

  const Model* model_ = nullptr;
  Problem<Real> problem_{};
  const double* initial_ = nullptr;
  Certificate certificate_;  // V = c + W
  Defect defect_;
  bool summed_ = false, checked_ = false, from_zero_ = true, weight_ready_ = false,
       matrix_ready_ = false;
  bool finite_ = true;
  std::vector<double> q_, policy_, log_policy_;  // q' until the end, then Q − V
  std::vector<double> w_, next_, delta_, inverse_sum_, sum_, least_, weight_;
  std::vector<Range> ranges_;
  std::vector<SweepScratch<Model>> scratch_;
  std::vector<std::vector<double>> rows_;
  std::unique_ptr<Matrix> matrix_;
  std::unique_ptr<Refinement<Model>> refinement_;
  std::unique_ptr<Elimination> elimination_;

  Mode mode_ = Mode::kAuto;
  Index passes_ = 0, products_ = 0, escalated_at_ = 0, stalled_ = 0, passes_without_gain_ = 0;
  double forcing_ = 0.3, krylov_best_ = kInf;
  double window_half_ = kInf;  // half-span a window of passes ago
  bool krylov_failed_ = false;
  double expected_ = kInf;  // half-span after the step just made
};

}  // namespace birl
