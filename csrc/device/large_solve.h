// The fixed point V* = TV* of one large problem (n, g) by a team of several blocks; the algorithm
// and the certificate of the CPU's solver for large problems, in the relative form V = c + W.
//
// Who owns what: a block owns a contiguous share of the states (share_of) and everything indexed by
// them. A pass over P, for one tile of its states after another:
//   warps    q'(s,a) = r + γ Σ_t P W(t)/σ, two rows at a time (CSR: a few lanes, one row);
//   groups   tw(s), π(s, ·) and δ(s) (lane_soft_maximum.h), a group of lanes for a state;
//   threads  the rows of P_π while the tile's rows of P are still on chip (wide_rows.h);
// then the range of δ over all states: minimum and maximum, joined in any order to the same bits.
// One barrier of the team a pass. The first pass starts at T0, which needs no P, and also sums the
// rows and looks for bad ones, so P is never read for that alone.
// Between passes: Newton with BiCGStab on P_π (bicgstab.h), or modified policy iteration; vectors
// are dealt out over all threads. What P_π is multiplied with is copied to each block's chip where
// it fits, so only the matrix comes from L2.
//
// Bytes: a pass reads P once and the rewards, writes 8·S·A of q' and the S² (or merged) entries of
// P_π; a product reads P_π once. Floors on an H200 (4.3 TB/s, L2 5.5 TB/s, barrier 1.7 µs; all from
// data sheets, nothing measured): S=1000 A=10 float32 11 µs a pass and about 2.5 µs a product,
// S=4096 A=16 250 µs and 16 µs; in a cluster, S=256, P stays on chip: a barrier of about 0.5 µs.
//
// Invariants: bits depend neither on the number of blocks and threads nor on the kind of team; an
// invalid problem writes NaN and its status, and touches nothing else.
#pragma once

#include "device/bicgstab.h"
#include "device/lane_soft_maximum.h"
#include "device/large_control.h"
#include "device/verdict.h"
#include "device/wide_rows.h"

namespace birl::device {

template <class Home_>
struct LargeSolve {
  using Home = Home_;
  using Real = typename Home::Real;

  Home home;
  SolveArguments<Real> arguments;

  struct Chip {
    typename Home::Chip rows;
    LargeControl* control;
    KrylovColumn* columns;  // one
    double* q;              // (tile, A)
    double* weight;         // (tile, A) π/σ
    double* partial;        // (kMostSums, pieces) where sums are replicated
  };
  struct Arrays {
    double* image[2];     // (S) W + middle, and where the next one goes
    double* delta;        // (S)
    KrylovVectors m;      // (S)
    double* q;            // (S, A)
    double* inverse_sum;  // (S, A) 1/σ, 0 where σ = 0, NaN where the row is wrong
    double* weight;       // (S, A) for products without a merged matrix
    Real* matrix;
  };

  template <class Memory>
  BIRL_HD Chip lay_out_chip(Memory& own) const {
    Chip chip{};
    chip.rows = home.lay_out_chip(own);
    chip.control = own.template take<LargeControl>(1);
    chip.columns = own.template take<KrylovColumn>(1);
    if (!home.far_tables) {
      chip.q = own.template take<double>(home.tile * home.actions);
      chip.weight = own.template take<double>(home.tile * home.actions);
    }
    if (sums_replicated(home.states, 1))
      chip.partial = own.template take<double>(kMostSums * Pieces(home.states).count);
    return chip;
  }

  template <class Common, class Spill>
  BIRL_HD Arrays lay_out(Common& common, Spill& spill) const {
    const Index S = home.states, rows = S * home.actions;
    Arrays m{};
    double** const vectors[] = {&m.image[0], &m.image[1], &m.delta, &m.m.x, &m.m.r,
                                &m.m.shadow, &m.m.p,      &m.m.v,   &m.m.s, &m.m.t};
    for (double** const vector : vectors) *vector = common.template take<double>(S);
    if (!sums_replicated(S, 1))
      m.m.partial = common.template take<double>(kMostSums * Pieces(S).count);
    m.q = spill.template take<double>(rows);
    m.inverse_sum = spill.template take<double>(rows);
    if (home.keeps_weights()) m.weight = spill.template take<double>(rows);
    m.matrix = home.template lay_out_matrix<Real>(spill);
    return m;
  }

  template <class Team>
  BIRL_DEVICE void run(Team& team, const Arrays& arrays, Index item) const;
};

// What one pass found.
struct PassRange {
  SweepRange range;
  Index bad_row, longest;  // the first wrong row, entries of the longest
  bool continues;

  BIRL_DEVICE static PassRange join(const PassRange& x, const PassRange& y) {
    return {SweepRange::join(x.range, y.range), Findings::first(x.bad_row, y.bad_row),
            x.longest > y.longest ? x.longest : y.longest, x.continues && y.continues};
  }
};

struct FirstLook {
  Findings found;
  double low, high;  // of the starting value

  BIRL_DEVICE static FirstLook join(const FirstLook& x, const FirstLook& y) {
    return {Findings::join(x.found, y.found), smaller(x.low, y.low), larger(x.high, y.high)};
  }
};

// One problem while a team works on it.
template <class Home, class Team>
class LargeSolving {
  using Real = typename Home::Real;
  using Problem = LargeSolve<Home>;
  using Block = typename Team::Block;
  using Reading = typename Home::template Reading<Block>;
  using Arrays = typename Problem::Arrays;

 public:
  BIRL_DEVICE LargeSolving(const Problem& kernel, Team& team, const Arrays& arrays, Index item)
      : home_(kernel.home),
        given_(kernel.arguments),
        team_(team),
        m_(arrays),
        item_(item),
        S_(kernel.home.states),
        A_(kernel.home.actions),
        reward_(given_.reward + item * S_ * A_),
        reference_(given_.log_reference ? given_.log_reference + item * S_ * A_ : nullptr),
        discount_(given_.discount[item]),
        temperature_(given_.temperature[item]) {}

  BIRL_DEVICE void run() {
    const FirstLook first = look();
    Status verdict =
        problem_verdict(first.found, given_.options.validate, discount_, temperature_, A_);
    if (verdict != Status::kConverged) return refuse(verdict, first.found);
    begin(first);
    PassRange found = pass<true>();
    if (given_.options.validate != Rigour::kOff && found.bad_row != kNowhere) {
      const Findings wrong = diagnose();
      return refuse(transition_verdict(wrong), wrong);
    }
    team_.decide([&](Block& block) {
      control(block).additions = home_.additions(found.longest);
      return 0;
    });
    if (!found.continues) {
      restart_without_constant(first);
      found = pass<false>();
    }
    for (;;) {
      const LargeStep step = static_cast<LargeStep>(team_.decide(
          [&](Block& block) { return static_cast<int>(control(block).next(found.range)); }));
      if (step == LargeStep::kStop) break;
      if (step == LargeStep::kAcceptSweep)
        accept_sweep();
      else if (step == LargeStep::kKrylov)
        newton();
      else
        modified_policy();
      found = pass<false>();
    }
    finish();
  }

 private:
  BIRL_DEVICE static LargeControl& control(Block& block) { return *block.chip.control; }
  BIRL_DEVICE Reading reading(Block& block) const {
    return Reading(home_, block, block.chip.rows, item_ / given_.problems);
  }
  BIRL_DEVICE Share own(const Block& block) const { return share_of(S_, block.rank, block.count); }
  BIRL_DEVICE const double* reference(Index s) const {
    return reference_ ? reference_ + s * A_ : nullptr;
  }

  // q' and π/σ of the tile that starts at state `first`.
  BIRL_DEVICE double* tile_q(const Block& block, Index first) const {
    return block.chip.q ? block.chip.q : m_.q + first * A_;
  }
  BIRL_DEVICE double* tile_weight(const Block& block, Index first) const {
    return block.chip.weight ? block.chip.weight : m_.weight + first * A_;
  }

  // f(first, last) for one tile of the block's states after another
  template <class F>
  BIRL_DEVICE void tiles(const Block& block, F&& f) const {
    const Share mine = own(block);
    for (Index first = mine.begin; first < mine.end; first += home_.tile)
      f(first, first + home_.tile < mine.end ? first + home_.tile : mine.end);
  }

  // ---- start ------------------------------------------------------------------------------------

  // Everything that could be wrong but P, and the starting value: given, or T0.
  BIRL_STAGE FirstLook look() {
    const double* const initial = given_.initial ? given_.initial + item_ * S_ : nullptr;
    return team_.template reduce<FirstLook>(
        [&](Block& block) {
          reading(block).load();
          tiles(block, [&](Index first, Index last) { start(block, first, last, initial); });
          return block.template reduce<FirstLook>(
              [&](Thread t) {
                FirstLook seen{Findings::nothing(), kInf, -kInf};
                const Share mine = own(block);
                for (Index s = mine.begin + t.rank; s < mine.end; s += t.count) {
                  seen.low = smaller(seen.low, m_.image[0][s]);
                  seen.high = larger(seen.high, m_.image[0][s]);
                  look_at(s, seen.found);
                }
                return seen;
              },
              FirstLook::join);
        },
        FirstLook::join);
  }

  BIRL_DEVICE void start(Block& block, Index first, Index last, const double* initial) {
    block.template groups<Home::kStateLanes>([&](const auto& g) {
      using Group = std::decay_t<decltype(g)>;
      for (Index s = first + g.rank; s < last; s += g.count) {
        double* const q = tile_q(block, first) + (s - first) * A_;
        g.each([&](int lane) {
          for (Index a = lane; a < A_; a += Group::kLanes)
            q[a] = static_cast<double>(reward_[s * A_ + a]);
        });
        LaneSoftMaximum soft{q, reference(s), A_, LaneSoftMaximum::inverse_of(temperature_)};
        if (!initial) soft.measure(g);
        g.each([&](int lane) {
          if (lane == 0) m_.image[0][s] = initial ? initial[s] : soft.value(temperature_);
        });
      }
    });
  }

  BIRL_DEVICE void look_at(Index s, Findings& found) const {
    bool available = false;
    for (Index row = s * A_; row < (s + 1) * A_; ++row) {
      const Real reward = reward_[row];
      const double log_mu = reference_ ? reference_[row] : 0.0;
      if (!(reward - reward == Real(0))) found.reward = Findings::first(found.reward, row);
      if (!(log_mu < kInf))
        found.reference = Findings::first(found.reference, s * (A_ + 1) + row - s * A_);
      if (log_mu == -kInf) continue;
      available = true;
      found.largest_reward = larger(found.largest_reward, magnitude(static_cast<double>(reward)));
      found.largest_reference = larger(found.largest_reference, magnitude(log_mu));
    }
    if (!available) found.reference = Findings::first(found.reference, s * (A_ + 1) + A_);
  }

  // Supposes that every row continues; the first pass tells.
  BIRL_STAGE void begin(const FirstLook& first) {
    now_ = 0;
    team_.decide([&](Block& block) {
      LargeControl& c = control(block);
      c.options = given_.options;
      c.discount = discount_;
      c.temperature = temperature_;
      c.states = static_cast<double>(S_);
      c.actions = static_cast<double>(A_);
      c.largest_reward = first.found.largest_reward;
      c.largest_reference = first.found.largest_reference;
      c.additions = 0.0;  // the first pass tells
      c.continues = true;
      c.direct = false;
      c.start(Home::kStateLanes == 1 ? Way::kModified : Way::kKrylov);
      c.centre(first.low, first.high);
      return 0;
    });
  }

  // Where some row ends, T does not commute with constants: c has to stay zero.
  BIRL_STAGE void restart_without_constant(const FirstLook& first) {
    team_.decide([&](Block& block) {
      LargeControl& c = control(block);
      c.continues = false;
      c.c = 0.0;
      c.centre(first.low, first.high);
      ++c.passes;
      return 0;
    });
  }

  // ---- one pass over P --------------------------------------------------------------------------

  template <bool kInspect>
  BIRL_STAGE PassRange pass() {
    const double* const from = m_.image[now_];
    double* const to = m_.image[1 - now_];
    const double* operand = from;
    if constexpr (!Home::kShifts)
      if (!home_.near) operand = centred(from);
    return team_.template reduce<PassRange>(
        [&](Block& block) {
          const double middle = control(block).middle;
          const double constant = (1.0 - discount_) * control(block).c;
          const bool form = control(block).forms_matrix();
          Reading rows = reading(block);
          const auto matrix = rows.matrix(m_.matrix);
          rows.bring(operand, operand == from ? middle : 0.0);
          tiles(block, [&](Index first, Index last) {
            rows.template rows<kInspect>(first, last, [&](Index row, const auto& sums) {
              if constexpr (kInspect) m_.inverse_sum[row] = inverse(sums[1], sums[2]);
              const double q =
                  static_cast<double>(reward_[row]) + discount_ * (sums[0] * m_.inverse_sum[row]);
              tile_q(block, first)[row - first * A_] = q;
              m_.q[row] = q;
            });
            maximise(block, first, last, from, to, middle, constant);
            if (form) rows.form(first, last, tile_weight(block, first), matrix);
          });
          return block.template reduce<PassRange>(
              [&](Thread t) { return found_by<kInspect>(block, rows, t, to); }, PassRange::join);
        },
        PassRange::join);
  }

  // W in memory, for blocks that have no room for it.
  BIRL_STAGE const double* centred(const double* image) {
    team_.step([&](Block& block) {
      const double middle = control(block).middle;
      block.spread([&](Index first, Index stride) {
        for (Index s = first; s < S_; s += stride) m_.m.v[s] = image[s] - middle;
      });
    });
    return m_.m.v;
  }

  // 1/σ, zero without continuation, NaN where that is not allowed.
  BIRL_DEVICE double inverse(double sum, double negative) const {
    if (given_.options.validate != Rigour::kOff) {
      constexpr bool single = sizeof(Real) == 4;
      const double tolerance = (single ? 1e-5 : 1e-8) +
                               static_cast<double>(S_) * (single ? 1.1920928955078125e-7 : kEps);
      const bool ends = sum == 0.0 && given_.options.validate == Rigour::kOrEnding;
      if (negative != 0.0 || !(ends || magnitude(sum - 1.0) <= tolerance)) return kInf - kInf;
    }
    return sum == 0.0 ? 0.0 : 1.0 / sum;
  }

  BIRL_STAGE void maximise(Block& block, Index first, Index last, const double* from, double* to,
                           double middle, double constant) {
    block.template groups<Home::kStateLanes>([&](const auto& g) {
      using Group = std::decay_t<decltype(g)>;
      for (Index s = first + g.rank; s < last; s += g.count) {
        LaneSoftMaximum soft{tile_q(block, first) + (s - first) * A_, reference(s), A_,
                             LaneSoftMaximum::inverse_of(temperature_)};
        soft.measure(g);
        g.each([&](int lane) {
          for (Index a = lane; a < A_; a += Group::kLanes) {
            const Index row = s * A_ + a;
            const double policy = exp_nonpositive(soft.exponent(a)) / soft.total;
            const double weight = policy * m_.inverse_sum[row];
            tile_weight(block, first)[row - first * A_] = weight;
            if (home_.keeps_weights()) m_.weight[row] = weight;
          }
          if (lane != 0) return;
          const double image = soft.value(temperature_);
          to[s] = image;
          m_.delta[s] = (image - (from[s] - middle)) - constant;
        });
      }
    });
  }

  template <bool kInspect>
  BIRL_DEVICE PassRange found_by(Block& block, const Reading& rows, Thread t,
                                 const double* image) const {
    PassRange found{SweepRange::nothing(), kNowhere, 0, true};
    const Share mine = own(block);
    for (Index s = mine.begin + t.rank; s < mine.end; s += t.count)
      found.range.add(m_.delta[s], image[s]);
    if constexpr (kInspect)
      for (Index row = mine.begin * A_ + t.rank; row < mine.end * A_; row += t.count) {
        const double inverse = m_.inverse_sum[row];
        const Share entries = rows.entries(row);
        const Index length = entries.end - entries.begin;
        found.longest = length > found.longest ? length : found.longest;
        if (inverse != inverse) found.bad_row = Findings::first(found.bad_row, row);
        if (inverse == 0.0 && !(reference_ && reference_[row] == -kInf)) found.continues = false;
      }
    return found;
  }

  // ---- steps between passes ---------------------------------------------------------------------

  BIRL_DEVICE void accept_sweep() {
    now_ = 1 - now_;
    team_.decide([&](Block& block) {
      control(block).accept_sweep();
      return 0;
    });
  }

  // out = in − γP_π in for all states, or out = γP_π in and total += out.
  BIRL_STAGE void multiply(const double* in, double* out, double* total) {
    team_.step([&](Block& block) {
      Reading rows = reading(block);
      rows.product(rows.matrix(m_.matrix), in, 1, m_.weight, [&](Index s, Index, double y) {
        const double image = discount_ * y;
        out[s] = total ? image : in[s] - image;
        if (total) total[s] += image;
      });
    });
  }

  // W := W + x, x ≈ (I − γP_π)⁻¹ δ. Where every row continues x matters only up to a constant: the
  // middle of δ contributes one that accept_newton adds, and of the rest the next pass's middle
  // finds it exactly.
  BIRL_STAGE void newton() {
    const double n = static_cast<double>(S_);
    column_totals<Sum, 1>(
        team_, S_, 1, m_.m.partial,
        [&](Block&, Index s, Index, double (&part)[1]) { part[0] += m_.delta[s]; },
        [&](Block& block, Index, const double (&sum)[1]) {
          block.chip.columns[0].mean_v = control(block).continues ? sum[0] / n : 0.0;
        });
    team_.step([&](Block& block) {
      block.spread([&](Index first, Index stride) {
        for (Index s = first; s < S_; s += stride)
          m_.m.r[s] = m_.delta[s] - block.chip.columns[0].mean_v;
      });
    });
    column_totals<Sum, 1>(
        team_, S_, 1, m_.m.partial,
        [&](Block&, Index s, Index, double (&part)[1]) { part[0] += m_.m.r[s] * m_.m.r[s]; },
        [&](Block& block, Index, const double (&sum)[1]) {
          KrylovColumn& column = block.chip.columns[0];
          column.start = __builtin_sqrt(sum[0]);
          column.target = column.start * control(block).reduction();
          column.active = 1;
        });
    const bool deflate =
        team_.decide([&](Block& block) { return control(block).continues ? 1 : 0; }) != 0;
    constexpr Index kMostProducts = 400;
    bicgstab(team_, S_, 1, deflate, kMostProducts, m_.m,
             [&](const double* in, double* out) { multiply(in, out, nullptr); });
    team_.decide([&](Block& block) {
      const KrylovColumn& column = block.chip.columns[0];
      const double relative = column.start == 0.0 ? 0.0 : column.residual / column.start;
      control(block).krylov_reached(relative, column.products);
      return 0;
    });
    accept_step();
  }

  // Truncated policy evaluation Σ_j (γP_π)^j δ, 20 to 60 terms, until the terms' span is a tenth.
  BIRL_STAGE void modified_policy() {
    team_.step([&](Block& block) {
      const double middle = control(block).delta_middle();
      block.spread([&](Index first, Index stride) {
        for (Index s = first; s < S_; s += stride) m_.m.x[s] = m_.m.p[s] = m_.delta[s] - middle;
      });
    });
    double *term = m_.m.p, *next = m_.m.v;
    Index products = 0;
    while (products < 60) {
      multiply(term, next, m_.m.x);
      double* const last = term;
      term = next;
      next = last;
      ++products;
      if (products % 10 != 0 || products < 20) continue;
      const SweepRange spread = range_of([&](Index s) { return term[s]; });
      const int small = team_.decide([&](Block& block) {
        const LargeControl& c = control(block);
        const double size = c.continues
                                ? 0.5 * (spread.image_high - spread.image_low)
                                : larger(magnitude(spread.image_low), magnitude(spread.image_high));
        return size <= 0.1 * larger(c.half_span(), c.target()) ? 1 : 0;
      });
      if (small) break;
    }
    team_.decide([&](Block& block) {
      control(block).products += products;
      return 0;
    });
    accept_step();
  }

  // Smallest and largest of value(s), as image_low and image_high.
  template <class Value>
  BIRL_DEVICE SweepRange range_of(Value&& value) {
    return team_.template reduce<SweepRange>(
        [&](Block& block) {
          return block.template reduce<SweepRange>(
              [&](Thread t) {
                SweepRange range = SweepRange::nothing();
                const Share mine = own(block);
                for (Index s = mine.begin + t.rank; s < mine.end; s += t.count)
                  range.add(0.0, value(s));
                return range;
              },
              SweepRange::join);
        },
        SweepRange::join);
  }

  BIRL_STAGE void accept_step() {
    const double* const from = m_.image[now_];
    double* const to = m_.image[1 - now_];
    const SweepRange moved = team_.template reduce<SweepRange>(
        [&](Block& block) {
          const double middle = control(block).middle;
          return block.template reduce<SweepRange>(
              [&](Thread t) {
                SweepRange range = SweepRange::nothing();
                const Share mine = own(block);
                for (Index s = mine.begin + t.rank; s < mine.end; s += t.count) {
                  to[s] = (from[s] - middle) + m_.m.x[s];
                  range.add(0.0, to[s]);
                }
                return range;
              },
              SweepRange::join);
        },
        SweepRange::join);
    now_ = 1 - now_;
    team_.decide([&](Block& block) {
      control(block).accept_newton(moved.image_low, moved.image_high);
      return 0;
    });
  }

  // ---- what is handed out -----------------------------------------------------------------------

  // Everything comes from the last pass; P is not read again.
  BIRL_STAGE void finish() {
    const double* const image = m_.image[1 - now_];
    team_.local([&](Block& block) {
      const double offset = control(block).offset();
      const Share mine = own(block);
      block.template groups<Home::kStateLanes>([&](const auto& g) {
        using Group = std::decay_t<decltype(g)>;
        for (Index s = mine.begin + g.rank; s < mine.end; s += g.count) {
          LaneSoftMaximum soft{m_.q + s * A_, reference(s), A_,
                               LaneSoftMaximum::inverse_of(temperature_)};
          soft.measure(g);
          g.each([&](int lane) {
            const double value = image[s] + offset;
            if (lane == 0) given_.value[item_ * S_ + s] = value;
            for (Index a = lane; a < A_; a += Group::kLanes) {
              const Index at = (item_ * S_ + s) * A_ + a;
              const double exponent = soft.exponent(a);
              const double advantage = soft.masked(a) ? 0.0 : soft.q[a] - image[s];
              given_.advantage[at] = static_cast<Real>(advantage);
              given_.q[at] = static_cast<Real>(advantage + value);
              given_.policy[at] = static_cast<Real>(exp_nonpositive(exponent) / soft.total);
              given_.log_policy[at] = static_cast<Real>(exponent - log_from_one(soft.total));
            }
          });
        }
      });
      block.spread([&](Index first, Index) {
        if (first != 0) return;
        const LargeControl& c = control(block);
        given_.status[item_] = static_cast<Index>(c.status);
        write_info(c.half_span(), c.error_bound(), c.passes, {0, 0.0}, c.products, offset);
      });
    });
  }

  // Which entries are to blame for rows that are no distributions.
  BIRL_STAGE Findings diagnose() {
    return team_.template reduce<Findings>(
        [&](Block& block) {
          const Reading rows = reading(block);
          return block.template reduce<Findings>(
              [&](Thread t) {
                Findings found = Findings::nothing();
                const Share mine = own(block);
                for (Index row = mine.begin * A_ + t.rank; row < mine.end * A_; row += t.count)
                  if (m_.inverse_sum[row] != m_.inverse_sum[row]) blame(rows, row, found);
                return found;
              },
              Findings::join);
        },
        Findings::join);
  }

  BIRL_DEVICE void blame(const Reading& rows, Index row, Findings& found) const {
    const Share entries = rows.entries(row);
    double sum = 0.0;
    for (Index k = entries.begin; k < entries.end; ++k) {
      const double p = static_cast<double>(*rows.stored(k));
      sum += p;
      if (!is_finite(p))
        found.non_finite = Findings::first(found.non_finite, k);
      else if (p < 0.0)
        found.negative = Findings::first(found.negative, k);
    }
    if (row < found.row) {
      found.row = row;
      found.row_sum = sum;
    }
  }

  BIRL_STAGE void refuse(Status verdict, const Findings& found) {
    const Real nan = static_cast<Real>(kInf - kInf);
    team_.step([&](Block& block) {
      block.spread([&](Index first, Index stride) {
        const Index base = item_ * S_ * A_;
        for (Index s = first; s < S_; s += stride) given_.value[item_ * S_ + s] = nan;
        for (Index i = base + first; i < base + S_ * A_; i += stride)
          given_.q[i] = given_.advantage[i] = given_.policy[i] = given_.log_policy[i] = nan;
        if (first != 0) return;
        given_.status[item_] = static_cast<Index>(verdict);
        const Real* const stored = reading(block).stored(0);
        write_info(
            nan, nan, 0,
            culprit(verdict, found, A_, discount_, temperature_, stored, reward_, reference_), 0,
            nan);
      });
    });
  }

  BIRL_DEVICE void write_info(double residual, double bound, Index passes, const Culprit& wrong,
                              Index products, double offset) const {
    double* const info = given_.info + item_ * kInfo;
    info[0] = residual;
    info[1] = bound;
    info[2] = static_cast<double>(passes);
    info[3] = static_cast<double>(wrong.place);
    info[4] = wrong.value;
    info[5] = static_cast<double>(products);
    info[6] = temperature_;
    info[7] = offset;
    info[8] = static_cast<double>(given_.kernel);
  }

  const Home& home_;
  const SolveArguments<Real>& given_;
  Team& team_;
  const Arrays& m_;
  Index item_, S_, A_;
  const Real* reward_;
  const double* reference_;
  double discount_, temperature_;
  int now_ = 0;  // m_.image[now_] − middle is W
};

template <class Home>
template <class Team>
BIRL_DEVICE void LargeSolve<Home>::run(Team& team, const Arrays& arrays, Index item) const {
  LargeSolving<Home, Team>(*this, team, arrays, item).run();
}

}  // namespace birl::device
