// (I − γP_π) x = b or its transpose for one large problem (n, g), up to kMostColumns right-hand
// sides at once, by a team of several blocks; the method of policy_system_cpu.cpp: corrections by
// Richardson iteration from the exact mass, or by BiCGStab with the constant mode taken out, each
// judged by a residual computed afresh (M13), until it meets the tolerance or falls no further.
//
// Who owns what: P_π is formed once, in double precision, block by block as in large_solve.h; a
// product reads it once for four right-hand sides (dense: K/4 times in all, from L2 where S²
// numbers fit there). Rows of P_π: a warp two rows (CSR: a few lanes one). Columns, dense: a warp
// 32 of them and a slice of the states, whose parts are added in one order; CSR: gathered over the
// transposed pattern from values laid out for that. So nothing is added atomically, and both
// directions give the same bits every time. Bytes: P once, P_π (8·S², or 12 per merged entry) per
// product and four right-hand sides, the vectors about ten times per iteration. Floor on an H200,
// data sheets: S=1000 2 µs a product and barrier 1.7 µs; 1e6 states on a grid 14 µs. Tensor cores
// stay unused: DMMA would be as exact, but adds in an order of its own, so the host double could
// not vouch for its bits, and up to K = 64 it gains at most twofold on sm_80 and sm_90 and nothing
// elsewhere.
//
// Invariants: bits depend neither on the team nor on the other right-hand sides; a right-hand side
// that is not finite makes its own solution NaN and no other.
#pragma once

#include "device/bicgstab.h"
#include "device/solve_control.h"
#include "device/wide_rows.h"

namespace birl::device {

constexpr Index kMostColumns = 64;

struct LargePolicySolveArguments {
  Index problems;          // G: item = n·G + g
  Index right_sides;       // K
  const double* policy;    // (N,G,S,A)
  const double* discount;  // (N,G)
  const double* rhs;       // (N,G,K,S)
  double* out;             // (N,G,K,S)
  double* residual;        // (N,G,K): ‖b − Ax‖∞, or ‖b − Aᵀx‖₁ if transposed
  bool transpose;
  Index method;  // 0 auto, 3 Krylov, 5 Richardson with exact mass
  double tol;    // relative to ‖b‖; 0: as far as rounding allows
};

// One right-hand side, the same in every block.
struct SystemColumn {
  double size, length;  // ‖b‖ and ‖x‖
  double current, previous;
  double middle;  // constant taken off x in the residual
  double mean;    // taken off the residual
  double target;  // of a correction
  double term, window;
  int working, keep, revert, solved;
};

template <class Home_>
struct LargePolicySolve {
  using Home = Home_;

  Home home;
  LargePolicySolveArguments arguments;

  struct Chip {
    typename Home::Chip rows;
    KrylovColumn* columns;
    SystemColumn* systems;
    double* weight;   // (tile, A) π/σ
    double* partial;  // (kMostSums, K, pieces) where sums are replicated
  };
  struct Arrays {
    double *b, *x, *best;  // (S, K)
    KrylovVectors m;       // (S, K)
    double* inverse_sum;   // (S, A)
    double* weight;        // (S, A) where it does not fit on chip
    double* matrix;
    double* transposed;
  };

  BIRL_HD Index width() const {
    return arguments.right_sides < kMostColumns ? arguments.right_sides : kMostColumns;
  }

  template <class Memory>
  BIRL_HD Chip lay_out_chip(Memory& own) const {
    Chip chip{};
    chip.rows = home.lay_out_chip(own);
    chip.columns = own.template take<KrylovColumn>(width());
    chip.systems = own.template take<SystemColumn>(width());
    if (!home.far_tables) chip.weight = own.template take<double>(home.tile * home.actions);
    // The last columns may be fewer than `width`, and then sums are replicated that were not.
    const Index pieces = Pieces(home.states).count, most = kReplicated / home.states;
    const Index right = most < width() ? most : width();
    if (right > 0) chip.partial = own.template take<double>(kMostSums * right * pieces);
    return chip;
  }

  template <class Common, class Spill>
  BIRL_HD Arrays lay_out(Common& common, Spill& spill) const {
    const Index S = home.states, K = width();
    Arrays m{};
    double** const vectors[] = {&m.b,        &m.x,   &m.best, &m.m.x, &m.m.r,
                                &m.m.shadow, &m.m.p, &m.m.v,  &m.m.s, &m.m.t};
    for (double** const vector : vectors) *vector = common.template take<double>(S * K);
    if (!sums_replicated(S, K))
      m.m.partial = common.template take<double>(kMostSums * K * Pieces(S).count);
    m.inverse_sum = spill.template take<double>(S * home.actions);
    if (home.far_tables) m.weight = spill.template take<double>(S * home.actions);
    m.matrix = home.template lay_out_matrix<double>(spill);
    if (arguments.transpose) m.transposed = home.lay_out_transposed(spill, K);
    return m;
  }

  template <class Team>
  BIRL_DEVICE void run(Team& team, const Arrays& arrays, Index item) const;
};

// What the rows of P say of the system.
struct Shape {
  Index deflates;  // whether constants are an eigenvector
  Index longest;   // entries of the longest row

  BIRL_DEVICE static Shape join(const Shape& x, const Shape& y) {
    return {x.deflates && y.deflates ? 1 : 0, x.longest > y.longest ? x.longest : y.longest};
  }
};

enum class Correction : int { kNone, kKrylov, kRichardson };

template <class Home, class Team>
class LargePolicySolving {
  using Problem = LargePolicySolve<Home>;
  using Block = typename Team::Block;
  using Reading = typename Home::template Reading<Block>;
  using Arrays = typename Problem::Arrays;

 public:
  BIRL_DEVICE LargePolicySolving(const Problem& kernel, Team& team, const Arrays& arrays,
                                 Index item)
      : home_(kernel.home),
        given_(kernel.arguments),
        team_(team),
        m_(arrays),
        item_(item),
        S_(kernel.home.states),
        A_(kernel.home.actions),
        discount_(given_.discount[item]) {}

  BIRL_DEVICE void run() {
    prepare();
    for (first_ = 0; first_ < given_.right_sides; first_ += kMostColumns) {
      const Index left = given_.right_sides - first_;
      K_ = left < kMostColumns ? left : kMostColumns;
      begin();
      const Correction attempts[] = {first_choice(), second_choice()};
      for (int i = 0; i < 2; ++i)
        if (attempts[i] != Correction::kNone) refine(attempts[i], i == 1);
      finish();
    }
  }

 private:
  BIRL_DEVICE Reading reading(Block& block) const {
    return Reading(home_, block, block.chip.rows, item_ / given_.problems);
  }
  BIRL_DEVICE static SystemColumn& system(Block& block, Index k) { return block.chip.systems[k]; }

  BIRL_DEVICE Correction first_choice() const {
    if (given_.method == 3) return Correction::kKrylov;
    if (given_.method == 5) return Correction::kRichardson;
    return Home::kSparse ? Correction::kRichardson : Correction::kKrylov;
  }
  BIRL_DEVICE Correction second_choice() const {
    if (given_.method == 3 || given_.method == 5) return Correction::kNone;
    return Home::kSparse ? Correction::kKrylov : Correction::kRichardson;
  }

  // f(i, k) for every number i of an (S, K) vector, k its column.
  template <class F>
  BIRL_DEVICE void each_number(F&& f) {
    team_.step([&](Block& block) {
      block.spread([&](Index first, Index stride) {
        for (Index i = first; i < S_ * K_; i += stride) f(block, i, i % K_);
      });
    });
  }

  // A total may still be at work in another block: what it reads can be written only after this.
  BIRL_DEVICE void settle() {
    team_.step([](Block&) {});
  }

  // ---- the matrix -------------------------------------------------------------------------------

  // P_π, and whether constants are an eigenvector: every row continues and π sums to one up to
  // rounding, of which 1 − γ must not inherit an error.
  BIRL_STAGE void prepare() {
    const double* const policy = given_.policy + item_ * S_ * A_;
    const Shape shape = team_.template reduce<Shape>(
        [&](Block& block) {
          Shape shape{1, 0};
          Reading rows = reading(block);
          const auto matrix = rows.matrix(m_.matrix);
          rows.load();
          rows.bring(m_.x, 0.0);  // only the rows' sums are wanted
          const Share mine = share_of(S_, block.rank, block.count);
          for (Index first = mine.begin; first < mine.end; first += home_.tile) {
            const Index last = first + home_.tile < mine.end ? first + home_.tile : mine.end;
            double* const weight = home_.far_tables ? m_.weight + first * A_ : block.chip.weight;
            rows.template rows<true>(first, last, [&](Index row, const auto& sums) {
              const double inverse = sums[1] == 0.0 ? 0.0 : 1.0 / sums[1];
              m_.inverse_sum[row] = inverse;
              weight[row - first * A_] = policy[row] * inverse;
            });
            rows.form(first, last, weight, matrix);
            shape = Shape::join(shape, shape_of(block, rows, policy, first, last));
          }
          return shape;
        },
        Shape::join);
    deflate_ = shape.deflates != 0;
    longest_ = shape.longest;
    if constexpr (Home::kSparse)
      if (given_.transpose)
        team_.step([&](Block& block) {
          Reading rows = reading(block);
          rows.transpose(rows.matrix(m_.matrix), m_.transposed);
        });
  }

  BIRL_DEVICE Shape shape_of(Block& block, const Reading& rows, const double* policy, Index first,
                             Index last) const {
    return block.template reduce<Shape>(
        [&](Thread t) {
          Shape shape{1, 0};
          for (Index s = first + t.rank; s < last; s += t.count) {
            double mass = 0.0, stopping = 0.0;
            for (Index row = s * A_; row < (s + 1) * A_; ++row) {
              const Share entries = rows.entries(row);
              const Index length = entries.end - entries.begin;
              shape.longest = length > shape.longest ? length : shape.longest;
              mass += policy[row];
              if (m_.inverse_sum[row] == 0.0) stopping += policy[row];
            }
            if (!(magnitude(mass - 1.0) <= 4.0 * kEps * static_cast<double>(A_)) || stopping != 0.0)
              shape.deflates = 0;
          }
          return shape;
        },
        Shape::join);
  }

  // out = A in; or out = (I − A) in, and total += out in columns that are active.
  BIRL_STAGE void apply(const double* in, double* out, double* total) {
    const auto take = [&](Block& block, Index i, Index k, double product) {
      const double image = discount_ * product;
      out[i] = total ? image : in[i] - image;
      if (total && block.chip.columns[k].active) total[i] += image;
    };
    if (!given_.transpose) {
      team_.step([&](Block& block) {
        Reading rows = reading(block);
        rows.product(rows.matrix(m_.matrix), in, K_, nullptr,
                     [&](Index s, Index k, double y) { take(block, s * K_ + k, k, y); });
      });
    } else if constexpr (Home::kSparse) {
      team_.step([&](Block& block) {
        reading(block).transposed_product(m_.transposed, in, K_, [&](Index s, Index k, double y) {
          take(block, s * K_ + k, k, y);
        });
      });
    } else {
      team_.step([&](Block& block) {
        Reading rows = reading(block);
        rows.transposed_slices(rows.matrix(m_.matrix), in, K_, m_.transposed);
      });
      const Index slices = Slices(S_).count;
      each_number([&](Block& block, Index i, Index k) {
        double sum = 0.0;
        for (Index slice = 0; slice < slices; ++slice) sum += m_.transposed[slice * S_ * K_ + i];
        take(block, i, k, sum);
      });
    }
  }

  // ---- norms ------------------------------------------------------------------------------------

  // use(block, k, ‖value(block, s, k) over s‖): 1-norm if transposed, else max norm; NaN shows.
  template <class Value, class Use>
  BIRL_DEVICE void norms(Value&& value, Use&& use) {
    const auto one = [&](Block& block, Index k, const double (&total)[1]) {
      use(block, k, total[0]);
    };
    if (given_.transpose)
      column_totals<Sum, 1>(
          team_, S_, K_, m_.m.partial,
          [&](Block& block, Index s, Index k, double (&part)[1]) {
            Sum::add(part[0], magnitude(value(block, s, k)));
          },
          one);
    else
      column_totals<Largest, 1>(
          team_, S_, K_, m_.m.partial,
          [&](Block& block, Index s, Index k, double (&part)[1]) {
            Largest::add(part[0], magnitude(value(block, s, k)));
          },
          one);
  }

  // use(block, k, Σ_s x(s, k))
  template <class Use>
  BIRL_DEVICE void sums(const double* x, Use&& use) {
    column_totals<Sum, 1>(
        team_, S_, K_, m_.m.partial,
        [&](Block&, Index s, Index k, double (&part)[1]) { part[0] += x[s * K_ + k]; },
        [&](Block& block, Index k, const double (&total)[1]) { use(block, k, total[0]); });
  }

  // ---- one group of columns ---------------------------------------------------------------------

  BIRL_DEVICE Index at(Index i, Index k) const {  // of number i of column k, where (K, S) is meant
    return (item_ * given_.right_sides + first_ + k) * S_ + i / K_;
  }

  // b, its norm, and the part of x along the slow mode, which is known beforehand: the constant
  // that carries the mean of b, or for the transpose the total mass Σb/(1−γ), spread like |b|.
  BIRL_STAGE void begin() {
    each_number([&](Block&, Index i, Index k) { m_.b[i] = given_.rhs[at(i, k)]; });
    norms([&](Block&, Index s, Index k) { return m_.b[s * K_ + k]; },
          [&](Block& block, Index k, double norm) {
            system(block, k) = {};
            system(block, k).size = norm;
          });
    column_totals<Sum, 2>(
        team_, S_, K_, m_.m.partial,
        [&](Block&, Index s, Index k, double (&part)[2]) {
          part[0] += m_.b[s * K_ + k];
          part[1] += magnitude(m_.b[s * K_ + k]);
        },
        [&](Block& block, Index k, const double (&total)[2]) {
          const double mass = total[0] / (1.0 - discount_);
          const double spread = given_.transpose ? total[1] : static_cast<double>(S_);
          system(block, k).mean = deflate_ && spread > 0.0 ? mass / spread : 0.0;
        });
    each_number([&](Block& block, Index i, Index k) {
      m_.x[i] = system(block, k).mean * (given_.transpose ? magnitude(m_.b[i]) : 1.0);
    });
  }

  // r := b − Ax and its norm. Where every row continues A(α + z) = (1 − γ)α + Az is used as it
  // stands, so that a large constant α in x does not drown the rest.
  BIRL_STAGE void residuals() {
    const bool shifts = deflate_ && !given_.transpose;
    sums(m_.x, [&](Block& block, Index k, double sum) {
      system(block, k).middle = shifts ? sum / static_cast<double>(S_) : 0.0;
    });
    each_number(
        [&](Block& block, Index i, Index k) { m_.m.p[i] = m_.x[i] - system(block, k).middle; });
    apply(m_.m.p, m_.m.v, nullptr);
    each_number([&](Block& block, Index i, Index k) {
      m_.m.r[i] = (m_.b[i] - (1.0 - discount_) * system(block, k).middle) - m_.m.v[i];
    });
    norms([&](Block&, Index s, Index k) { return m_.x[s * K_ + k]; },
          [&](Block& block, Index k, double norm) { system(block, k).length = norm; });
    norms([&](Block&, Index s, Index k) { return m_.m.r[s * K_ + k]; },
          [&](Block& block, Index k, double norm) { system(block, k).current = norm; });
  }

  // Corrects x until the residual is small enough or no longer falls.
  BIRL_STAGE void refine(Correction method, bool last) {
    constexpr int kRounds = 8;
    for (int round = 0;; ++round) {
      residuals();
      const bool more = team_.decide([&](Block& block) {
        int working = 0;
        for (Index k = 0; k < K_; ++k) {
          judge(system(block, k), round, round == kRounds);
          block.chip.columns[k].active = system(block, k).working;
          working = working || system(block, k).working;
        }
        return working;
      }) != 0;
      settle();
      each_number([&](Block& block, Index i, Index k) {
        if (system(block, k).keep) m_.best[i] = m_.x[i];
        if (system(block, k).revert) m_.x[i] = m_.best[i];
      });
      if (!more) return;
      correct(method, last);
    }
  }

  // What becomes of a column now that its residual is known.
  BIRL_DEVICE void judge(SystemColumn& c, int round, bool enough) const {
    c.keep = c.revert = 0;
    if (c.solved || (round > 0 && !c.working)) return;
    const bool improved = round == 0 || c.current < c.previous;
    const bool fell = round == 0 || c.current < 0.5 * c.previous;
    // A first correction may make things worse and still lead on.
    const bool tolerated = round == 1 && c.current < 1e3 * c.previous;
    c.keep = improved || tolerated;
    c.revert = !c.keep;
    if (c.revert) c.current = c.previous;
    // Rounding of one product and one subtraction; the last bits are not worth a round.
    const double floor = 2.0 * kEps * (c.size + 2.0 * c.length);
    const double units = 16.0 + home_.additions(longest_) + 0.25 * static_cast<double>(A_);
    const double wanted = larger(given_.tol * c.size, floor);
    c.working = c.current > wanted && is_finite(c.current) && (fell || tolerated) && !enough;
    c.solved = c.current <= larger(given_.tol * c.size, 0.5 * units * floor) && !c.working;
    c.target = larger(0.5 * given_.tol * c.size, 0.25 * floor);
    c.previous = c.current;
  }

  // x += A⁻¹ r, roughly, in the columns that work.
  BIRL_STAGE void correct(Correction method, bool last) {
    const double n = static_cast<double>(S_);
    sums(m_.m.r, [&](Block& block, Index k, double sum) {
      system(block, k).mean = deflate_ ? sum / n : 0.0;
    });
    settle();
    each_number([&](Block& block, Index i, Index k) { m_.m.r[i] -= system(block, k).mean; });
    if (method == Correction::kKrylov)
      krylov();
    else
      richardson(last);
    // For A itself the constant removed from the residual, and the one that the compressed solve
    // leaves, are both exact multiples of an eigenvector.
    if (deflate_ && !given_.transpose) {
      apply(m_.m.x, m_.m.v, nullptr);
      sums(m_.m.v, [&](Block& block, Index k, double sum) {
        system(block, k).mean = (system(block, k).mean - sum / n) / (1.0 - discount_);
      });
    }
    // For the transpose it is mass that the recursions have lost, spread as in `begin`.
    each_number([&](Block& block, Index i, Index k) {
      const SystemColumn& c = system(block, k);
      if (!c.working) return;
      const double lost =
          given_.transpose ? lost_mass(c, n) * (magnitude(m_.b[i]) / c.size) : c.mean;
      m_.x[i] += m_.m.x[i] + (deflate_ ? lost : 0.0);
    });
  }

  // What Σr says is missing from Σx, unless it is no more than the rounding of r.
  BIRL_DEVICE double lost_mass(const SystemColumn& c, double n) const {
    const double sum = c.mean * n;
    return magnitude(sum) > 4.0 * kEps * (c.size + 2.0 * c.length) ? sum / (1.0 - discount_) : 0.0;
  }

  BIRL_STAGE void krylov() {
    // Max norm and 1-norm against the 2-norm of the recursion.
    const double root = given_.transpose ? __builtin_sqrt(static_cast<double>(S_)) : 1.0;
    column_totals<Sum, 1>(
        team_, S_, K_, m_.m.partial,
        [&](Block&, Index s, Index k, double (&part)[1]) {
          part[0] += m_.m.r[s * K_ + k] * m_.m.r[s * K_ + k];
        },
        [&](Block& block, Index k, const double (&total)[1]) {
          KrylovColumn& column = block.chip.columns[k];
          column.start = __builtin_sqrt(total[0]);
          column.target = system(block, k).target / root;
          column.active = system(block, k).working;
        });
    constexpr Index kMostProducts = 2000;
    bicgstab(team_, S_, K_, deflate_, kMostProducts, m_.m,
             [&](const double* in, double* out) { apply(in, out, nullptr); });
  }

  // Σ_j (γP_π)^j r while it contracts well. Constants ride along: for A they only add a constant to
  // the correction, which `correct` sets right; for the transpose their share stays zero.
  BIRL_STAGE void richardson(bool last) {
    constexpr Index kWindow = 32;
    constexpr double kPatience = 4000.0;
    each_number([&](Block&, Index i, Index) { m_.m.x[i] = m_.m.p[i] = m_.m.r[i]; });
    const bool shifts = deflate_ && !given_.transpose;
    const double n = static_cast<double>(S_);
    double *term = m_.m.p, *next = m_.m.v;
    const auto measure = [&] {
      sums(term, [&](Block& block, Index k, double sum) {
        system(block, k).middle = shifts ? sum / n : 0.0;
      });
      norms([&](Block& block, Index s,
                Index k) { return term[s * K_ + k] - system(block, k).middle; },
            [&](Block& block, Index k, double norm) { system(block, k).term = norm; });
    };
    measure();
    team_.decide([&](Block& block) {
      for (Index k = 0; k < K_; ++k) {
        system(block, k).window = system(block, k).term;
        block.chip.columns[k].active = system(block, k).working;
      }
      return 0;
    });
    const Index all = static_cast<Index>(smaller(1e7, 40.0 / (1.0 - discount_) + 100.0));
    const bool given = given_.method == 5 || last;
    for (Index j = 1; j <= all; ++j) {
      apply(term, next, m_.m.x);
      double* const before = term;
      term = next;
      next = before;
      if (j % 8 != 0) continue;
      measure();
      const int more = team_.decide([&](Block& block) {
        int any = 0;
        for (Index k = 0; k < K_; ++k) {
          int& active = block.chip.columns[k].active;
          SystemColumn& c = system(block, k);
          if (!active) continue;
          if (!(c.term > 0.0 && is_finite(c.term))) {
            active = 0;
          } else if (j % kWindow != 0) {
            active = c.term > 0.1 * c.target * (1.0 - discount_);
          } else {
            // rate^kWindow is what a window contracts by
            const double contracted = c.term / c.window;
            c.window = c.term;
            const double per_step = log_positive(1.0 / contracted) / static_cast<double>(kWindow);
            const double rest =
                c.target * (per_step < 1.0 ? per_step : 1.0);  // ~ target·(1 − rate)
            const bool slow =
                !(contracted < 1.0 && log_positive(c.term / rest) < kPatience * per_step);
            active = c.term > rest && (given || !slow);
          }
          any = any || active;
        }
        return any;
      });
      if (!more) break;
    }
  }

  BIRL_STAGE void finish() {
    each_number([&](Block& block, Index i, Index k) {
      const SystemColumn& c = system(block, k);
      given_.out[at(i, k)] = is_finite(c.current) ? m_.x[i] : kInf - kInf;
    });
    team_.step([&](Block& block) {
      block.spread([&](Index first, Index stride) {
        for (Index k = first; k < K_; k += stride)
          given_.residual[item_ * given_.right_sides + first_ + k] = system(block, k).current;
      });
    });
  }

  const Home& home_;
  const LargePolicySolveArguments& given_;
  Team& team_;
  const Arrays& m_;
  Index item_, S_, A_, first_ = 0, K_ = 0, longest_ = 0;
  double discount_;
  bool deflate_ = false;
};

template <class Home>
template <class Team>
BIRL_DEVICE void LargePolicySolve<Home>::run(Team& team, const Arrays& arrays, Index item) const {
  LargePolicySolving<Home, Team>(*this, team, arrays, item).run();
}

}  // namespace birl::device
