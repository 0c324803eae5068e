#include "solve.h"

#include <cmath>
#include <limits>
#include <memory>

#include "bellman.h"
#include "elimination.h"
#include "krylov.h"
#include "policy_matrix.h"
#include "policy_system.h"
#include "validate.h"

namespace birl {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr Index kSmall = 128;         // up to here: value iteration, or Newton with elimination
constexpr Index kDirectLimit = 2500;  // largest S whose S² matrix is eliminated as a last resort

enum class Mode : Index { kAuto, kValueIteration, kNewtonDirect, kNewtonKrylov, kModifiedPolicy };

struct Outcome {
  Status status;
  double residual, error_bound;
  Index passes, products;
  double offset = 0.0;
};

// Where one problem's results go: the tables in the type of P and r.
template <class Real>
struct Tables {
  double* value;                              // (S)
  Real *q, *advantage, *policy, *log_policy;  // (S,A)
};

template <class Real>
Tables<Real> tables_at(const Solve& request, Index i, Index S, Index A) {
  const auto at = [&](void* table) { return static_cast<Real*>(table) + i * S * A; };
  return {request.value + i * S, at(request.q), at(request.advantage), at(request.policy),
          at(request.log_policy)};
}

// Solves one problem after another on transitions of one shape; keeps its memory between them.
template <class Model>
class Solver {
  using Real = typename Model::Real;
  // A dense policy matrix is kept in P's own precision: it only has to give a good Newton step,
  // the certificate is always computed from P.
  using Matrix = typename PolicyMatrixOf<Model, Real>::type;

 public:
  Solver(const Solve& request, const PolicyPattern* pattern, Team& team, Interrupt& interrupt)
      : request_(request), pattern_(pattern), team_(team), interrupt_(interrupt) {}

  // Row sums of a transition, and the first thing wrong with it.
  Defect prepare(const Model& model) {
    const Index rows = model.states * model.actions;
    inverse_sum_.resize(rows);
    least_.resize(rows);
    const Index chunk = model.chunk() * model.actions;
    team_.run((rows + chunk - 1) / chunk, model.work(), [&](Index c, int) {
      const Index row0 = c * chunk, row1 = std::min(rows, row0 + chunk);
      model.row_sums(row0, row1, inverse_sum_.data() + row0, least_.data() + row0);
    });
    if (request_.validate != Rigour::kOff) {
      const Defect defect =
          transition_defect(model, request_.validate, inverse_sum_.data(), least_.data());
      if (defect.status != Status::kConverged) return defect;
    }
    for (double& sum : inverse_sum_) sum = sum == 0.0 ? 0.0 : 1.0 / sum;
    return {};
  }

  Outcome run(const Model& model, const Problem<Real>& problem, const double* initial,
              const Tables<Real>& out) {
    model_ = &model;
    problem_ = problem;
    begin(initial);
    Outcome outcome = iterate();
    outcome.offset = problem.discount * c_ + shift();
    write(outcome.offset, out);
    return outcome;
  }

 private:
  // Everything comes from the last sweep; P is not read again.
  void write(double offset, const Tables<Real>& out) {
    const Index S = model_->states, A = model_->actions;
    log_policy_.resize(S * A);
    double* const advantage = q_.data();  // takes the place of q'
    kernels().soft_maximum({S, A, q_.data(), problem_.log_reference, problem_.temperature,
                            next_.data(), policy_.data(), log_policy_.data(), advantage,
                            scratch_[0].soft_maximum.data()});
    for (Index s = 0; s < S; ++s) {
      const double value = next_[s] + offset;
      out.value[s] = value;
      for (Index row = s * A; row < (s + 1) * A; ++row)
        out.q[row] = static_cast<Real>(advantage[row] + value);
    }
    const auto store = [](const std::vector<double>& table, Real* to) {
      std::transform(table.begin(), table.end(), to, [](double x) { return static_cast<Real>(x); });
    };
    store(q_, out.advantage);
    store(policy_, out.policy);
    store(log_policy_, out.log_policy);
  }

  void begin(const double* initial) {
    const Index S = model_->states, A = model_->actions, rows = S * A;
    if (scratch_.empty()) scratch_.assign(team_.size(), SweepScratch<Model>(*model_));
    q_.resize(rows);
    policy_.resize(rows);
    w_.assign(S, 0.0);
    next_.resize(S);
    delta_.resize(S);
    largest_reward_ = 0.0;
    largest_reference_ = 0.0;
    continues_ = true;
    for (Index row = 0; row < rows; ++row) {
      const double reference = problem_.log_reference ? problem_.log_reference[row] : 0.0;
      if (reference == -kInf) continue;
      largest_reward_ =
          std::max(largest_reward_, std::abs(static_cast<double>(problem_.reward[row])));
      largest_reference_ = std::max(largest_reference_, std::abs(reference));
      continues_ = continues_ && inverse_sum_[row] != 0.0;
    }
    c_ = 0.0;
    if (initial) {
      std::copy(initial, initial + S, w_.begin());
      centre();
    }
    from_zero_ = initial == nullptr;
    weight_ready_ = matrix_ready_ = false;
  }

  // W := W − middle, c := c + middle. Only where every row continues does T commute with constants.
  void centre() {
    const auto ends = std::minmax_element(w_.begin(), w_.end());
    low_ = *ends.first;
    high_ = *ends.second;
    if (!continues_) return;
    const double middle = 0.5 * (low_ + high_);
    c_ += middle;
    low_ -= middle;
    high_ -= middle;
    for (double& e : w_) e -= middle;
  }

  // q', tw and δ at (c, W). With `form`, also the policy and P_π while P's rows are in cache.
  void sweep(bool form) {
    const Model& model = *model_;
    const Index S = model.states, A = model.actions, chunk = model.chunk();
    const Index chunks = (S + chunk - 1) / chunk;
    const double constant = (1.0 - problem_.discount) * c_;
    if (form) make_matrix();
    ranges_.resize(chunks);
    const double work = 2.0 * model.work() + 40.0 * static_cast<double>(S * A);
    team_.run(chunks, work, [&](Index item, int worker) {
      SweepScratch<Model>& mine = scratch_[worker];
      const Index s0 = item * chunk, s1 = std::min(S, s0 + chunk);
      if (from_zero_)
        std::copy(problem_.reward + s0 * A, problem_.reward + s1 * A, q_.data() + s0 * A);
      else
        q_values(model, problem_, inverse_sum_.data() + s0 * A, w_.data(), s0, s1,
                 mine.product.data(), q_.data() + s0 * A);
      kernels().soft_maximum({s1 - s0, A, q_.data() + s0 * A, reference(s0), problem_.temperature,
                              next_.data() + s0, form ? policy_.data() + s0 * A : nullptr, nullptr,
                              nullptr, mine.soft_maximum.data()});
      ranges_[item] = kernels().difference(s1 - s0, next_.data() + s0, w_.data() + s0, constant,
                                           delta_.data() + s0);
      if (form) form_rows(s0, s1, worker);
    });
    range_ = {kInf, -kInf, true};
    for (const Range& part : ranges_)
      range_ = {std::min(range_.low, part.low), std::max(range_.high, part.high),
                range_.finite && part.finite};
    if (!from_zero_) ++passes_;
    from_zero_ = false;
    weight_ready_ = matrix_ready_ = form;
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
    make_matrix();
    const Index S = model_->states, chunk = model_->chunk();
    team_.run((S + chunk - 1) / chunk, 2.0 * model_->work(), [&](Index item, int worker) {
      const Index s0 = item * chunk, s1 = std::min(S, s0 + chunk);
      matrix_->form_rows(*model_, weight_.data(), s0, s1, rows_[worker].data());
    });
    matrix_ready_ = true;
  }

  // ---- certificate ------------------------------------------------------------------------------

  double half_span() const {
    return continues_ ? 0.5 * (range_.high - range_.low)
                      : std::max(std::abs(range_.low), std::abs(range_.high));
  }

  // (M6): V* lies in TV + γ/(1−γ) [min δ, max δ]; the middle is added where that is valid.
  double shift() const {
    const double gamma = problem_.discount;
    return continues_ ? gamma / (1.0 - gamma) * (0.5 * (range_.low + range_.high)) : 0.0;
  }

  // Size of the numbers whose rounding enters δ.
  double scale() const {
    const double gamma = problem_.discount;
    const double span = 2.0 * std::max(std::abs(low_), std::abs(high_));
    return largest_reward_ + span + (1.0 - gamma) * std::abs(c_) +
           problem_.temperature *
               (1.0 + std::log(static_cast<double>(model_->actions)) + largest_reference_);
  }

  // Rounding error of one component of δ in units of eps·scale: 8 for the handful of operations
  // after the row sums, half an ulp for each dependent addition in the two row sums P·W and σ, and
  // the same for the sum over actions.
  double rounding_units() const {
    return 8.0 + model_->additions() +
           0.5 * static_cast<double>(std::min<Index>(model_->actions, 64));
  }

  double rounding() const { return rounding_units() * kEps * scale(); }

  double error_bound() const {
    const double gamma = problem_.discount;
    return (gamma * half_span() + rounding()) / (1.0 - gamma);
  }

  double largest_value() const {
    return std::max(std::max(std::abs(c_ + low_), std::abs(c_ + high_)), largest_reward_);
  }

  // ---- iteration --------------------------------------------------------------------------------

  Outcome iterate() {
    const bool automatic = request_.method == 0;
    const Index given = request_.max_iterations;
    const double gamma = problem_.discount;
    const Index contraction = static_cast<Index>(std::min(1e9, 60.0 / (1.0 - gamma))) + 1000;
    mode_ = automatic ? first_mode() : static_cast<Mode>(request_.method);
    passes_ = products_ = escalated_at_ = stalled_ = passes_without_gain_ = 0;
    forcing_ = 0.3;
    krylov_best_ = kInf;
    window_half_ = kInf;
    krylov_failed_ = false;
    double best = kInf;    // smallest half-span so far
    Index since_best = 0;  // sweeps since it fell by a tenth
    double previous = kInf;
    Status status = Status::kMaxIterations;

    for (;;) {
      interrupt_.check();
      sweep(mode_ != Mode::kValueIteration && !from_zero_ && mode_ != Mode::kNewtonDirect);
      const double half = half_span();
      if (!range_.finite || !std::isfinite(c_)) {
        status = Status::kNonFinite;
        break;
      }
      if (request_.tol > 0.0 && error_bound() <= request_.tol * largest_value()) {
        status = Status::kConverged;
        break;
      }
      since_best = half < 0.9 * best ? 0 : since_best + 1;
      if (since_best == 0) best = half;
      // At the rounding level: stop when nothing is left, or nothing more is gained.
      const double floor = rounding();
      const bool exhausted = half <= kEps * scale() ||
                             (half <= floor && since_best >= patience()) ||
                             (half <= 8.0 * floor && since_best >= 10 * patience());
      if (passes_ > 0 && exhausted) {
        status = request_.tol > 0.0 ? Status::kStagnated : Status::kConverged;
        break;
      }
      if (given > 0 ? passes_ >= given
                    : (mode_ == Mode::kValueIteration || mode_ == Mode::kModifiedPolicy) &&
                          passes_ - escalated_at_ >= contraction)
        break;
      if (automatic) choose(half, previous, half <= floor && since_best > 0);
      give_up_if_slow(half);
      previous = half;
      advance();
    }
    return {status, half_span(), error_bound(), passes_, products_};
  }

  // Sweeps within which the half-span falls by a tenth if it still falls: γ^n <= 0.9.
  Index patience() const {
    const double slowest = 0.11 / (1.0 - problem_.discount);
    if (mode_ == Mode::kValueIteration) return 2 + static_cast<Index>(slowest);
    if (mode_ == Mode::kModifiedPolicy) return 2 + static_cast<Index>(slowest / 20.0);
    return 2;
  }

  Mode first_mode() const {
    if (model_->states <= kSmall) return Mode::kValueIteration;
    return std::is_same<Model, DenseTransition<Real>>::value ? Mode::kNewtonKrylov
                                                             : Mode::kModifiedPolicy;
  }

  // Half-span at which iteration ends, as far as it can be told now.
  double target() const {
    const double gamma = problem_.discount;
    const double wanted = request_.tol * largest_value() * (1.0 - gamma) / std::max(gamma, 0.1);
    return std::max(wanted, kEps * scale());
  }

  // Small problems: value iteration as long as its measured contraction beats Newton's price, and
  // Newton at the rounding level, where a jittering half-span tells nothing of the contraction.
  void choose(double half, double previous, bool at_rounding_level) {
    if (mode_ != Mode::kValueIteration || model_->states > kSmall || passes_ < 2) return;
    const double rate = half / previous;
    const double wanted = target();
    if (half <= wanted) return;
    if (at_rounding_level) {
      mode_ = Mode::kNewtonDirect;
      return;
    }
    const double sweeps = rate < 1.0 ? std::log(wanted / half) / std::log(rate) : kInf;
    const double S = static_cast<double>(model_->states), A = static_cast<double>(model_->actions);
    // Nanoseconds on one core of an AVX-512 machine, fitted to 16x4, 32x8 (float32) and 104x4
    // (float64): a sweep 0.34, 0.95, 4.1 µs; a Newton step with its sweep 2.0, 6.1, 43 µs.
    const double sweep = 0.08 * model_->work() + 0.6 * S * A + 200.0;
    const double newton = 2.0 * sweep + 0.008 * S * S * S + 2.5 * S * S + 700.0;
    // From contracting value iterates Newton needs about three steps to rounding level.
    if (sweeps * sweep > 3.0 * newton) mode_ = Mode::kNewtonDirect;
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
    } else if (mode_ == Mode::kNewtonDirect && used >= 1000)
      next = Mode::kValueIteration;
    if (next == mode_) return;
    mode_ = next;
    escalated_at_ = passes_;
    stalled_ = 0;
  }

  // Whether modified policy iteration, at the pace of its last passes, would need more than
  // a Krylov method or an elimination is likely to.
  bool mixes_slowly(Index used, double half) {
    // News crosses a large grid at 20 to 60 states a pass, and nothing contracts before it has.
    constexpr Index kWindow = 32;
    if (used % kWindow != 0) return false;
    const double before = window_half_;
    window_half_ = half;
    if (used < 2 * kWindow || half <= target()) return false;
    constexpr double patience = 150.0;  // passes of up to 60 products
    return !(std::log(target() / half) / std::log(half / before) * kWindow < patience) ||
           !(half < before);
  }

  void advance() {
    if (passes_ == 0) return accept_sweep();  // T0 is free, and a better start than zero
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
    c_ = problem_.discount * c_ + shift();
    if (!continues_) c_ = 0.0;
    w_ = next_;
    centre();
  }

  // W := W + x. Where every row continues x matters only up to a constant: the next sweep's middle
  // finds it exactly.
  void accept_step(const std::vector<double>& x) {
    for (std::size_t i = 0; i < w_.size(); ++i) w_[i] += x[i];
    if (continues_) c_ += 0.5 * (range_.low + range_.high) / (1.0 - problem_.discount);
    centre();
  }

  // δ without its middle where that is an eigenvector's share.
  std::vector<double> right_side() const {
    std::vector<double> b = delta_;
    if (continues_)
      for (double& e : b) e -= 0.5 * (range_.low + range_.high);
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
        double stopping = 0.0;
        for (Index a = 0; a < A; ++a) {
          scaled[a] = gamma * weight_[s * A + a];
          if (inverse_sum_[s * A + a] == 0.0) stopping += policy_[s * A + a];
        }
        std::fill(elimination_->row(s), elimination_->row(s) + S, 0.0);
        model_->policy_row(s, scaled.data(), elimination_->row(s));
        elimination_->defect()[s] = (1.0 - gamma) + gamma * stopping;
      }
    });
    elimination_->factor(team_, interrupt_);
    std::vector<double> x = right_side();
    elimination_->solve(x.data(), false);
    accept_step(x);
  }

  // Inexact Newton: forcing term after Eisenstat & Walker (1996), choice 2, capped at 0.3. Exact
  // steps rise monotonically in V but not in the residual, so growth is no reason to reject; if the
  // certificate stalls for three passes the steps are made more exact instead.
  void newton_krylov() {
    ensure_matrix();
    const double half = half_span();
    if (half < 0.7 * krylov_best_) {
      const double ratio = half / krylov_best_;
      krylov_best_ = half;
      stalled_ = 0;
      passes_without_gain_ = 0;
      forcing_ = std::min(0.3, std::max(0.9 * ratio * ratio, 1e-10));
    } else if (++passes_without_gain_ >= 3) {
      passes_without_gain_ = 0;
      ++stalled_;
      forcing_ = std::max(0.1 * forcing_, 1e-12);
    }
    const std::vector<double> b = right_side();
    std::vector<double> x(b.size());
    const PolicyOperator<Matrix> op(*matrix_, problem_.discount, false, continues_, team_,
                                    interrupt_);
    std::vector<double> deflated = b;
    if (continues_) op.remove_mean(deflated.data());
    const double size = norm2(deflated);
    const double wanted = size * std::max(forcing_, std::min(0.1, 0.1 * target() / half));
    KrylovResult result = bicgstab(op, deflated, x, wanted, 200);
    products_ += result.products;
    if (!(result.residual <= wanted)) {
      std::vector<double> rest(b.size());
      op(x, rest);
      for (std::size_t i = 0; i < rest.size(); ++i) rest[i] = deflated[i] - rest[i];
      result = gmres(op, std::move(rest), x, wanted, 400);
      products_ += result.products;
      if (!(result.residual <= 0.5 * size)) stalled_ = 4;  // Krylov is of no use here
    }
    accept_step(x);
  }

  // Truncated policy evaluation Σ_j (γP_π)^j δ, 20 to 60 terms, until the terms' span is a tenth.
  void modified_policy() {
    ensure_matrix();
    const PolicyOperator<Matrix> op(*matrix_, problem_.discount, false, false, team_, interrupt_);
    std::vector<double> term = right_side(), next(term.size()), x = term;
    const double start = spread(term);
    Index j = 0;
    while (j < 60) {
      op.step(term.data(), next.data());
      term.swap(next);
      ++j;
      for (std::size_t i = 0; i < x.size(); ++i) x[i] += term[i];
      if (j % 10 != 0) continue;
      const double now = spread(term);
      if (j >= 20 && (now <= 0.1 * start || now <= 0.1 * target())) break;
    }
    products_ += j;
    accept_step(x);
  }

  double spread(const std::vector<double>& x) const {
    const auto ends = std::minmax_element(x.begin(), x.end());
    return continues_ ? *ends.second - *ends.first
                      : std::max(std::abs(*ends.first), std::abs(*ends.second));
  }

  const Solve& request_;
  const PolicyPattern* pattern_;
  Team& team_;
  Interrupt& interrupt_;

  const Model* model_ = nullptr;
  Problem<Real> problem_{};
  bool continues_ = true, from_zero_ = true, weight_ready_ = false, matrix_ready_ = false;
  double c_ = 0.0, low_ = 0.0, high_ = 0.0;  // V = c + W, W in [low, high]
  double largest_reward_ = 0.0, largest_reference_ = 0.0;
  Range range_{};
  std::vector<double> q_, policy_, log_policy_;  // q' until the end, then Q − V
  std::vector<double> w_, next_, delta_, inverse_sum_, least_, weight_;
  std::vector<Range> ranges_;
  std::vector<SweepScratch<Model>> scratch_;
  std::vector<std::vector<double>> rows_;
  std::unique_ptr<Matrix> matrix_;
  std::unique_ptr<Elimination> elimination_;

  Mode mode_ = Mode::kAuto;
  Index passes_ = 0, products_ = 0, escalated_at_ = 0, stalled_ = 0, passes_without_gain_ = 0;
  double forcing_ = 0.3, krylov_best_ = kInf;
  double window_half_ = kInf;  // half-span a window of passes ago
  bool krylov_failed_ = false;
};

}  // namespace

void solve(const Batch& batch, const Solve& request, Interrupt& interrupt) {
  if (batch.total() == 0) return;
  const Index S = batch.states, A = batch.actions, G = batch.problems;
  with_models(batch, [&](auto model_of) {
    using Model = decltype(model_of(0));
    using Real = typename Model::Real;
    std::unique_ptr<PolicyPattern> pattern;
    if (batch.sparse()) pattern = std::make_unique<PolicyPattern>(batch.crow, batch.col, S, A);

    // Across problems where there are enough of them, else across the states of one.
    Team outer(request.threads), alone(1);
    const bool across = batch.transitions >= outer.size();
    Team& within = across ? alone : outer;
    std::vector<std::unique_ptr<Solver<Model>>> solvers(across ? outer.size() : 1);
    const double kernel = static_cast<double>(batch.sparse() ? Kernel::kCpuCsr : Kernel::kCpuRows);

    const auto one = [&](Index n, int worker) {
      interrupt.check();
      if (!solvers[worker])
        solvers[worker] =
            std::make_unique<Solver<Model>>(request, pattern.get(), within, interrupt);
      Solver<Model>& solver = *solvers[worker];
      const Model model = model_of(n);
      const Defect transition = solver.prepare(model);
      for (Index i = n * G; i < (n + 1) * G; ++i) {
        interrupt.check();
        const Problem<Real> problem = problem_at<Real>(batch, i);
        const Tables<Real> out = tables_at<Real>(request, i, S, A);
        double* info = request.info + kInfo * i;
        Defect defect;
        if (request.validate != Rigour::kOff) {
          defect = problem_defect(problem, S, A);
          if (defect.status == Status::kConverged) defect = transition;
        }
        if (defect.status != Status::kConverged) {
          const double nan = std::numeric_limits<double>::quiet_NaN();
          std::fill_n(out.value, S, nan);
          for (Real* table : {out.q, out.advantage, out.policy, out.log_policy})
            std::fill_n(table, S * A, static_cast<Real>(nan));
          request.status[i] = static_cast<Index>(defect.status);
          const double row[kInfo] = {nan,
                                     nan,
                                     0.0,
                                     static_cast<double>(defect.place),
                                     defect.value,
                                     0.0,
                                     problem.temperature,
                                     nan,
                                     kernel};
          std::copy(row, row + kInfo, info);
          continue;
        }
        const Outcome outcome =
            solver.run(model, problem, request.initial ? request.initial + i * S : nullptr, out);
        request.status[i] = static_cast<Index>(outcome.status);
        const double row[kInfo] = {outcome.residual,
                                   outcome.error_bound,
                                   static_cast<double>(outcome.passes),
                                   0.0,
                                   0.0,
                                   static_cast<double>(outcome.products),
                                   problem.temperature,
                                   outcome.offset,
                                   kernel};
        std::copy(row, row + kInfo, info);
      }
    };
    const double sweep_work = 2.0 * model_of(0).work() + 40.0 * static_cast<double>(S * A);
    if (across)
      outer.run(batch.transitions, 10.0 * sweep_work * static_cast<double>(batch.total()), one);
    else
      for (Index n = 0; n < batch.transitions; ++n) one(n, 0);
  });
}

}  // namespace birl
