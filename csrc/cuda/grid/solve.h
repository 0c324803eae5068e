// The fixed point V* = TV* of one large problem (n, g) by a team of several blocks, in the relative
// form V = c + W: Newton's method, its linear system solved by products with P_π as far as the step
// is worth it, or value iteration; the certificate is that of every other solver here.
//
// Who owns what: a block owns a contiguous share of the states (share_of) and everything indexed by
// them. A pass over P, for one tile of its states after another:
//   warps    q'(s,a) = r + γ Σ_t P W(t)/σ, two rows at a time (CSR: a few lanes, one row);
//   groups   tw(s), π(s, ·) and δ(s) (cuda/grid/soft_maximum.h), a group of lanes for a state;
//   threads  the rows of P_π while the tile's rows of P are still in L1 or L2 (cuda/grid/rows.h);
// then the range of δ over all states: minimum and maximum, joined in any order to the same bits.
// One barrier of the team a pass, and one for each product. The first pass starts at T0, which
// needs no P, and also sums the rows and looks for bad ones, so P is never read for that alone.
//
// Bytes: a pass reads P once from memory and the rewards, writes 16·S·A of q' and π/σ and the S²
// (or merged) entries of P_π in double precision; a product reads those once. Floors on an H200
// (4.3 TB/s, L2 5.5 TB/s, barrier 1.7 µs; all from data sheets, nothing measured): S=1000 A=10
// float32 11 µs a pass and 3.2 µs a product, S=4096 A=16 280 µs and 31 µs; 1e6 states on a grid
// with five actions, float64, 93 µs and 14 µs.
//
// Invariants: bits depend neither on the number of blocks nor of threads; an invalid problem writes
// NaN and its status, and touches nothing else.
#pragma once

#include "core/request.h"
#include "cuda/block/verdict.h"
#include "cuda/grid/control.h"
#include "cuda/grid/rows.h"
#include "cuda/grid/soft_maximum.h"

namespace birl::device {

template <class Home_>
struct LargeSolve {
  using Home = Home_;

  Home home;
  Batch batch;
  Solve request;
  Kernel name;  // what `info` will call this one

  struct Chip {
    LargeControl control;
  };
  struct Arrays {
    double* image[2];     // (S) W + middle, and where the next one goes
    double* delta;        // (S)
    double* step;         // (S) Newton's
    double* term[2];      // (S, padded) of the series for it
    double* q;            // (S, A)
    double* inverse_sum;  // (S, A) 1/σ, 0 where σ = 0, NaN where the row is wrong
    double* weight;       // (S, A) π/σ
    double* matrix;       // P_π
  };

  template <class Memory>
  BIRL_HD Arrays lay_out(Memory& memory) const {
    const Index S = home.states, rows = S * home.actions;
    Arrays m{};
    double** const vectors[] = {&m.image[0], &m.image[1], &m.delta, &m.step};
    for (double** const vector : vectors) *vector = memory.template take<double>(S);
    for (double*& term : m.term) term = memory.template take<double>(home.padded_states());
    double** const tables[] = {&m.q, &m.inverse_sum, &m.weight};
    for (double** const table : tables) *table = memory.template take<double>(rows);
    m.matrix = memory.template take<double>(home.matrix_entries());
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

  BIRL_DEVICE static PassRange nothing() { return {SweepRange::nothing(), kNowhere, 0, true}; }
  BIRL_DEVICE static PassRange join(const PassRange& x, const PassRange& y) {
    return {SweepRange::join(x.range, y.range), Findings::first(x.bad_row, y.bad_row),
            x.longest > y.longest ? x.longest : y.longest, x.continues && y.continues};
  }
};

// What can be wrong besides P, as in Findings, and the range of the starting value.
struct FirstLook {
  Index reference, reward;
  double largest_reference, largest_reward;
  double low, high;

  BIRL_DEVICE static FirstLook nothing() { return {kNowhere, kNowhere, 0.0, 0.0, kInf, -kInf}; }
  BIRL_DEVICE static FirstLook join(const FirstLook& x, const FirstLook& y) {
    return {Findings::first(x.reference, y.reference),
            Findings::first(x.reward, y.reward),
            larger(x.largest_reference, y.largest_reference),
            larger(x.largest_reward, y.largest_reward),
            smaller(x.low, y.low),
            larger(x.high, y.high)};
  }
};

// The first wrong row of P, and the first wrong entries of any row.
struct Blame {
  Index row, non_finite, negative;
  double row_sum;  // of that row

  BIRL_DEVICE static Blame nothing() { return {kNowhere, kNowhere, kNowhere, 0.0}; }
  BIRL_DEVICE static Blame join(const Blame& x, const Blame& y) {
    return {Findings::first(x.row, y.row), Findings::first(x.non_finite, y.non_finite),
            Findings::first(x.negative, y.negative), y.row < x.row ? y.row_sum : x.row_sum};
  }
};

// One problem while a team works on it.
template <class Home, class Team>
class LargeSolving {
  using Problem = LargeSolve<Home>;
  using Block = typename Team::Block;
  using Reading = typename Home::template Reading<Block>;
  using Arrays = typename Problem::Arrays;

 public:
  BIRL_DEVICE LargeSolving(const Problem& kernel, Team& team, const Arrays& arrays, Index item)
      : home_(kernel.home),
        batch_(kernel.batch),
        request_(kernel.request),
        name_(kernel.name),
        team_(team),
        m_(arrays),
        item_(item),
        S_(kernel.home.states),
        A_(kernel.home.actions) {}

  BIRL_DEVICE void run() {
    const FirstLook first = look();
    Findings found = Findings::nothing();
    found.reference = first.reference;
    found.reward = first.reward;
    Status verdict = problem_verdict(found, request_.validate, discount(), temperature(), A_);
    if (verdict == Status::kConverged) {
      begin(first);
      const Blame blame = iterate();
      found = Findings::nothing();  // so that nothing of it was kept meanwhile
      found.row = blame.row;
      found.row_sum = blame.row_sum;
      found.non_finite = blame.non_finite;
      found.negative = blame.negative;
      if (blame.row != kNowhere) verdict = transition_verdict(found);
    }
    if (verdict == Status::kConverged)
      finish();
    else
      refuse(verdict, found);
  }

 private:
  BIRL_DEVICE double discount() const { return batch_.discount[item_]; }
  BIRL_DEVICE double temperature() const { return batch_.temperature[item_]; }
  BIRL_DEVICE double reward(Index row) const {
    return Stored{batch_.reward, batch_.is_double}[item_ * S_ * A_ + row];
  }
  BIRL_DEVICE const double* reference(Index row) const {
    return batch_.log_reference ? batch_.log_reference + item_ * S_ * A_ + row : nullptr;
  }
  BIRL_DEVICE bool masked(Index row) const {
    const double* const log_mu = reference(row);
    return log_mu && *log_mu == -kInf;
  }
  BIRL_DEVICE Reading reading(Block& block) const {
    return Reading(home_, block, item_ / batch_.problems);
  }
  BIRL_DEVICE Share own(const Block& block) const { return share_of(S_, block.rank, block.count); }
  BIRL_DEVICE LaneSoftMaximum soft(const double* q, Index s) const {
    return {q + s * A_, reference(s * A_), A_, LaneSoftMaximum::inverse_of(temperature())};
  }

  // Not by subscript: that would put the pointers in local memory.
  BIRL_DEVICE double* image(Index i) const { return i == 0 ? m_.image[0] : m_.image[1]; }
  BIRL_DEVICE double* term(Index i) const { return i == 0 ? m_.term[0] : m_.term[1]; }

  // ---- start ------------------------------------------------------------------------------------

  // Everything that could be wrong but P, and the starting value: given, or T0.
  BIRL_DEVICE FirstLook look() {
    const double* const initial = request_.initial ? request_.initial + item_ * S_ : nullptr;
    return team_.template reduce<FirstLook>(
        [&](Block& block) {
          const Share mine = own(block);
          block.template groups<Home::kStateLanes>([&](const auto& g) {
            using Group = std::decay_t<decltype(g)>;
            for (Index s = mine.begin + g.rank; s < mine.end; s += g.count) {
              g.each([&](int lane) {
                for (Index row = s * A_ + lane; row < (s + 1) * A_; row += Group::kLanes)
                  m_.q[row] = reward(row);
              });
              LaneSoftMaximum start = soft(m_.q, s);
              if (!initial) start.measure(g);
              g.each([&](int lane) {
                if (lane == 0) m_.image[0][s] = initial ? initial[s] : start.value(temperature());
              });
            }
          });
          block.spread([&](Index at, Index stride) {  // the padding of an operand is zero
            for (Index i = S_ + at; i < home_.padded_states(); i += stride)
              m_.term[0][i] = m_.term[1][i] = 0.0;
          });
          return block.template reduce<FirstLook>(
              [&](Thread t) {
                FirstLook seen = FirstLook::nothing();
                for (Index s = mine.begin + t.rank; s < mine.end; s += t.count) {
                  seen.low = smaller(seen.low, m_.image[0][s]);
                  seen.high = larger(seen.high, m_.image[0][s]);
                  look_at(s, seen);
                }
                return seen;
              },
              FirstLook::join);
        },
        FirstLook::join);
  }

  BIRL_DEVICE void look_at(Index s, FirstLook& found) const {
    bool available = false;
    for (Index row = s * A_; row < (s + 1) * A_; ++row) {
      const double r = m_.q[row], log_mu = reference(0) ? *reference(row) : 0.0;
      if (!is_finite(r)) found.reward = Findings::first(found.reward, row);
      if (!(log_mu < kInf))
        found.reference = Findings::first(found.reference, s * (A_ + 1) + row - s * A_);
      if (log_mu == -kInf) continue;
      available = true;
      found.largest_reward = larger(found.largest_reward, magnitude(r));
      found.largest_reference = larger(found.largest_reference, magnitude(log_mu));
    }
    if (!available) found.reference = Findings::first(found.reference, s * (A_ + 1) + A_);
  }

  // Supposes that every row continues; the first pass tells.
  BIRL_DEVICE void begin(const FirstLook& first) {
    const double most = request_.method == kSweep
                            ? kInf
                            : largest_possible(first.largest_reward, first.largest_reference, A_,
                                               temperature(), discount());
    const bool far = request_.initial && !(-most <= first.low && first.high <= most);
    if (far)
      team_.step([&](Block& block) {
        block.spread([&](Index at, Index stride) {
          for (Index s = at; s < S_; s += stride) image(0)[s] = within(image(0)[s], most);
        });
      });
    team_.decide([&](Block& block) {
      LargeControl& c = block.chip.control;
      c.options = {request_.method, request_.tol, request_.max_iterations, request_.validate};
      c.discount = discount();
      c.temperature = temperature();
      c.states = static_cast<double>(S_);
      c.actions = static_cast<double>(A_);
      c.largest_reward = first.largest_reward;
      c.largest_reference = first.largest_reference;
      c.additions = 0.0;
      c.continues = true;
      c.direct = false;
      c.start_low = far ? within(first.low, most) : first.low;
      c.start_high = far ? within(first.high, most) : first.high;
      c.start();
      c.centre(c.start_low, c.start_high);
      return 0;
    });
  }

  // ---- passes over P and the steps between them -------------------------------------------------

  // What is wrong with P, if anything is.
  BIRL_DEVICE Blame iterate() {
    bool inspect = true;
    for (;;) {
      const PassRange found = pass(inspect);
      if (inspect && request_.validate != Rigour::kOff && found.bad_row != kNowhere)
        return diagnose();
      const bool restart = inspect && !found.continues;
      const LargeStep step = static_cast<LargeStep>(team_.decide([&](Block& block) {
        LargeControl& c = block.chip.control;
        if (inspect) c.additions = home_.additions(found.longest);
        if (!restart) return static_cast<int>(c.next(found.range));
        // Where some row ends, T does not commute with constants: c has to stay zero.
        c.continues = false;
        c.c = 0.0;
        c.centre(c.start_low, c.start_high);
        ++c.passes;
        return static_cast<int>(LargeStep::kAcceptSweep);
      }));
      inspect = false;
      if (restart) continue;
      if (step == LargeStep::kStop) return Blame::nothing();
      if (step == LargeStep::kNewton)
        newton();
      else
        accept_sweep();
    }
  }

  // Scalars and pointers are fetched again behind each barrier rather than kept in registers.
  BIRL_DEVICE PassRange pass(bool inspect) {
    return team_.template reduce<PassRange>(
        [&](Block& block) {
          const Share mine = own(block);
          for (Index first = mine.begin; first < mine.end; first += home_.tile()) {
            const Index last = first + home_.tile() < mine.end ? first + home_.tile() : mine.end;
            const Shifted w{image(now_), block.chip.control.middle};
            if (inspect)
              reading(block).template rows<true, true>(
                  first, last, w, [&](Index row, const double (&sums)[3]) {
                    m_.inverse_sum[row] = inverse(sums[1], sums[2]);
                    m_.q[row] = reward(row) + discount() * (sums[0] * m_.inverse_sum[row]);
                  });
            else
              reading(block).template rows<true, false>(
                  first, last, w, [&](Index row, const double (&sums)[1]) {
                    m_.q[row] = reward(row) + discount() * (sums[0] * m_.inverse_sum[row]);
                  });
            maximise(block, first, last);
            if (block.chip.control.forms_matrix())
              reading(block).form(first, last, m_.weight, m_.matrix);
          }
          return block.template reduce<PassRange>(
              [&](Thread t) { return found_by(block, t, inspect); }, PassRange::join);
        },
        PassRange::join);
  }

  BIRL_DEVICE double spare() const {
    return batch_.is_double ? below_zero<double>(S_) : below_zero<float>(S_);
  }

  // 1/σ, zero without continuation, NaN where that is not allowed.
  BIRL_DEVICE double inverse(double sum, double negative) const {
    if (request_.validate != Rigour::kOff) {
      const double tolerance = (batch_.is_double ? 1e-8 : 1e-5) + spare();
      const bool ends = sum == 0.0 && request_.validate == Rigour::kOrEnding;
      if (negative != 0.0 || !(ends || magnitude(sum - 1.0) <= tolerance)) return kInf - kInf;
    }
    return inverse_row_sum(sum);
  }

  BIRL_DEVICE void maximise(Block& block, Index first, Index last) {
    block.template groups<Home::kStateLanes>([&](const auto& g) {
      using Group = std::decay_t<decltype(g)>;
      for (Index s = first + g.rank; s < last; s += g.count) {
        LaneSoftMaximum maximum = soft(m_.q, s);
        maximum.measure(g);
        g.each([&](int lane) {
          for (Index a = lane; a < A_; a += Group::kLanes) {
            const double policy = exp_nonpositive(maximum.exponent(a)) / maximum.total;
            m_.weight[s * A_ + a] = policy * m_.inverse_sum[s * A_ + a];
          }
          if (lane != 0) return;
          const LargeControl& control = block.chip.control;
          const double value = maximum.value(temperature());
          image(1 - now_)[s] = value;
          m_.delta[s] =
              (value - (image(now_)[s] - control.middle)) - (1.0 - discount()) * control.c;
        });
      }
    });
  }

  BIRL_DEVICE PassRange found_by(Block& block, Thread t, bool inspect) const {
    const Share mine = own(block);
    const Reading rows = reading(block);
    const double* const values = image(1 - now_);
    PassRange found = PassRange::nothing();
    for (Index s = mine.begin + t.rank; s < mine.end; s += t.count)
      found.range.add(m_.delta[s], values[s]);
    if (!inspect) return found;
    for (Index row = mine.begin * A_ + t.rank; row < mine.end * A_; row += t.count) {
      const double inverse = m_.inverse_sum[row];
      const Share entries = rows.entries(row);
      const Index length = entries.end - entries.begin;
      found.longest = length > found.longest ? length : found.longest;
      if (inverse != inverse) found.bad_row = Findings::first(found.bad_row, row);
      if (inverse == 0.0 && !masked(row)) found.continues = false;
    }
    return found;
  }

  BIRL_DEVICE void accept_sweep() {
    now_ = 1 - now_;
    team_.decide([&](Block& block) {
      block.chip.control.accept_sweep();
      return 0;
    });
  }

  // W := W + Σ_j (γP_π)^j (δ − middle), as many terms as bring their half-span to what the step is
  // worth, or as the control allows. Where every row continues the step matters only up to a
  // constant: the middle of δ contributes one that accept_newton adds, and of the rest the next
  // pass's middle finds it exactly.
  BIRL_DEVICE void newton() {
    team_.step([&](Block& block) {
      const double middle = block.chip.control.delta_middle();
      block.spread([&](Index first, Index stride) {
        for (Index s = first; s < S_; s += stride)
          m_.step[s] = m_.term[0][s] = m_.delta[s] - middle;
      });
    });
    int products = 0;
    for (int more = 1; more;) {
      const double* const last = term(products % 2);
      double* const next = term(1 - products % 2);
      const SweepRange spread = range_of(
          [&](Block& block) {
            reading(block).template product<1>(m_.matrix, last, [&](Index s, const double (&y)[1]) {
              next[s] = discount() * y[0];
              m_.step[s] += next[s];
            });
          },
          [&](Block&, Index s) { return next[s]; });
      ++products;
      more = team_.decide([&](Block& block) {
        LargeControl& c = block.chip.control;
        const double size = c.continues
                                ? 0.5 * (spread.image_high - spread.image_low)
                                : larger(magnitude(spread.image_low), magnitude(spread.image_high));
        return c.another_product(size, products) ? 1 : 0;
      });
    }
    const double* const from = image(now_);
    double* const to = image(1 - now_);
    const SweepRange moved =
        range_of([](Block&) {},
                 [&](Block& block, Index s) {
                   return to[s] = (from[s] - block.chip.control.middle) + m_.step[s];
                 });
    now_ = 1 - now_;
    team_.decide([&](Block& block) {
      LargeControl& c = block.chip.control;
      c.accept_newton(c.delta_middle(), moved.image_low, moved.image_high);
      return 0;
    });
  }

  // Smallest and largest of value(block, s), as image_low and image_high, after prepare(block).
  template <class Prepare, class Value>
  BIRL_DEVICE SweepRange range_of(Prepare&& prepare, Value&& value) {
    return team_.template reduce<SweepRange>(
        [&](Block& block) {
          prepare(block);
          const Share mine = own(block);
          return block.template reduce<SweepRange>(
              [&](Thread t) {
                SweepRange range = SweepRange::nothing();
                for (Index s = mine.begin + t.rank; s < mine.end; s += t.count)
                  range.add(0.0, value(block, s));
                return range;
              },
              SweepRange::join);
        },
        SweepRange::join);
  }

  // ---- what is handed out -----------------------------------------------------------------------

  BIRL_DEVICE void put(void* table, Index row, double x) const {
    store(table, batch_.is_double, item_ * S_ * A_ + row, x);
  }

  // Everything comes from the last pass; P is not read again.
  BIRL_DEVICE void finish() {
    const double* const values = image(1 - now_);
    team_.local([&](Block& block) {
      const double offset = block.chip.control.offset();
      const Share mine = own(block);
      block.template groups<Home::kStateLanes>([&](const auto& g) {
        using Group = std::decay_t<decltype(g)>;
        for (Index s = mine.begin + g.rank; s < mine.end; s += g.count) {
          LaneSoftMaximum maximum = soft(m_.q, s);
          maximum.measure(g);
          g.each([&](int lane) {
            const double value = values[s] + offset;
            if (lane == 0) {
              request_.value[item_ * S_ + s] = value;
              request_.relative[item_ * S_ + s] = values[s];
            }
            for (Index a = lane; a < A_; a += Group::kLanes) {
              const double exponent = maximum.exponent(a);
              const double advantage = maximum.masked(a) ? 0.0 : maximum.q[a] - values[s];
              put(request_.advantage, s * A_ + a, advantage);
              put(request_.q, s * A_ + a, advantage + value);
              put(request_.policy, s * A_ + a, exp_nonpositive(exponent) / maximum.total);
              put(request_.log_policy, s * A_ + a, exponent - log_from_one(maximum.total));
            }
          });
        }
      });
      block.spread([&](Index first, Index stride) {
        const LargeControl& c = block.chip.control;
        write_bounds(first, stride, c.error_bound());
        if (first != 0) return;
        request_.status[item_] = static_cast<Index>(c.verdict(!batch_.is_double));
        write_info(c.half_span(), c.error_bound(), c.passes, {0, 0.0}, c.products, offset);
      });
    });
  }

  // Which entries are to blame for rows that are no distributions.
  BIRL_DEVICE Blame diagnose() {
    return team_.template reduce<Blame>(
        [&](Block& block) {
          const Reading rows = reading(block);
          return block.template reduce<Blame>(
              [&](Thread t) {
                Blame found = Blame::nothing();
                const Share mine = own(block);
                for (Index row = mine.begin * A_ + t.rank; row < mine.end * A_; row += t.count)
                  if (m_.inverse_sum[row] != m_.inverse_sum[row]) blame(rows, row, found);
                return found;
              },
              Blame::join);
        },
        Blame::join);
  }

  BIRL_DEVICE void blame(const Reading& rows, Index row, Blame& found) const {
    const Share entries = rows.entries(row);
    double sum = 0.0;
    for (Index k = entries.begin; k < entries.end; ++k) {
      const double p = rows.stored(k);
      sum += p;
      if (!is_finite(p))
        found.non_finite = Findings::first(found.non_finite, k);
      else if (p < -spare())
        found.negative = Findings::first(found.negative, k);
    }
    if (row < found.row) {
      found.row = row;
      found.row_sum = sum;
    }
  }

  BIRL_DEVICE void refuse(Status verdict, const Findings& found) {
    const double nan = kInf - kInf;
    team_.local([&](Block& block) {
      block.spread([&](Index first, Index stride) {
        for (Index s = first; s < S_; s += stride)
          request_.value[item_ * S_ + s] = request_.relative[item_ * S_ + s] = nan;
        for (Index row = first; row < S_ * A_; row += stride) {
          put(request_.q, row, nan);
          put(request_.advantage, row, nan);
          put(request_.policy, row, nan);
          put(request_.log_policy, row, nan);
        }
        write_bounds(first, stride, nan);
        if (first != 0) return;
        request_.status[item_] = static_cast<Index>(verdict);
        const Reading rows = reading(block);
        write_info(nan, nan, 0,
                   culprit(
                       verdict, found, A_, discount(), temperature(),
                       [&](Index k) { return rows.stored(k); },
                       [&](Index row) { return reward(row); }, reference(0)),
                   0, nan);
      });
    });
  }

  BIRL_DEVICE double* info() const { return request_.info + item_ * (kInfo + S_); }

  // The bounds of the states, which are all the same.
  BIRL_DEVICE void write_bounds(Index first, Index stride, double bound) const {
    for (Index s = first; s < S_; s += stride) info()[kInfo + s] = bound;
  }

  BIRL_DEVICE void write_info(double residual, double bound, Index passes, const Culprit& wrong,
                              Index products, double offset) const {
    double* const info = this->info();
    info[0] = residual;
    info[1] = bound;
    info[2] = static_cast<double>(passes);
    info[3] = static_cast<double>(wrong.place);
    info[4] = wrong.value;
    info[5] = static_cast<double>(products);
    info[6] = temperature();
    info[7] = offset;
    info[8] = static_cast<double>(name_);
  }

  const Home& home_;
  const Batch& batch_;
  const Solve& request_;
  Kernel name_;
  Team& team_;
  const Arrays& m_;
  Index item_, S_, A_;
  int now_ = 0;  // image(now_) − middle is W
};

template <class Home>
template <class Team>
BIRL_DEVICE void LargeSolve<Home>::run(Team& team, const Arrays& arrays, Index item) const {
  LargeSolving<Home, Team>(*this, team, arrays, item).run();
}

}  // namespace birl::device
