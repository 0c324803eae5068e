// The fixed point V* = TV* of one problem (n, g) by one team; the algorithm of
// cpu/solvers/packed_solver.h, in the relative form V = c + W.
//
// Work of one sweep, with a barrier after each line:
//   rows     q'(s,a) = r + γ Σ_t P W(t)/σ           a thread owns whole rows
//   rows     e(s,a) = exp((q' − max_a q')/τ + log μ)  each reads its state's A numbers
//   states   tw = τ log Σ_a e, δ = tw − W − (1−γ)c, and the range of both over all states
//   control  one thread: certificate, and what comes next (core/control.h)
//   states   W := tw, or Newton's step: form N = γP_π, eliminate (cpu/solvers/elimination.h), W :=
//   W + x
// Bytes per problem: reads P once (homes on chip), S·A rewards a sweep (L1), writes 8·S + 4·S·A
// numbers. Floor: P and the tables at the memory's speed; a sweep on chip waits for four barriers
// and two chains of some thirty dependent operations (exp, log).
// Invariants: bits do not depend on the team's size or kind, nor on the other problems; an invalid
// problem writes NaN and its status, and touches nothing else.
#pragma once

#include "core/control.h"
#include "core/findings.h"
#include "core/system.h"
#include "cuda/block/elimination.h"
#include "cuda/block/rows.h"
#include "cuda/block/selection.h"
#include "cuda/block/soft_maximum.h"
#include "cuda/layer/results.h"

namespace birl::device {

template <class Home>
struct SolveKernel {
  using Real = typename Home::Real;
  static constexpr int kTeamsPerProcessor = Home::kTeamsPerProcessor;
  static constexpr bool kOneWarp = Home::kOneWarp;

  Home home;
  Batch batch;
  Solve request;
  Plan plan;

  struct Arrays {
    typename Home::Memory rows;
    Control* control;
    double* w;            // (padded) V − c
    double* image;        // (S) tw
    double* delta;        // (S) δ, then Newton's right-hand side and step
    double* total;        // (S) Σ_a e
    double* q;            // (S, A)
    double* e;            // (S, A), then weights γπ/σ
    double* inverse_sum;  // (S, A) 1/σ, 0 where σ = 0
    double* matrix;       // (S, S)
    double* defect;       // (S)
    double* pivot;        // (S)
  };

  template <class Chip, class Spill>
  BIRL_HD Arrays lay_out(Chip& chip, Spill& spill) const {
    Arrays m{};
    m.rows = home.lay_out(chip, spill);
    m.control = chip.template take<Control>(1);
    if constexpr (Home::kOnChip) {
      lay_out_vectors(chip, m);
      lay_out_matrix(chip, m);
    } else {
      if (plan.spill_vectors)
        lay_out_vectors(spill, m);
      else
        lay_out_vectors(chip, m);
      if (plan.spill_matrix)
        lay_out_matrix(spill, m);
      else
        lay_out_matrix(chip, m);
    }
    return m;
  }

  template <class Team>
  BIRL_DEVICE void run(Team& team, const Arrays& arrays, Index item) const;

 private:
  template <class Memory>
  BIRL_HD void lay_out_vectors(Memory& memory, Arrays& m) const {
    const Index S = home.states, rows = S * home.actions;
    m.w = memory.template take<double>(home.padded());
    m.image = memory.template take<double>(S);
    m.delta = memory.template take<double>(S);
    m.total = memory.template take<double>(S);
    m.q = memory.template take<double>(rows);
    m.e = memory.template take<double>(rows);
    m.inverse_sum = memory.template take<double>(rows);
  }
  template <class Memory>
  BIRL_HD void lay_out_matrix(Memory& memory, Arrays& m) const {
    const Index S = home.states;
    if (!plan.direct) return;
    m.matrix = memory.template take<double>(S * S);
    m.defect = memory.template take<double>(S);
    m.pivot = memory.template take<double>(S);
  }
};

// One problem while a team works on it.
template <class Home, class Team>
class Solving {
  using Real = typename Home::Real;
  using Problem = SolveKernel<Home>;
  using Rows = typename Home::template Local<Team>;
  using Entries = typename Rows::Entries;
  static constexpr bool kDouble = sizeof(Real) == 8;

 public:
  BIRL_DEVICE Solving(const Problem& kernel, Team& team, const typename Problem::Arrays& arrays,
                      Index item)
      : kernel_(kernel),
        request_(kernel.request),
        team_(team),
        m_(arrays),
        item_(item),
        S_(kernel.home.states),
        A_(kernel.home.actions),
        reward_(static_cast<const Real*>(kernel.batch.reward) + item * S_ * A_),
        reference_{kernel.batch.log_reference ? kernel.batch.log_reference + item * S_ * A_
                                              : nullptr},
        discount_(kernel.batch.discount[item]),
        temperature_(kernel.batch.temperature[item]),
        rows_(kernel.home, team, arrays.rows, item / kernel.batch.problems) {}

  BIRL_DEVICE void run() {
    rows_.load();
    const Findings found = inspect();
    const Defect defect = judge(found);
    if (defect.status != Status::kConverged) return refuse(defect);
    begin(found, request_.initial ? request_.initial + item_ * S_ : nullptr);
    for (;;) {
      const SweepRange range = sweep();
      const Step step = static_cast<Step>(team_.decide([&] {
        m_.control->take(range);
        return static_cast<int>(m_.control->next());
      }));
      if (step == Step::kStop) break;
      if (step == Step::kImprove)
        newton();
      else
        accept_sweep();
    }
    finish();
  }

 private:
  // ---- what is given ----------------------------------------------------------------------------

  // Row sums, and everything that could be wrong.
  BIRL_DEVICE Findings inspect() {
    return team_.template reduce<Findings>(
        [&](Thread t) {
          Findings found;
          rows_.each(t, [&](int row, const Entries& entries) { inspect_row(row, entries, found); });
          for (int s = t.rank; s < S_; s += t.count)
            if (!reference_.any(s * A_, A_)) found.see_no_action(s);
          return found;
        },
        Findings::join);
  }

  BIRL_DEVICE void inspect_row(int row, const Entries& entries, Findings& found) {
    const double sum = entries.sum(), spare = below_zero(kDouble, S_);
    m_.inverse_sum[row] = inverse_row_sum(sum);
    found.longest = entries.count() > found.longest ? entries.count() : found.longest;
    bool signs_right = true;
    entries.scan([&](int i, Real p) {
      found.see_entry(entries.start + i, static_cast<double>(p), spare);
      signs_right = signs_right && p >= -spare;
    });
    const double tolerance = row_sum_tolerance(kDouble, S_);
    if (!(signs_right && is_row_sum(sum, request_.validate, tolerance)))
      found.see_bad_row(row, sum);
    const double reward = static_cast<double>(reward_[row]);
    if (found.see_action(row / A_, row % A_, A_, reward, reference_[row]) && sum == 0.0)
      found.continues = false;
  }

  BIRL_DEVICE Defect judge(const Findings& found) const {
    const Real* const stored = kernel_.home.stored(item_ / kernel_.batch.problems);
    const Rigour rigour = request_.validate;
    const Defect defect =
        found.of_problem(rigour, discount_, temperature_, reference_.values,
                         [&](Index row) { return static_cast<double>(reward_[row]); });
    if (defect.status != Status::kConverged || rigour == Rigour::kOff) return defect;
    return found.of_transition([&](Index k) { return static_cast<double>(stored[k]); });
  }

  BIRL_DEVICE void refuse(const Defect& defect) {
    team_.phase([&](Thread t) { results().refuse(t.rank, t.count, defect); });
  }

  // ---- iteration --------------------------------------------------------------------------------

  BIRL_DEVICE void begin(const Findings& found, const double* initial) {
    team_.decide([&] {
      Control& control = *m_.control;
      control = {};
      control.pose(request_, discount_, temperature_, S_, A_, kDouble);
      // Without 1/τ there is no bound.
      control.count_additions(has_inverse(temperature_) ? chained_additions(found.longest) : kInf);
      control.largest_reward = found.largest_reward;
      control.largest_reference = found.largest_reference;
      control.continues = found.continues;
      control.at_zero = initial == nullptr;
      const Method method = request_.method;
      if (kernel_.plan.direct && method >= Method::kNewton && method != Method::kSweep)
        control.mode = Mode::kElimination;
      // Clocks of one team, from instruction counts (not measured on a GPU): latency first, then
      // work over some hundred lanes. They depend on the shape alone, so all kernels decide alike.
      const double S = S_, A = A_;
      control.means.elimination = kernel_.plan.direct;
      control.means.sweep = 1000.0 + S * A * (S + 100.0) / 128.0;
      control.means.elimination_step = control.means.sweep + S * (150.0 + 0.75 * S + S * S / 256.0);
      return 0;
    });
    const SweepRange start = team_.template reduce<SweepRange>(
        [&](Thread t) {
          SweepRange range;
          for (int s = t.rank; s < S_; s += t.count) {
            m_.image[s] = initial ? m_.control->start(initial[s]) : 0.0;
            range.add(0.0, m_.image[s]);
          }
          for (int s = S_ + t.rank; s < kernel_.home.padded(); s += t.count) m_.w[s] = 0.0;
          return range;
        },
        SweepRange::join);
    team_.decide([&] {
      m_.control->centre(start.least, start.most);
      return 0;
    });
    recentre(m_.image);
  }

  // W := image − middle
  BIRL_DEVICE void recentre(const double* image) {
    team_.phase([&](Thread t) {
      const double middle = m_.control->middle;
      for (int s = t.rank; s < S_; s += t.count) m_.w[s] = image[s] - middle;
    });
  }

  BIRL_DEVICE SweepRange sweep() {
    team_.phase([&](Thread t) {
      const bool from_zero = m_.control->at_zero;
      rows_.each(t, [&](int row, const Entries& entries) {
        const double reward = static_cast<double>(reward_[row]);
        m_.q[row] =
            from_zero ? reward : reward + discount_ * (entries.dot(m_.w) * m_.inverse_sum[row]);
      });
    });
    const SoftMaximum soft{m_.q, reference_, A_, temperature_};
    team_.phase([&](Thread t) {
      for (int row = t.rank; row < S_ * A_; row += t.count)
        m_.e[row] = exp_nonpositive(soft.exponent(row));
    });
    return team_.template reduce<SweepRange>(
        [&](Thread t) {
          SweepRange range;
          const double constant = (1.0 - discount_) * m_.control->c;
          for (int s = t.rank; s < S_; s += t.count) {
            double total = 0.0;
            for (int row = s * A_; row < (s + 1) * A_; ++row) total += m_.e[row];
            const double image = soft.value(s, total);
            const double delta = (image - m_.w[s]) - constant;
            m_.total[s] = total;
            m_.image[s] = image;
            m_.delta[s] = delta;
            range.add(delta, image);
          }
          return range;
        },
        SweepRange::join);
  }

  BIRL_DEVICE void accept_sweep() {
    team_.decide([&] {
      m_.control->accept_sweep();
      return 0;
    });
    recentre(m_.image);
  }

  // W := W + (I − γP_π)⁻¹ δ
  BIRL_DEVICE void newton() {
    team_.phase([&](Thread t) {
      const double share = m_.control->step_share();
      for (int s = t.rank; s < S_; s += t.count) {
        RowMass mass;
        for (int row = s * A_; row < (s + 1) * A_; ++row) {
          const double policy = m_.e[row] / m_.total[s];
          mass.add(policy, m_.inverse_sum[row]);
          m_.e[row] = discount_ * (policy * m_.inverse_sum[row]);
        }
        m_.defect[s] = mass.defect(discount_, A_);
        m_.delta[s] -= share;
      }
    });
    rows_.form(m_.e, MatrixView{m_.matrix, S_, false});
    eliminate(team_, Elimination{S_, m_.matrix, m_.defect, m_.pivot}, false, 1, m_.delta);
    const SweepRange moved = team_.template reduce<SweepRange>(
        [&](Thread t) {
          SweepRange range;
          for (int s = t.rank; s < S_; s += t.count) {
            m_.image[s] = m_.w[s] + m_.delta[s] / m_.pivot[s];
            range.add(0.0, m_.image[s]);
          }
          return range;
        },
        SweepRange::join);
    team_.decide([&] {
      m_.control->accept_step(m_.control->step_share(), moved.least, moved.most);
      return 0;
    });
    recentre(m_.image);
  }

  // ---- what is handed out -----------------------------------------------------------------------

  BIRL_DEVICE Results<int> results() const {
    return {request_, Home::kName, kDouble, item_, S_, A_, temperature_};
  }

  BIRL_DEVICE void finish() {
    const SoftMaximum soft{m_.q, reference_, A_, temperature_};
    team_.phase([&](Thread t) {
      const double offset = m_.control->offset();
      for (int s = t.rank; s < S_; s += t.count) results().state(s, m_.image[s], offset);
      for (int row = t.rank; row < S_ * A_; row += t.count) {
        const int s = row / A_;
        results().row(row, m_.q[row], reference_.masked(row), m_.image[s], offset,
                      m_.e[row] / m_.total[s], soft.exponent(row) - log_from_one(m_.total[s]));
      }
      results().finish(t.rank, t.count, *m_.control);
    });
  }

  const Problem& kernel_;
  const Solve& request_;
  Team& team_;
  const typename Problem::Arrays& m_;
  Index item_;
  int S_, A_;
  const Real* reward_;
  LogReference reference_;
  double discount_, temperature_;
  Rows rows_;
};

template <class Home>
template <class Team>
BIRL_DEVICE void SolveKernel<Home>::run(Team& team, const Arrays& arrays, Index item) const {
  Solving<Home, Team>(*this, team, arrays, item).run();
}

}  // namespace birl::device
