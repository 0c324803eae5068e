// (I − γP_π) x = b or its transpose for one problem (n, g), kRight right-hand sides at once, by
// the grid: x += Σ_j M^j r with M = γP_π or its transpose and r = b − (I − M)x, until r, computed
// afresh each time (M13), is at the rounding level or falls no further.
//
// Powers of M turn everything into the slow mode, constants or the stationary distribution, which
// shrinks by γ each time. So the series is closed by t γ/(1−γ) after its last term t = M t', and
// what that leaves of r is M(t − γt')/(1−γ): where the process mixes, a few products make it small
// however close γ is to one. Both norms contract, so the size of the residual is known beforehand.
// Where it mixes slowly the number of products grows up to that of the plain series, and beyond
// kMostProducts the answer is NaN: the caller has other means.
//
// Who owns what: P_π, or its transpose, is formed once, in double precision, block by block, so
// that every product is by rows, and nothing is added by two. Bytes: P twice (once from memory),
// the matrix (8·S², or 12 per merged entry) per product of kRight columns, the vectors about six
// times. Floor on an H200, data sheets: S=4096 25 µs a product, a square of 1e6 states 14 µs,
// and 1.7 µs for the barrier after each.
//
// Invariants: bits depend neither on the team nor on the other right-hand sides; a right-hand side
// that is not finite makes its own solution NaN and no other.
#pragma once

#include "core/request.h"
#include "core/system.h"
#include "cuda/grid/column_norms.h"
#include "cuda/grid/rows.h"

namespace birl::device {

// One right-hand side, the same in every block. Norms are 1-norms if transposed, else max norms.
struct SystemColumn {
  double size, length;       // ‖b‖ and ‖x‖
  double current, previous;  // ‖r‖
  double middle;             // constant taken off x in the residual
  double target;             // ‖r‖ at which the series may end
  double closing;            // what its last term is multiplied with
  Index products;            // of the series that have ended
  int working, solved, keep, revert;
  int active, ends;  // the series goes on; it has just ended
};

template <class Home_, int kRight_>
struct GridPolicySolveKernel {
  using Home = Home_;
  static constexpr int kRight = kRight_;

  Home home;
  Batch batch;
  PolicySolve request;

  struct Chip {
    double discount, additions;
    int shifts;
    SystemColumn columns[kRight];
    double norms[3 * kRight];
  };
  struct Arrays {
    double *b, *x, *best, *sum;  // (S, kRight)
    double* term[2];             // (S, kRight), padded
    double* partial;
    double* inverse_sum;  // (S, A)
    double* weight;       // (S, A) π/σ
    double* matrix;
  };

  template <class Memory>
  BIRL_HD Arrays lay_out(Memory& memory) const {
    const Index S = home.states;
    Arrays m{};
    double** const vectors[] = {&m.b, &m.x, &m.best, &m.sum};
    for (double** const vector : vectors) *vector = memory.template take<double>(S * kRight);
    for (double*& term : m.term) term = memory.template take<double>(home.padded_states() * kRight);
    m.partial = memory.template take<double>(3 * kRight * Pieces(S).count);
    m.inverse_sum = memory.template take<double>(S * home.actions);
    m.weight = memory.template take<double>(S * home.actions);
    m.matrix = memory.template take<double>(home.matrix_entries());
    return m;
  }

  template <class Team>
  BIRL_DEVICE void run(Team& team, const Arrays& arrays, Index item) const;
};

// What the rows of P say of the system.
struct Shape {
  Index deflates;  // whether constants are an eigenvector
  Index longest;   // entries of the matrix's longest row

  BIRL_DEVICE static Shape join(const Shape& x, const Shape& y) {
    return {x.deflates && y.deflates ? 1 : 0, x.longest > y.longest ? x.longest : y.longest};
  }
};

template <int kRight>
struct ColumnRanges {
  double low[kRight], high[kRight];

  BIRL_DEVICE static ColumnRanges nothing() {
    ColumnRanges range;
    BIRL_UNROLL
    for (int c = 0; c < kRight; ++c) range.low[c] = kInf, range.high[c] = -kInf;
    return range;
  }
  BIRL_DEVICE static ColumnRanges join(const ColumnRanges& x, const ColumnRanges& y) {
    ColumnRanges range;
    BIRL_UNROLL
    for (int c = 0; c < kRight; ++c) {
      range.low[c] = smaller(x.low[c], y.low[c]);
      range.high[c] = larger(x.high[c], y.high[c]);
    }
    return range;
  }
};

template <class Home, int kRight, class Team>
class GridPolicySolving {
  using Problem = GridPolicySolveKernel<Home, kRight>;
  using Block = typename Team::Block;
  using Reading = typename Home::template Reading<Block>;
  using Arrays = typename Problem::Arrays;
  using Chip = typename Problem::Chip;
  using Ranges = ColumnRanges<kRight>;

 public:
  BIRL_DEVICE GridPolicySolving(const Problem& kernel, Team& team, const Arrays& arrays, Index item)
      : kernel_(kernel),
        home_(kernel.home),
        request_(kernel.request),
        team_(team),
        m_(arrays),
        item_(item),
        transition_(item / kernel.batch.problems),
        S_(kernel.home.states),
        A_(kernel.home.actions) {}

  BIRL_DEVICE void run() {
    prepare();
    for (first_ = 0; first_ < request_.right_sides; first_ += kRight) {
      start();
      for (int round = 0; residual(round); ++round) correct();
      finish();
    }
  }

 private:
  static constexpr int kRounds = 8;
  static constexpr Index kMostProducts = 100000;  // for one right-hand side

  BIRL_DEVICE Reading reading(Block& block) const { return Reading(home_, block, transition_); }

  // f(block, i, c) for every number i of an (S, kRight) vector, c its column.
  template <class F>
  BIRL_DEVICE void each_number(F&& f) {
    team_.step([&](Block& block) {
      block.spread([&](Index first, Index stride) {
        for (Index i = first; i < S_ * kRight; i += stride)
          f(block, i, static_cast<int>(i % kRight));
      });
    });
  }

  // f(chip, c) for each column of this group, in one thread of every block; whether any said so.
  template <class F>
  BIRL_DEVICE bool each_column(F&& f) {
    return team_.decide([&](Block& block) {
      int any = 0;
      for (int c = 0; c < kRight; ++c)
        if (f(block.chip, c)) any = 1;
      return any;
    }) != 0;
  }

  // The matrix, and whether constants are an eigenvector of P_π: every row continues and π sums to
  // one up to rounding, of which 1 − γ must not inherit an error.
  BIRL_DEVICE void prepare() {
    const double* const policy = request_.policy + item_ * S_ * A_;
    const Shape shape = team_.template reduce<Shape>(
        [&](Block& block) {
          const Share mine = share_of(S_, block.rank, block.count);
          Reading rows = reading(block);
          for (Index first = mine.begin; first < mine.end; first += home_.tile()) {
            const Index last = first + home_.tile() < mine.end ? first + home_.tile() : mine.end;
            rows.template rows<false, true>(first, last, {},
                                            [&](Index row, const double (&sums)[2]) {
                                              m_.inverse_sum[row] = inverse_row_sum(sums[0]);
                                              m_.weight[row] = policy[row] * m_.inverse_sum[row];
                                            });
            rows.form(first, last, m_.weight, m_.matrix);
          }
          return block.template reduce<Shape>(
              [&](Thread t) {
                Shape found{1, 0};
                for (Index s = mine.begin + t.rank; s < mine.end; s += t.count) {
                  const Index length = home_.matrix_row(s);
                  found.longest = length > found.longest ? length : found.longest;
                  RowMass mass;
                  for (Index row = s * A_; row < (s + 1) * A_; ++row)
                    mass.add(policy[row], m_.inverse_sum[row]);
                  if (!mass.closed(A_)) found.deflates = 0;
                }
                return found;
              },
              Shape::join);
        },
        Shape::join);
    team_.decide([&](Block& block) {
      block.chip.discount = kernel_.batch.discount[item_];
      block.chip.additions = home_.additions(shape.longest);
      return block.chip.shifts = shape.deflates != 0 && !request_.transpose;
    });
  }

  BIRL_DEVICE Index valid() const {  // columns of this group that are somebody's
    const Index left = request_.right_sides - first_;
    return left < kRight ? left : kRight;
  }

  // b, and x = 0. Columns beyond the last are zero, and so is the padding of operands.
  BIRL_DEVICE void start() {
    each_number([&](Block&, Index i, int c) {
      m_.b[i] = c < valid() ? request_.rhs[at(i / kRight, c)] : 0.0;
      m_.x[i] = 0.0;
    });
    team_.local([&](Block& block) {
      block.spread([&](Index first, Index stride) {
        for (Index i = S_ * kRight + first; i < home_.padded_states() * kRight; i += stride)
          m_.term[0][i] = m_.term[1][i] = 0.0;
      });
    });
    each_column([&](Chip& chip, int c) {
      chip.columns[c] = {};
      return false;
    });
  }

  BIRL_DEVICE Index at(Index s, int c) const {  // in an array (N, G, K, S)
    return (item_ * request_.right_sides + first_ + c) * S_ + s;
  }

  // The smallest and largest number of each column of x.
  BIRL_DEVICE Ranges ranges() {
    return team_.template reduce<Ranges>(
        [&](Block& block) {
          return block.template reduce<Ranges>(
              [&](Thread t) {
                const Share mine = share_of(S_, block.rank, block.count);
                Ranges range = Ranges::nothing();
                for (Index s = mine.begin + t.rank; s < mine.end; s += t.count) {
                  BIRL_UNROLL
                  for (int c = 0; c < kRight; ++c) {
                    range.low[c] = smaller(range.low[c], m_.x[s * kRight + c]);
                    range.high[c] = larger(range.high[c], m_.x[s * kRight + c]);
                  }
                }
                return range;
              },
              Ranges::join);
        },
        Ranges::join);
  }

  // r := b − (I − M)x, into term[0] and the sum of the series; whether it wants correcting. Where
  // constants are an eigenvector (I − M)(α + z) = (1 − γ)α + (I − M)z is used as it stands, so that
  // a large constant α in x does not drown the rest.
  BIRL_DEVICE bool residual(int round) {
    if (team_.decide([](Block& block) { return block.chip.shifts; })) {
      const Ranges range = ranges();
      team_.decide([&](Block& block) {
        BIRL_UNROLL
        for (int c = 0; c < kRight; ++c) {
          const double middle = 0.5 * (range.low[c] + range.high[c]);
          block.chip.columns[c].middle = is_finite(middle) ? middle : 0.0;
        }
        return 0;
      });
    }
    each_number([&](Block& block, Index i, int c) {
      m_.term[1][i] = m_.x[i] - block.chip.columns[c].middle;
    });
    multiply(m_.term[1], [&](Block& block, Index i, int c, double y) {
      const double constant = (1.0 - block.chip.discount) * block.chip.columns[c].middle;
      m_.term[0][i] = (m_.b[i] - constant) - (m_.term[1][i] - y);
    });
    column_norms<3, kRight>(
        team_, S_, request_.transpose, m_.partial,
        [&](Index s, Index c, double (&norm)[3]) {
          const Index i = s * kRight + c;
          norm[0] = magnitude(m_.b[i]), norm[1] = magnitude(m_.x[i]);
          norm[2] = magnitude(m_.term[0][i]);
        },
        [](Block& block) { return block.chip.norms; });
    const bool more = each_column([&](Chip& chip, int c) {
      SystemColumn& column = chip.columns[c];
      column.size = chip.norms[3 * c];
      column.length = chip.norms[3 * c + 1];
      column.current = chip.norms[3 * c + 2];
      judge(column, chip.additions, round);
      return column.working;
    });
    each_number([&](Block& block, Index i, int c) {
      const SystemColumn& column = block.chip.columns[c];
      if (column.keep) m_.best[i] = m_.x[i];
      if (column.revert) m_.x[i] = m_.best[i];
      m_.sum[i] = m_.term[0][i];
    });
    return more;
  }

  // take(block, i, c, M in) for every number of the block's own states.
  template <class Take>
  BIRL_DEVICE void multiply(const double* in, Take&& take) {
    team_.step([&](Block& block) {
      reading(block).template product<kRight>(
          m_.matrix, in, [&](Index s, const double (&y)[kRight]) {
            BIRL_UNROLL
            for (int c = 0; c < kRight; ++c)
              take(block, s * kRight + c, c, block.chip.discount * y[c]);
          });
    });
  }

  // What becomes of a column now that its residual is known.
  BIRL_DEVICE void judge(SystemColumn& column, double additions, int round) const {
    column.keep = column.revert = 0;
    if (round > 0 && !column.working) return;
    const bool improved = round == 0 || column.current < column.previous;
    const bool fell = round == 0 || column.current < 0.5 * column.previous;
    column.keep = improved;
    column.revert = !improved;
    if (column.revert) column.current = column.previous;
    const Tolerance tolerance(0.0, column.size, column.length);
    column.working =
        !tolerance.met(column.current) && is_finite(column.current) && fell && round < kRounds;
    column.solved = tolerance.solved(column.current, additions, A_);
    column.target = tolerance.target();
    column.previous = column.current;
    column.active = column.working;
    column.ends = 0;
  }

  // x += Σ_j M^j r in the columns that work; r is in term[0] and in the sum.
  BIRL_DEVICE void correct() {
    for (Index j = 1;; ++j) {
      // Not by subscript: that would put the pointers in local memory.
      const double* const term = j % 2 == 1 ? m_.term[0] : m_.term[1];
      double* const next = j % 2 == 1 ? m_.term[1] : m_.term[0];
      multiply(term, [&](Block&, Index i, int, double y) {
        next[i] = y;
        m_.sum[i] += y;
      });
      if (j % (j < 32 ? 4 : 16) != 0) continue;
      column_norms<2, kRight>(
          team_, S_, request_.transpose, m_.partial,
          [&](Index s, Index c, double (&norm)[2]) {
            const Index i = s * kRight + c;
            norm[0] = magnitude(next[i] - kernel_.batch.discount[item_] * term[i]),
            norm[1] = magnitude(next[i]);
          },
          [](Block& block) { return block.chip.norms; });
      const bool more = each_column([&](Chip& chip, int c) {
        SystemColumn& column = chip.columns[c];
        const double odd = chip.norms[2 * c], size = chip.norms[2 * c + 1];
        const double tail = chip.discount / (1.0 - chip.discount);
        const double closed = tail * odd, open = chip.discount * size;
        const bool last = column.products + j >= kMostProducts;
        const double left = smaller(closed, open);
        // Below its rounding t − γt' tells nothing, and another round tells more.
        const bool rounding = odd <= (8.0 + chip.additions) * kEps * size;
        column.ends = column.active && (last || rounding || !(left > column.target));
        column.closing = closed < open ? tail : 0.0;
        if (column.ends) column.products += j;
        column.active = column.active && !column.ends;
        return column.active;
      });
      each_number([&](Block& block, Index i, int c) {
        const SystemColumn& column = block.chip.columns[c];
        if (column.ends) m_.x[i] += m_.sum[i] + column.closing * next[i];
      });
      if (!more) return;
    }
  }

  BIRL_DEVICE void finish() {
    each_number([&](Block& block, Index i, int c) {
      if (c >= valid()) return;
      const SystemColumn& column = block.chip.columns[c];
      request_.out[at(i / kRight, c)] = column.solved ? m_.x[i] : kInf - kInf;
      if (i / kRight == 0)
        request_.residual[item_ * request_.right_sides + first_ + c] = column.current;
    });
  }

  const Problem& kernel_;
  const Home& home_;
  const PolicySolve& request_;
  Team& team_;
  const Arrays& m_;
  Index item_, transition_, S_, A_, first_ = 0;
};

template <class Home, int kRight>
template <class Team>
BIRL_DEVICE void GridPolicySolveKernel<Home, kRight>::run(Team& team, const Arrays& arrays,
                                                          Index item) const {
  GridPolicySolving<Home, kRight, Team>(*this, team, arrays, item).run();
}

}  // namespace birl::device
