// The fixed point V* = TV* of one problem (n, g) by one team; the algorithm of
// cpu/solvers/packed_solver.h and the bound of cpu/solvers/certificate.h, in the relative form V =
// c + W.
//
// Work of one sweep, with a barrier after each line:
//   rows     q'(s,a) = r + γ Σ_t P W(t)/σ           a thread owns whole rows
//   rows     e(s,a) = exp((q' − max_a q')/τ + log μ)  each reads its state's A numbers
//   states   tw = τ log Σ_a e, δ = tw − W − (1−γ)c, and the range of both over all states
//   control  one thread: certificate, and what comes next (cuda/block/control.h)
//   states   W := tw, or Newton's step: form N = γP_π, eliminate (cpu/solvers/elimination.h), W :=
//   W + x
// Bytes per problem: reads P once (homes on chip), S·A rewards a sweep (L1), writes 8·S + 4·S·A
// numbers. Floor: P and the tables at the memory's speed; a sweep on chip waits for four barriers
// and two chains of some thirty dependent operations (exp, log).
// Invariants: bits do not depend on the team's size or kind, nor on the other problems; an invalid
// problem writes NaN and its status, and touches nothing else.
#pragma once

#include "cuda/block/control.h"
#include "cuda/block/elimination.h"
#include "cuda/block/rows.h"
#include "cuda/block/soft_maximum.h"

namespace birl::device {

template <class Real>
struct SolveArguments {
  Index problems;               // G: item = n·G + g
  const Real* reward;           // (N,G,S,A)
  const double* log_reference;  // (N,G,S,A) or null
  const double* discount;       // (N,G)
  const double* temperature;    // (N,G)
  const double* initial;        // (N,G,S) or null
  double *value, *relative;     // (N,G,S): value = offset + relative
  Real* q;                      // (N,G,S,A), as the next three
  Real* advantage;
  Real* policy;
  Real* log_policy;
  double* info;   // (N,G,kInfo + S)
  Index* status;  // (N,G)
  SolveOptions options;
  Kernel kernel;                     // what `info` will call this one
  bool direct;                       // whether to make room for an elimination
  bool spill_matrix, spill_vectors;  // what lies in the workspace instead of on chip
};

constexpr Index kNowhere = INT64_MAX;

// The first of everything that can be wrong with a problem, and what a certificate needs to know.
struct Findings {
  Index reference;   // (A + 1)s + a: log_reference is NaN or +inf; (A + 1)s + A: no action
  Index reward;      // row of a reward that is not finite
  Index row;         // row that is not a distribution
  Index non_finite;  // entry
  Index negative;    // entry
  double row_sum;    // of that row
  double largest_reward, largest_reference;
  int longest;
  bool continues;

  BIRL_DEVICE static Findings nothing() {
    return {kNowhere, kNowhere, kNowhere, kNowhere, kNowhere, 0.0, 0.0, 0.0, 0, true};
  }
  BIRL_DEVICE static Index first(Index x, Index y) { return y < x ? y : x; }
  BIRL_DEVICE static Findings join(const Findings& x, const Findings& y) {
    return {first(x.reference, y.reference),
            first(x.reward, y.reward),
            first(x.row, y.row),
            first(x.non_finite, y.non_finite),
            first(x.negative, y.negative),
            y.row < x.row ? y.row_sum : x.row_sum,
            larger(x.largest_reward, y.largest_reward),
            larger(x.largest_reference, y.largest_reference),
            x.longest > y.longest ? x.longest : y.longest,
            x.continues && y.continues};
  }
};

template <class Home>
struct SolveKernel {
  using Real = typename Home::Real;
  static constexpr int kTeamsPerProcessor = Home::kTeamsPerProcessor;
  static constexpr bool kOneWarp = Home::kOneWarp;

  Home home;
  SolveArguments<Real> arguments;

  struct Arrays {
    typename Home::Memory rows;
    SolveControl* control;
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
    m.control = chip.template take<SolveControl>(1);
    if constexpr (Home::kOnChip) {
      lay_out_vectors(chip, m);
      lay_out_matrix(chip, m);
    } else {
      if (arguments.spill_vectors)
        lay_out_vectors(spill, m);
      else
        lay_out_vectors(chip, m);
      if (arguments.spill_matrix)
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
    if (!arguments.direct) return;
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

 public:
  BIRL_DEVICE Solving(const Problem& kernel, Team& team, const typename Problem::Arrays& arrays,
                      Index item)
      : kernel_(kernel),
        given_(kernel.arguments),
        team_(team),
        m_(arrays),
        item_(item),
        S_(kernel.home.states),
        A_(kernel.home.actions),
        reward_(given_.reward + item * S_ * A_),
        reference_{given_.log_reference ? given_.log_reference + item * S_ * A_ : nullptr},
        discount_(given_.discount[item]),
        temperature_(given_.temperature[item]),
        rows_(kernel.home, team, arrays.rows, item / given_.problems) {}

  BIRL_DEVICE void run() {
    rows_.load();
    const Findings found = inspect();
    const Status verdict = judge(found);
    if (verdict != Status::kConverged) return refuse(verdict, found);
    begin(found);
    for (;;) {
      const SweepRange range = sweep();
      const Step step = static_cast<Step>(
          team_.decide([&] { return static_cast<int>(m_.control->next(range)); }));
      if (step == Step::kStop) break;
      if (step == Step::kNewton)
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
          Findings found = Findings::nothing();
          rows_.each(t, [&](int row, const Entries& entries) { inspect_row(row, entries, found); });
          for (int s = t.rank; s < S_; s += t.count)
            if (!reference_.any(s * A_, A_))
              found.reference =
                  Findings::first(found.reference, static_cast<Index>(s) * (A_ + 1) + A_);
          return found;
        },
        Findings::join);
  }

  BIRL_DEVICE void inspect_row(int row, const Entries& entries, Findings& found) {
    const double sum = entries.sum();
    m_.inverse_sum[row] = sum == 0.0 ? 0.0 : 1.0 / sum;
    found.longest = entries.count() > found.longest ? entries.count() : found.longest;
    const double spare = below_zero<Real>(S_);
    bool signs_right = true;
    entries.scan([&](int i, Real p) {
      if (!(p - p == Real(0)))
        found.non_finite = Findings::first(found.non_finite, entries.start + i);
      else if (p < -spare)
        found.negative = Findings::first(found.negative, entries.start + i);
      signs_right = signs_right && p >= -spare;
    });
    const double tolerance = (sizeof(Real) == 4 ? 1e-5 : 1e-8) + spare;
    const bool ends = sum == 0.0 && given_.options.validate == Rigour::kOrEnding;
    if (!(signs_right && is_finite(sum) && (ends || magnitude(sum - 1.0) <= tolerance)) &&
        row < found.row) {
      found.row = row;
      found.row_sum = sum;
    }

    const Real reward = reward_[row];
    const double reference = reference_[row];
    if (!(reward - reward == Real(0))) found.reward = Findings::first(found.reward, row);
    if (!(reference < kInf))
      found.reference =
          Findings::first(found.reference, static_cast<Index>(row / A_) * (A_ + 1) + row % A_);
    if (reference == -kInf) return;
    found.largest_reward = larger(found.largest_reward, magnitude(static_cast<double>(reward)));
    found.largest_reference = larger(found.largest_reference, magnitude(reference));
    found.continues = found.continues && sum != 0.0;
  }

  // The first thing wrong, in the order of cpu/model/validate.h.
  BIRL_DEVICE Status judge(const Findings& found) const {
    if (!(discount_ >= 0.0 && discount_ < 1.0)) return Status::kDiscount;
    if (!(temperature_ > 0.0 && temperature_ < kInf)) return Status::kTemperature;
    if (given_.options.validate == Rigour::kOff) return Status::kConverged;
    if (found.reference != kNowhere)
      return found.reference % (A_ + 1) == A_ ? Status::kNoAction : Status::kReference;
    if (found.reward != kNowhere) return Status::kNonFiniteReward;
    if (found.row == kNowhere) return Status::kConverged;
    if (found.non_finite != kNowhere) return Status::kNonFiniteProbability;
    if (found.negative != kNowhere) return Status::kNegativeProbability;
    return Status::kRowSum;
  }

  BIRL_DEVICE void refuse(Status verdict, const Findings& found) {
    const Real nan = static_cast<Real>(kInf - kInf);
    team_.phase([&](Thread t) {
      const Index first = item_ * S_ * A_;
      for (int s = t.rank; s < S_; s += t.count)
        given_.value[item_ * S_ + s] = given_.relative[item_ * S_ + s] = nan;
      for (Index i = first + t.rank; i < first + S_ * A_; i += t.count)
        given_.q[i] = given_.advantage[i] = given_.policy[i] = given_.log_policy[i] = nan;
      write_bounds(t, nan);
      if (t.rank != 0) return;
      double culprit = 0.0;
      const Index place = locate(verdict, found, culprit);
      given_.status[item_] = static_cast<Index>(verdict);
      write_info(nan, nan, 0, place, culprit, nan);
    });
  }

  BIRL_DEVICE Index locate(Status verdict, const Findings& found, double& culprit) {
    const Real* const stored = kernel_.home.stored(item_ / given_.problems);
    const Index state = found.reference / (A_ + 1);
    switch (verdict) {
      case Status::kDiscount:
        culprit = discount_;
        return 0;
      case Status::kTemperature:
        culprit = temperature_;
        return 0;
      case Status::kNoAction:
        return state;
      case Status::kReference:
        culprit = reference_[static_cast<int>(found.reference - state)];
        return found.reference - state;
      case Status::kNonFiniteReward:
        culprit = static_cast<double>(reward_[found.reward]);
        return found.reward;
      case Status::kNonFiniteProbability:
        culprit = static_cast<double>(stored[found.non_finite]);
        return found.non_finite;
      case Status::kNegativeProbability:
        culprit = static_cast<double>(stored[found.negative]);
        return found.negative;
      default:
        culprit = found.row_sum;
        return found.row;
    }
  }

  // ---- iteration --------------------------------------------------------------------------------

  BIRL_DEVICE void begin(const Findings& found) {
    const double* const initial = given_.initial ? given_.initial + item_ * S_ : nullptr;
    const double most = given_.options.method == kSweep
                            ? kInf
                            : largest_possible(found.largest_reward, found.largest_reference, A_,
                                               temperature_, discount_);
    const SweepRange start = team_.template reduce<SweepRange>(
        [&](Thread t) {
          SweepRange range = SweepRange::nothing();
          for (int s = t.rank; s < S_; s += t.count) {
            m_.image[s] = initial ? within(initial[s], most) : 0.0;
            range.add(0.0, m_.image[s]);
          }
          for (int s = S_ + t.rank; s < kernel_.home.padded(); s += t.count) m_.w[s] = 0.0;
          return range;
        },
        SweepRange::join);
    team_.decide([&] {
      SolveControl& control = *m_.control;
      control.options = given_.options;
      control.discount = discount_;
      control.temperature = temperature_;
      control.states = S_;
      control.actions = A_;
      control.largest_reward = found.largest_reward;
      control.largest_reference = found.largest_reference;
      control.additions = chained_additions(found.longest);
      control.continues = found.continues;
      control.direct = given_.direct;
      control.begin(initial == nullptr);
      control.c = 0.0;
      control.centre(start.image_low, start.image_high);
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
      const bool from_zero = m_.control->from_zero;
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
          SweepRange range = SweepRange::nothing();
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
        double stopping = 0.0;
        for (int row = s * A_; row < (s + 1) * A_; ++row) {
          const double policy = m_.e[row] / m_.total[s];
          if (m_.inverse_sum[row] == 0.0) stopping += policy;
          m_.e[row] = discount_ * (policy * m_.inverse_sum[row]);
        }
        m_.defect[s] = (1.0 - discount_) + discount_ * stopping;
        m_.delta[s] -= share;
      }
    });
    rows_.form(m_.e, MatrixView{m_.matrix, S_, false});
    eliminate(team_, Elimination{S_, m_.matrix, m_.defect, m_.pivot}, false, 1, m_.delta);
    const SweepRange moved = team_.template reduce<SweepRange>(
        [&](Thread t) {
          SweepRange range = SweepRange::nothing();
          for (int s = t.rank; s < S_; s += t.count) {
            m_.image[s] = m_.w[s] + m_.delta[s] / m_.pivot[s];
            range.add(0.0, m_.image[s]);
          }
          return range;
        },
        SweepRange::join);
    team_.decide([&] {
      SolveControl& control = *m_.control;
      control.accept_newton(control.step_share(), moved.image_low, moved.image_high);
      return 0;
    });
    recentre(m_.image);
  }

  // ---- what is handed out -----------------------------------------------------------------------

  BIRL_DEVICE void finish() {
    const SoftMaximum soft{m_.q, reference_, A_, temperature_};
    team_.phase([&](Thread t) {
      const double offset = m_.control->offset();
      for (int s = t.rank; s < S_; s += t.count) {
        given_.value[item_ * S_ + s] = m_.image[s] + offset;
        given_.relative[item_ * S_ + s] = m_.image[s];
      }
      for (int row = t.rank; row < S_ * A_; row += t.count) {
        const int s = row / A_;
        const Index at = item_ * S_ * A_ + row;
        const bool masked = reference_[row] == -kInf;
        const double advantage = masked ? 0.0 : m_.q[row] - m_.image[s];
        given_.advantage[at] = static_cast<Real>(advantage);
        given_.q[at] = static_cast<Real>(advantage + (m_.image[s] + offset));
        given_.policy[at] = static_cast<Real>(m_.e[row] / m_.total[s]);
        given_.log_policy[at] = static_cast<Real>(soft.exponent(row) - log_from_one(m_.total[s]));
      }
      const SolveControl& control = *m_.control;
      write_bounds(t, control.error_bound());
      if (t.rank != 0) return;
      given_.status[item_] = static_cast<Index>(control.verdict(sizeof(Real) == 4));
      write_info(control.half_span(), control.error_bound(), control.passes, 0, 0.0, offset);
    });
  }

  BIRL_DEVICE double* info() const { return given_.info + item_ * (kInfo + S_); }

  // The bounds of the states, which are all the same.
  BIRL_DEVICE void write_bounds(Thread t, double bound) {
    for (int s = t.rank; s < S_; s += t.count) info()[kInfo + s] = bound;
  }

  BIRL_DEVICE void write_info(double residual, double bound, Index passes, Index place,
                              double culprit, double offset) {
    double* const info = this->info();
    info[0] = residual;
    info[1] = bound;
    info[2] = static_cast<double>(passes);
    info[3] = static_cast<double>(place);
    info[4] = culprit;
    info[5] = 0.0;  // products of inner linear solvers: there are none
    info[6] = temperature_;
    info[7] = offset;
    info[8] = static_cast<double>(given_.kernel);
  }

  const Problem& kernel_;
  const SolveArguments<Real>& given_;
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
