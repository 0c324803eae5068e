#include "cpu/entry/solve_vjp.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "cpu/entry/solve.h"
#include "cpu/isa/adjoint.h"
#include "cpu/solvers/policy_system_solver.h"
#include "cpu/support/aligned.h"
#include "cpu/support/huge_pages.h"

namespace birl {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr Index kAbreast = PackedElimination::kAbreast;
constexpr double kSmallGap = 1e-3;  // 1 − γ, above which the mass of a flow has its digits anyway
constexpr double kTinyGap = 1e-6;   // and above which no pivot is small

// What is known of the problem at work: (S,A) or (S) numbers each.
struct Slot {
  std::vector<double> probability, score, q, source, flow, inverse_sum, scaled;
  std::vector<double> own_weight, own_expected, own_relative;
  double inflow = 0.0, middle = 0.0;  // what W is given without
  // What the cotangent of P consists of: γ r̄/σ, Σ P W/σ and W. The slot's own, or kept by the rule.
  double *weight = nullptr, *expected = nullptr, *relative = nullptr;

  Slot(Index states, Index pairs)
      : probability(pairs),
        score(pairs),
        q(pairs),
        source(states),
        flow(states),
        inverse_sum(pairs),
        scaled(pairs),
        own_weight(pairs),
        own_expected(pairs),
        own_relative(states) {}
};

// The parts of the rule that do not depend on how the linear system is solved.
template <class Real>
class Rule {
 public:
  Rule(const Batch& batch, const SolveVjp& request)
      : batch_(batch), request_(request), S_(batch.states), pairs_(batch.states * batch.actions) {
    if (!deferred()) return;
    weight_.resize(batch.total() * pairs_);
    expected_.resize(weight_.size());
    relative_.resize(batch.total() * S_);
  }

  bool writes() const { return request_.transition_bar != nullptr; }

  // Problems that share P add up in its cotangent: it is written when all of them are done.
  bool deferred() const { return writes() && batch_.problems > 1; }

  bool pulls() const {
    return request_.q_bar || request_.advantage_bar || request_.policy_bar ||
           request_.log_policy_bar;
  }

  // False if the problem failed: its derivatives are NaN, and nothing is left to do.
  bool open(Index i, Slot& slot) {
    const bool kept = deferred();
    slot.weight = kept ? weight_.data() + i * pairs_ : slot.own_weight.data();
    slot.expected = kept ? expected_.data() + i * pairs_ : slot.own_expected.data();
    slot.relative = kept ? relative_.data() + i * S_ : slot.own_relative.data();
    if (request_.status[i] != 0) {
      fail(i, slot);
      return false;
    }
    // About the middle: the mass of a flow rounds, and is multiplied by W in γ̄.
    const double* const given = request_.relative + i * S_;
    const auto ends = std::minmax_element(given, given + S_);
    slot.middle = 0.5 * (*ends.first + *ends.second);
    std::transform(given, given + S_, slot.relative, [&](double w) { return w - slot.middle; });
    adjoint_routines().rows<Real>().fold(tables(i, slot));
    return true;
  }

  // γ Q̄/σ of states [s0, s1): what rows of P carry from Q back to V.
  void weigh(Index i, Index s0, Index s1, Slot& slot) const {
    const double gamma = batch_.discount[i];
    for (Index j = s0 * batch_.actions; j < s1 * batch_.actions; ++j)
      slot.scaled[j] = gamma * slot.q[j] * slot.inverse_sum[j];
  }

  // Σ d λ of the flow λ with d the row sums of I − γP_π (M20): what rounding in the source would
  // multiply by 1/(1 − γ) is known from the cotangents.
  double mass(Index i, const Slot& slot) const {
    double total = slot.inflow;
    if (pulls()) {
      const double rest = 1.0 - batch_.discount[i];
      for (Index j = 0; j < pairs_; ++j)
        total -= (slot.inverse_sum[j] == 0.0 ? 1.0 : rest) * slot.q[j];
    }
    return total;
  }

  // All that follows from the flow; the cotangent of P apart.
  void close(Index i, Slot& slot) const {
    VjpOutputs<Real> out{};
    out.flow = slot.flow.data();
    out.inverse_sum = slot.inverse_sum.data();
    out.expected = slot.expected;
    out.offset = offset_of(i) + slot.middle;
    out.inflow = slot.inflow;
    if (request_.reward_bar) out.reward_bar = static_cast<Real*>(request_.reward_bar) + i * pairs_;
    if (request_.transition_bar) out.weight = slot.weight;
    if (request_.log_reference_bar) out.log_reference_bar = request_.log_reference_bar + i * pairs_;
    if (request_.discount_bar) out.discount_bar = request_.discount_bar + i;
    if (request_.temperature_bar) out.temperature_bar = request_.temperature_bar + i;
    adjoint_routines().rows<Real>().finish(tables(i, slot), out);
  }

  // P̄(s,a,t) = Σ_g x_g(s,a) (W_g(t) − e_g(s,a)) for states [s0, s1) of transition n.
  void write_transition(Index n, Index s0, Index s1, const Slot& slot) const {
    write(n, s0, s1, 1, slot.weight, slot.expected, slot.relative);
  }
  void write_deferred(Index n, Index s0, Index s1) const {
    const Index first = n * batch_.problems;
    write(n, s0, s1, batch_.problems, weight_.data() + first * pairs_,
          expected_.data() + first * pairs_, relative_.data() + first * S_);
  }

 private:
  double offset_of(Index i) const { return request_.info[i * (kInfo + batch_.states) + kOffset]; }

  VjpTables<Real> tables(Index i, Slot& slot) const {
    const auto at = [&](const void* table) {
      return table ? static_cast<const Real*>(table) + i * pairs_ : nullptr;
    };
    return {S_,
            batch_.actions,
            batch_.discount[i],
            batch_.temperature[i],
            at(request_.policy),
            at(request_.advantage),
            request_.value_bar ? request_.value_bar + i * S_ : nullptr,
            at(request_.q_bar),
            at(request_.advantage_bar),
            at(request_.policy_bar),
            at(request_.log_policy_bar),
            slot.probability.data(),
            slot.score.data(),
            slot.q.data(),
            slot.source.data(),
            &slot.inflow};
  }

  void fail(Index i, Slot& slot) const {
    if (request_.reward_bar)
      std::fill_n(static_cast<Real*>(request_.reward_bar) + i * pairs_, pairs_,
                  static_cast<Real>(kNan));
    if (request_.log_reference_bar)
      std::fill_n(request_.log_reference_bar + i * pairs_, pairs_, kNan);
    if (request_.discount_bar) request_.discount_bar[i] = kNan;
    if (request_.temperature_bar) request_.temperature_bar[i] = kNan;
    std::fill_n(slot.weight, pairs_, kNan);
    std::fill_n(slot.expected, pairs_, 0.0);
    std::fill_n(slot.relative, S_, 0.0);
  }

  void write(Index n, Index s0, Index s1, Index groups, const double* weight,
             const double* expected, const double* relative) const {
    Real* const out = static_cast<Real*>(request_.transition_bar);
    const Index row0 = s0 * batch_.actions, row1 = s1 * batch_.actions;
    if (!batch_.sparse()) {
      adjoint_routines().rows<Real>().outer(row1 - row0, S_, groups, pairs_, weight + row0,
                                            expected + row0, relative,
                                            out + (n * pairs_ + row0) * S_);
      return;
    }
    for (Index row = row0; row < row1; ++row)
      for (Index k = batch_.crow[row]; k < batch_.crow[row + 1]; ++k) {
        double total = 0.0;
        for (Index g = 0; g < groups; ++g)
          total += weight[g * pairs_ + row] *
                   (relative[g * S_ + batch_.col[k]] - expected[g * pairs_ + row]);
        out[n * batch_.nnz + k] = static_cast<Real>(total);
      }
  }

  const Batch& batch_;
  const SolveVjp& request_;
  const Index S_, pairs_;
  std::vector<double> weight_, expected_, relative_;
};

// ---- small dense problems: eliminated side by side ----------------------------------------------

// Memory of one worker for kAbreast problems.
class PackedSpace {
 public:
  explicit PackedSpace(Index states)
      : states_(states), numbers_(kAbreast * (states * states + 5 * states)) {}

  double* matrix() { return numbers_.data(); }
  double* defect() { return matrix() + kAbreast * states_ * states_; }
  double* unknown() { return defect() + kAbreast * states_; }
  double* inverse_pivot() { return unknown() + kAbreast * states_; }
  double* given_defect() { return inverse_pivot() + kAbreast * states_; }  // not eliminated
  double* slow() { return given_defect() + kAbreast * states_; }

  // Lanes without a problem hold the identity.
  void clear() {
    std::fill_n(matrix(), kAbreast * states_ * states_, 0.0);
    std::fill_n(defect(), kAbreast * states_, 1.0);
    std::fill_n(unknown(), kAbreast * states_, 0.0);
  }

 private:
  Index states_;
  Aligned<double> numbers_;
};

// The worst of what one worker has seen; ties to the first problem, whoever solved it.
void note(Conditioning& worst, double condition, Index problem) {
  if (condition > worst.condition || (condition == worst.condition && problem < worst.problem))
    worst = {condition, problem};
}

template <class Workers>
Conditioning worst_of(const Workers& workers) {
  Conditioning worst;
  for (const auto& worker : workers)
    if (worker) note(worst, worker->worst().condition, worker->worst().problem);
  return worst;
}

// Problems side by side, a problem per lane.
template <class Real>
class PackedWorker {
 public:
  PackedWorker(const Batch& batch, Rule<Real>& rule, Index most)
      : batch_(batch),
        rule_(rule),
        S_(batch.states),
        A_(batch.actions),
        slots_(most, Slot(S_, S_ * A_)),
        space_(S_),
        row_(S_),
        pulled_(S_) {}

  // Problems [first, first + count).
  void solve(Index first, Index count) {
    first_ = first;
    count_ = count;
    bool full = count == kAbreast;
    for (Index lane = 0; lane < count; ++lane) {
      opened_[lane] = rule_.open(first + lane, slots_[lane]);
      full = full && opened_[lane];
    }
    if (!full) space_.clear();
    std::fill_n(mass_, kAbreast, 0.0);
    std::fill_n(small_, kAbreast, false);
    for (Index lane = 0; lane < count; ++lane)
      if (opened_[lane]) read(lane);
    eliminate();
    for (Index lane = 0; lane < count; ++lane) close(lane);
  }

  const Conditioning& worst() const { return worst_; }

 private:
  // The system of a problem, from the only reading of its P.
  void read(Index lane) {
    const AdjointRowRoutines<Real>& routines = adjoint_routines().rows<Real>();
    const Index i = first_ + lane, S = S_, A = A_;
    const double gamma = batch_.discount[i];
    const Real* const p =
        static_cast<const Real*>(batch_.transition) + i / batch_.problems * S * A * S;
    Slot& slot = slots_[lane];
    routines.moments(p, S * A, S, slot.relative, slot.inverse_sum.data(), slot.expected);
    if (rule_.pulls()) rule_.weigh(i, 0, S, slot);
    for (Index j = 0; j < S * A; ++j)
      slot.weight[j] = gamma * slot.probability[j] * slot.inverse_sum[j];
    std::fill(pulled_.begin(), pulled_.end(), 0.0);
    for (Index s = 0; s < S; ++s) {
      RowMass mass;
      for (Index j = s * A; j < s * A + A; ++j) mass.add(slot.probability[j], slot.inverse_sum[j]);
      space_.defect()[s * kAbreast + lane] = mass.defect(gamma, A);
      dense_routines().rows<Real>().two_policy_rows(
          p + s * A * S, A, S, slot.weight + s * A,
          rule_.pulls() ? slot.scaled.data() + s * A : nullptr, row_.data(), pulled_.data());
      double* const entries = space_.matrix() + s * S * kAbreast + lane;
      for (Index t = 0; t < S; ++t) entries[t * kAbreast] = row_[t];
    }
    for (Index s = 0; s < S; ++s)
      space_.unknown()[s * kAbreast + lane] = slot.source[s] + pulled_[s];
    mass_[lane] = rule_.mass(i, slot);
    small_[lane] = 1.0 - gamma < kSmallGap;
  }

  void eliminate() {
    const PackedElimination& packed = adjoint_routines().packed;
    const bool any_small = std::count(small_, small_ + kAbreast, true) > 0;
    if (any_small) std::copy_n(space_.defect(), kAbreast * S_, space_.given_defect());
    packed.solve_transpose(S_, space_.matrix(), space_.defect(), space_.inverse_pivot(),
                           space_.unknown());
    take_flows(false);
    if (!any_small) return;
    packed.settle_mass(S_, space_.matrix(), space_.given_defect(), mass_, space_.slow(),
                       space_.unknown());
    take_flows(true);
  }

  void take_flows(bool small) {
    for (Index lane = 0; lane < count_; ++lane)
      if (opened_[lane] && small_[lane] == small)
        for (Index s = 0; s < S_; ++s) slots_[lane].flow[s] = space_.unknown()[s * kAbreast + lane];
  }

  void close(Index lane) {
    const Index i = first_ + lane;
    if (opened_[lane]) {
      if (1.0 - batch_.discount[i] < kTinyGap) {
        SlowPivots slow;
        for (Index s = 0; s < S_; ++s) slow.add(space_.inverse_pivot()[s * kAbreast + lane]);
        note(worst_, slow.condition(), i);
      }
      rule_.close(i, slots_[lane]);
    }
    if (rule_.writes() && !rule_.deferred()) rule_.write_transition(i, 0, S_, slots_[lane]);
  }

  const Batch& batch_;
  Rule<Real>& rule_;
  const Index S_, A_;
  Index first_ = 0, count_ = 0;
  std::vector<Slot> slots_;
  PackedSpace space_;
  std::vector<double> row_, pulled_;
  bool opened_[kAbreast] = {}, small_[kAbreast] = {};  // small: 1 − γ
  double mass_[kAbreast] = {};
  Conditioning worst_;
};

template <class Real>
Conditioning solve_packed(const Batch& batch, Rule<Real>& rule, Team& team, double work,
                          Interrupt& interrupt) {
  const Index total = batch.total(), most = std::min(kAbreast, total);
  std::vector<std::unique_ptr<PackedWorker<Real>>> workers(team.size());
  team.run((total + kAbreast - 1) / kAbreast, work, [&](Index pack, int worker) {
    interrupt.check();
    if (!workers[worker]) workers[worker] = std::make_unique<PackedWorker<Real>>(batch, rule, most);
    const Index first = pack * kAbreast;
    workers[worker]->solve(first, std::min(kAbreast, total - first));
  });
  return worst_of(workers);
}

// ---- the others: one after the other ------------------------------------------------------------

template <class Model>
class SystemWorker {
  using Real = typename Model::Real;
  using System = PolicySystem<Model, Real>;
  static constexpr bool kDense = std::is_same<Model, DenseTransition<Real>>::value;
  // P is dealt out in this many parts, whose shares of a sum over rows are added in order.
  static constexpr Index kParts = kDense ? 32 : 8;

 public:
  SystemWorker(const Batch& batch, const PolicyPattern* pattern, Team& team, Interrupt& interrupt)
      : batch_(batch),
        pattern_(pattern),
        team_(team),
        interrupt_(interrupt),
        slot_(batch.states, batch.states * batch.actions),
        least_(batch.states * batch.actions),
        rows_(team.size(), std::vector<double>(batch.states)) {}

  void solve(const Model& model, Rule<Real>& rule, Index i) {
    const Index S = batch_.states, chunk = model.chunk(), chunks = (S + chunk - 1) / chunk;
    if (rule.open(i, slot_)) {
      if (!matrix_) matrix_ = make_policy_matrix<Model, Real>(model, pattern_, sizeof(Real) == 4);
      // What is stored in float32 is not worth the last digits of a double.
      const double gamma = batch_.discount[i];
      const double tol = sizeof(Real) == 4 ? 1e-9 * (1.0 - gamma) : 0.0;
      System system(model, *matrix_, elimination_, gamma, {true, tol}, team_, interrupt_);
      read(model, rule, i, system);
      const double mass = rule.mass(i, slot_);
      double residual;
      if (system.solve(1, slot_.source.data(), slot_.flow.data(), &residual, &mass) > 0) {
        // Rounding may miss its level by little. The error of the flow, relative to the most that
        // it can be, is the residual over the source: beyond this it would be seen in float32.
        double size = 0.0;
        for (Index s = 0; s < S; ++s) size += std::abs(slot_.source[s]);
        if (!(residual <= 1e-6 * size))
          std::fill(slot_.flow.begin(), slot_.flow.end(), std::numeric_limits<double>::quiet_NaN());
      }
      if (1.0 - gamma < kTinyGap) note(worst_, condition(system), i);
      rule.close(i, slot_);
    }
    if (!rule.writes() || rule.deferred()) return;
    team_.run(chunks, 2.0 * model.work(), [&](Index c, int) {
      rule.write_transition(i, c * chunk, std::min(S, (c + 1) * chunk), slot_);
    });
  }

  const Conditioning& worst() const { return worst_; }

 private:
  // The only reading of P: σ, P W, P_π, and what the cotangent of Q sends back to V.
  void read(const Model& model, const Rule<Real>& rule, Index i, System& system) {
    const Index S = batch_.states, A = batch_.actions;
    const Index chunk = model.chunk(), chunks = (S + chunk - 1) / chunk;
    const Index parts = std::min(kParts, chunks);
    if (rule.pulls()) pulled_.assign(parts * S, 0.0);
    team_.run(parts, 6.0 * model.work(), [&](Index part, int worker) {
      for (Index c = part * chunks / parts; c < (part + 1) * chunks / parts; ++c) {
        interrupt_.check();
        const Index s0 = c * chunk, s1 = std::min(S, s0 + chunk), row0 = s0 * A, row1 = s1 * A;
        double* const row = rows_[worker].data();
        double* const pulled = rule.pulls() ? pulled_.data() + part * S : nullptr;
        if constexpr (kDense) {
          for (Index s = s0; s < s1; ++s) read_state(model, rule, i, system, s, row, pulled);
        } else {
          model.row_sums(row0, row1, slot_.inverse_sum.data() + row0, least_.data() + row0);
          model.products(row0, row1, slot_.relative, slot_.expected + row0);
          for (Index j = row0; j < row1; ++j) {
            slot_.inverse_sum[j] = inverse_row_sum(slot_.inverse_sum[j]);
            slot_.expected[j] *= slot_.inverse_sum[j];
          }
          system.form(s0, s1, slot_.inverse_sum.data(), slot_.probability.data(), row);
          if (!pulled) continue;
          rule.weigh(i, s0, s1, slot_);
          for (Index s = s0; s < s1; ++s) model.policy_row(s, slot_.scaled.data() + s * A, pulled);
        }
      }
    });
    if (!rule.pulls()) return;
    for (Index part = 0; part < parts; ++part)
      for (Index t = 0; t < S; ++t) slot_.source[t] += pulled_[part * S + t];
  }

  // By the pivots, or without them by what becomes of a right-hand side without mass.
  double condition(System& system) const {
    if (system.eliminated()) return elimination_->condition();
    const Index S = batch_.states;
    std::vector<double> probe(S), found(S);
    double mean = 0.0, size = 0.0, grown = 0.0, residual;
    for (Index s = 0; s < S; ++s) mean += probe[s] = std::sin(12.9898 * static_cast<double>(s));
    mean /= static_cast<double>(S);
    for (double& x : probe) size += std::abs(x -= mean);
    const double mass = 0.0;
    system.solve(1, probe.data(), found.data(), &residual, &mass);
    if (system.eliminated()) return elimination_->condition();
    for (const double x : found) grown += std::abs(x);
    return grown / size;
  }

  // One state while its rows of P are in the first-level cache.
  void read_state(const Model& model, const Rule<Real>& rule, Index i, System& system, Index s,
                  double* row, double* pulled) {
    const AdjointRowRoutines<Real>& routines = adjoint_routines().rows<Real>();
    const Index S = batch_.states, A = batch_.actions, j = s * A;
    const Real* const p = model.values + j * S;
    routines.moments(p, A, S, slot_.relative, slot_.inverse_sum.data() + j, slot_.expected + j);
    const double* const weight =
        system.weigh(s, s + 1, slot_.inverse_sum.data(), slot_.probability.data());
    if (pulled) rule.weigh(i, s, s + 1, slot_);
    dense_routines().rows<Real>().two_policy_rows(
        p, A, S, weight + j, pulled ? slot_.scaled.data() + j : nullptr, row, pulled);
    system.matrix().put_row(s, row);
  }

  const Batch& batch_;
  const PolicyPattern* pattern_;
  Team& team_;
  Interrupt& interrupt_;
  Slot slot_;
  std::vector<double> least_, pulled_;
  std::vector<std::vector<double>> rows_;
  std::unique_ptr<typename System::Matrix> matrix_;
  std::unique_ptr<Elimination> elimination_;
  Conditioning worst_;
};

// Across problems where there are enough of them, else across the states of one.
template <class ModelOf, class Real>
Conditioning solve_systems(const Batch& batch, Rule<Real>& rule, ModelOf&& model_of, Team& team,
                           double work, Interrupt& interrupt) {
  using Worker = SystemWorker<decltype(model_of(0))>;
  const Index total = batch.total();
  std::unique_ptr<PolicyPattern> pattern;
  if (batch.sparse())
    pattern = std::make_unique<PolicyPattern>(batch.crow, batch.col, batch.states, batch.actions,
                                              true, team);
  Team alone(1);
  const bool across = total >= team.size();
  Team &outer = across ? team : alone, &within = across ? alone : team;
  std::vector<std::unique_ptr<Worker>> workers(outer.size());
  outer.run(total, work, [&](Index i, int worker) {
    interrupt.check();
    if (!workers[worker])
      workers[worker] = std::make_unique<Worker>(batch, pattern.get(), within, interrupt);
    workers[worker]->solve(with_pattern(model_of(i / batch.problems), pattern.get()), rule, i);
  });
  return worst_of(workers);
}

}  // namespace

Conditioning solve_vjp(const Batch& batch, const SolveVjp& request, Interrupt& interrupt) {
  const Index S = batch.states, A = batch.actions, total = batch.total();
  const Index bytes = batch.transitions * (batch.sparse() ? batch.nnz : S * A * S) *
                      static_cast<Index>(batch.is_double ? sizeof(double) : sizeof(float));
  if (total == 0) {  // transitions without problems
    if (request.transition_bar && bytes > 0) std::memset(request.transition_bar, 0, bytes);
    return {};
  }
  if (request.transition_bar) prefer_huge_pages(request.transition_bar, bytes);
  Conditioning worst;
  with_models(batch, [&](auto model_of) {
    using Model = decltype(model_of(0));
    using Real = typename Model::Real;
    const double problems = static_cast<double>(total), pass = model_of(0).work();
    const double work = problems * (12.0 * pass + static_cast<double>(S * S * S / 3));
    Rule<Real> rule(batch, request);
    Team team(request.threads);
    worst = !batch.sparse() && S <= PackedElimination::kMostStates
                ? solve_packed(batch, rule, team, work, interrupt)
                : solve_systems(batch, rule, model_of, team, work, interrupt);
    if (!rule.deferred()) return;
    const Index chunk = model_of(0).chunk(), chunks = (S + chunk - 1) / chunk;
    team.run(batch.transitions * chunks, 2.0 * problems * pass, [&](Index item, int) {
      const Index s0 = item % chunks * chunk;
      rule.write_deferred(item / chunks, s0, std::min(S, s0 + chunk));
    });
  });
  return worst;
}

}  // namespace birl
