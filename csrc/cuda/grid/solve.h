// The fixed point V* = TV* of one problem (n, g) by the grid, in the relative form
// V = c + W: Newton's method, its linear system solved by products with P_π as far as the step is
// worth it, or value iteration; the certificate is that of every other solver here.
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
// float32 11 µs a pass and 3.2 µs a product, S=4096 A=16 280 µs and 31 µs; 1e6 states on a square
// with five actions, float64, 93 µs and 14 µs.
//
// Invariants: bits depend neither on the number of blocks nor of threads; an invalid problem writes
// NaN and its status, and touches nothing else.
#pragma once

#include "core/control.h"
#include "core/findings.h"
#include "cuda/grid/rows.h"
#include "cuda/grid/soft_maximum.h"

namespace birl::device {

template <class Home_>
struct GridSolveKernel {
  using Home = Home_;

  Home home;
  Batch batch;
  Solve request;

  struct Chip {
    Control control;
    double least, most;  // of the value that the first pass is made at
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
  Index bad_row = kNowhere, longest = 0;  // the first wrong row, entries of the longest
  bool continues = true;

  BIRL_DEVICE static PassRange join(const PassRange& x, const PassRange& y) {
    return {SweepRange::join(x.range, y.range), Findings::first(x.bad_row, y.bad_row),
            x.longest > y.longest ? x.longest : y.longest, x.continues && y.continues};
  }
};

// What can be wrong besides P, and the range of the starting value.
struct FirstLook {
  Index reference = kNowhere, reward = kNowhere;  // as in Findings: all of it takes the registers
  double largest_reference = 0.0, largest_reward = 0.0;
  double least = kInf, most = -kInf;

  BIRL_DEVICE static FirstLook join(const FirstLook& x, const FirstLook& y) {
    return {Findings::first(x.reference, y.reference),
            Findings::first(x.reward, y.reward),
            larger(x.largest_reference, y.largest_reference),
            larger(x.largest_reward, y.largest_reward),
            smaller(x.least, y.least),
            larger(x.most, y.most)};
  }
  BIRL_DEVICE void take(const Findings& found) {
    reference = found.reference;
    reward = found.reward;
    largest_reference = found.largest_reference;
    largest_reward = found.largest_reward;
  }
  BIRL_DEVICE Findings findings() const {
    Findings found;
    found.reference = reference;
    found.reward = reward;
    return found;
  }
};

// One problem while a team works on it.
template <class Home, class Team>
class GridSolving {
  using Problem = GridSolveKernel<Home>;
  using Block = typename Team::Block;
  using Reading = typename Home::template Reading<Block>;
  using Arrays = typename Problem::Arrays;

 public:
  BIRL_DEVICE GridSolving(const Problem& kernel, Team& team, const Arrays& arrays, Index item)
      : home_(kernel.home),
        batch_(kernel.batch),
        request_(kernel.request),
        team_(team),
        m_(arrays),
        item_(item),
        S_(kernel.home.states),
        A_(kernel.home.actions) {}

  BIRL_DEVICE void run() {
    const FirstLook first = look();
    Defect defect =
        first.findings().of_problem(request_.validate, discount(), temperature(),
                                    reference().values, [&](Index row) { return reward(row); });
    if (defect.status == Status::kConverged) {
      begin(first);
      defect = iterate();
    }
    if (defect.status == Status::kConverged)
      finish();
    else
      refuse(defect);
  }

 private:
  BIRL_DEVICE double discount() const { return batch_.discount[item_]; }
  BIRL_DEVICE double temperature() const { return batch_.temperature[item_]; }
  BIRL_DEVICE double reward(Index row) const {
    return Stored{batch_.reward, batch_.is_double}[item_ * S_ * A_ + row];
  }
  BIRL_DEVICE LogReference reference(Index row = 0) const {
    return {batch_.log_reference ? batch_.log_reference + item_ * S_ * A_ + row : nullptr};
  }
  BIRL_DEVICE Results<Index> results() const {
    return {request_, Home::kName, batch_.is_double, item_, S_, A_, temperature()};
  }
  BIRL_DEVICE Reading reading(Block& block) const {
    return Reading(home_, block, item_ / batch_.problems);
  }
  BIRL_DEVICE Share own(const Block& block) const { return share_of(S_, block.rank, block.count); }
  BIRL_DEVICE GroupSoftMaximum soft(const double* q, Index s) const {
    return {q + s * A_, reference(s * A_), A_, inverse_temperature(temperature())};
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
              GroupSoftMaximum start = soft(m_.q, s);
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
                FirstLook seen;
                Findings found;
                for (Index s = mine.begin + t.rank; s < mine.end; s += t.count) {
                  seen.least = smaller(seen.least, m_.image[0][s]);
                  seen.most = larger(seen.most, m_.image[0][s]);
                  look_at(s, found);
                }
                seen.take(found);
                return seen;
              },
              FirstLook::join);
        },
        FirstLook::join);
  }

  BIRL_DEVICE void look_at(Index s, Findings& found) const {
    bool any = false;
    for (Index a = 0; a < A_; ++a) {
      const Index row = s * A_ + a;
      any |= found.see_action(s, a, A_, m_.q[row], reference()[row]);
    }
    if (!any) found.see_no_action(s);
  }

  // Supposes that every row continues; the first pass tells.
  BIRL_DEVICE void begin(const FirstLook& first) {
    const int far = team_.decide([&](Block& block) {
      Control& c = block.chip.control;
      c = {};
      c.pose(request_, discount(), temperature(), S_, A_, batch_.is_double);
      c.largest_reward = first.largest_reward;
      c.largest_reference = first.largest_reference;
      if (request_.method != Method::kValueIteration && request_.method != Method::kSweep)
        c.mode = Mode::kSeries;
      c.means.fewest = 1;
      c.means.most = 60;
      c.means.limit = 4000;
      c.means.pass_products = 60.0;
      c.at_zero = false;
      block.chip.least = request_.initial ? c.start(first.least) : first.least;
      block.chip.most = request_.initial ? c.start(first.most) : first.most;
      c.centre(block.chip.least, block.chip.most);
      return block.chip.least != first.least || block.chip.most != first.most;
    });
    if (far)
      team_.step([&](Block& block) {
        const Control& control = block.chip.control;
        block.spread([&](Index at, Index stride) {
          for (Index s = at; s < S_; s += stride) image(0)[s] = control.start(image(0)[s]);
        });
      });
  }

  // ---- passes over P and the steps between them -------------------------------------------------

  // What is wrong with P, if anything is.
  BIRL_DEVICE Defect iterate() {
    bool inspect = true;
    for (;;) {
      const PassRange found = pass(inspect);
      if (inspect && request_.validate != Rigour::kOff && found.bad_row != kNowhere)
        return diagnose();
      const bool restart = inspect && !found.continues;
      const Step step = static_cast<Step>(team_.decide([&](Block& block) {
        Control& c = block.chip.control;
        // Without 1/τ there is no bound.
        if (inspect)
          c.count_additions(has_inverse(temperature()) ? home_.additions(found.longest) : kInf);
        if (restart) {
          c.continues = false;
          c.centre(block.chip.least, block.chip.most);
          ++c.passes;
          return static_cast<int>(Step::kSweep);
        }
        c.take(found.range);
        const Step next = c.next();
        if (next == Step::kImprove) c.sought = c.half_span() * c.reduction();
        return static_cast<int>(next);
      }));
      inspect = false;
      if (restart) continue;
      if (step == Step::kStop) return {};
      if (step == Step::kImprove)
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
            if (block.chip.control.mode == Mode::kSeries)
              reading(block).form(first, last, m_.weight, m_.matrix);
          }
          return block.template reduce<PassRange>(
              [&](Thread t) { return found_by(block, t, inspect); }, PassRange::join);
        },
        PassRange::join);
  }

  // 1/σ, zero without continuation, NaN where that is not allowed.
  BIRL_DEVICE double inverse(double sum, double negative) const {
    const bool sound = negative == 0.0 &&
                       is_row_sum(sum, request_.validate, row_sum_tolerance(batch_.is_double, S_));
    return sound || request_.validate == Rigour::kOff ? inverse_row_sum(sum) : kInf - kInf;
  }

  BIRL_DEVICE void maximise(Block& block, Index first, Index last) {
    block.template groups<Home::kStateLanes>([&](const auto& g) {
      using Group = std::decay_t<decltype(g)>;
      for (Index s = first + g.rank; s < last; s += g.count) {
        GroupSoftMaximum maximum = soft(m_.q, s);
        maximum.measure(g);
        g.each([&](int lane) {
          for (Index a = lane; a < A_; a += Group::kLanes) {
            const double policy = exp_nonpositive(maximum.exponent(a)) / maximum.total;
            m_.weight[s * A_ + a] = policy * m_.inverse_sum[s * A_ + a];
          }
          if (lane != 0) return;
          const Control& control = block.chip.control;
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
    PassRange found;
    for (Index s = mine.begin + t.rank; s < mine.end; s += t.count)
      found.range.add(m_.delta[s], values[s]);
    if (!inspect) return found;
    for (Index row = mine.begin * A_ + t.rank; row < mine.end * A_; row += t.count) {
      const double inverse = m_.inverse_sum[row];
      const Share entries = rows.entries(row);
      const Index length = entries.end - entries.begin;
      found.longest = length > found.longest ? length : found.longest;
      if (inverse != inverse) found.bad_row = Findings::first(found.bad_row, row);
      if (inverse == 0.0 && !reference().masked(row)) found.continues = false;
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
  // constant: the middle of δ contributes one that accept_step adds, and of the rest the next
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
        Control& c = block.chip.control;
        const double size = c.continues ? 0.5 * (spread.most - spread.least)
                                        : larger(magnitude(spread.least), magnitude(spread.most));
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
      Control& c = block.chip.control;
      c.accept_step(c.delta_middle(), moved.least, moved.most);
      return 0;
    });
  }

  // Smallest and largest of value(block, s), as least and most, after prepare(block).
  template <class Prepare, class Value>
  BIRL_DEVICE SweepRange range_of(Prepare&& prepare, Value&& value) {
    return team_.template reduce<SweepRange>(
        [&](Block& block) {
          prepare(block);
          const Share mine = own(block);
          return block.template reduce<SweepRange>(
              [&](Thread t) {
                SweepRange range;
                for (Index s = mine.begin + t.rank; s < mine.end; s += t.count)
                  range.add(0.0, value(block, s));
                return range;
              },
              SweepRange::join);
        },
        SweepRange::join);
  }

  // ---- what is handed out -----------------------------------------------------------------------

  // Everything comes from the last pass; P is not read again.
  BIRL_DEVICE void finish() {
    const double* const values = image(1 - now_);
    team_.local([&](Block& block) {
      const double offset = block.chip.control.offset();
      const Share mine = own(block);
      block.template groups<Home::kStateLanes>([&](const auto& g) {
        using Group = std::decay_t<decltype(g)>;
        for (Index s = mine.begin + g.rank; s < mine.end; s += g.count) {
          GroupSoftMaximum maximum = soft(m_.q, s);
          maximum.measure(g);
          g.each([&](int lane) {
            if (lane == 0) results().state(s, values[s], offset);
            for (Index a = lane; a < A_; a += Group::kLanes) {
              const double exponent = maximum.exponent(a);
              results().row(s * A_ + a, maximum.q[a], maximum.reference.masked(a), values[s],
                            offset, exp_nonpositive(exponent) / maximum.total,
                            exponent - log_from_one(maximum.total));
            }
          });
        }
      });
      block.spread(
          [&](Index first, Index stride) { results().finish(first, stride, block.chip.control); });
    });
  }

  // Which entries are to blame for rows that are no distributions.
  BIRL_DEVICE Defect diagnose() {
    const Findings found = team_.template reduce<Findings>(
        [&](Block& block) {
          const Reading rows = reading(block);
          return block.template reduce<Findings>(
              [&](Thread t) {
                Findings found;
                const Share mine = own(block);
                for (Index row = mine.begin * A_ + t.rank; row < mine.end * A_; row += t.count)
                  if (m_.inverse_sum[row] != m_.inverse_sum[row]) blame(rows, row, found);
                return found;
              },
              Findings::join);
        },
        Findings::join);
    const Index entries = batch_.crow ? batch_.nnz : S_ * A_ * S_;
    return found.of_transition([&](Index k) {
      return Stored{batch_.transition, batch_.is_double}[item_ / batch_.problems * entries + k];
    });
  }

  BIRL_DEVICE void blame(const Reading& rows, Index row, Findings& found) const {
    const Share entries = rows.entries(row);
    double sum = 0.0;
    for (Index k = entries.begin; k < entries.end; ++k) {
      sum += rows.stored(k);
      found.see_entry(k, rows.stored(k), below_zero(batch_.is_double, S_));
    }
    found.see_bad_row(row, sum);
  }

  BIRL_DEVICE void refuse(const Defect& defect) {
    team_.local([&](Block& block) {
      block.spread([&](Index first, Index stride) { results().refuse(first, stride, defect); });
    });
  }

  const Home& home_;
  const Batch& batch_;
  const Solve& request_;
  Team& team_;
  const Arrays& m_;
  Index item_, S_, A_;
  int now_ = 0;  // image(now_) − middle is W
};

template <class Home>
template <class Team>
BIRL_DEVICE void GridSolveKernel<Home>::run(Team& team, const Arrays& arrays, Index item) const {
  GridSolving<Home, Team>(*this, team, arrays, item).run();
}

}  // namespace birl::device
