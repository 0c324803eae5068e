// One system with I − γP_π or its transpose: a direct or an iterative method inside, residuals from
// scratch and corrections outside, until nothing more is gained.
#pragma once

#include <cmath>
#include <limits>
#include <memory>

#include "core/control.h"
#include "core/system.h"
#include "cpu/model/batch.h"
#include "cpu/solvers/elimination.h"
#include "cpu/solvers/krylov.h"
#include "cpu/solvers/policy_matrix.h"

namespace birl {

struct PolicySystemOptions {
  bool transpose = false;
  double tol = 0.0;  // relative to ‖b‖; 0: as far as rounding allows
};

// One (n, g): a policy matrix and the right-hand sides that belong to it. Every state is formed
// before the first solve.
template <class Model, class Stored = double>
class PolicySystem {
 public:
  // In float it is off by what rounding the policy to float would change, and keeps its row sums.
  using Matrix = typename PolicyMatrixOf<Model, Stored>::type;

  PolicySystem(const Model& model, Matrix& matrix, std::unique_ptr<Elimination>& elimination,
               double discount, const PolicySystemOptions& options, Team& team,
               Interrupt& interrupt)
      : model_(model),
        matrix_(matrix),
        elimination_(elimination),
        discount_(discount),
        options_(options),
        team_(team),
        interrupt_(interrupt),
        weight_(model.states * model.actions),
        defect_(model.states),
        closed_(model.states) {}

  // Rows [s0, s1) of P_π, from 1/σ and π of all states; `row` is scratch of S numbers.
  void form(Index s0, Index s1, const double* inverse_sum, const double* policy, double* row) {
    weigh(s0, s1, inverse_sum, policy);
    matrix_.form_rows(model_, weight_.data(), s0, s1, row);
  }

  // The same in two steps: the weights π/σ, to form the rows of the matrix with.
  const double* weigh(Index s0, Index s1, const double* inverse_sum, const double* policy) {
    const Index A = model_.actions;
    for (Index s = s0; s < s1; ++s) {
      RowMass row;
      for (Index i = s * A; i < s * A + A; ++i) {
        weight_[i] = policy[i] * inverse_sum[i];
        row.add(policy[i], inverse_sum[i]);
      }
      defect_[s] = row.defect(discount_, A);
      closed_[s] = row.closed(A);
    }
    return weight_.data();
  }

  // A step of Newton's method: x := about A⁻¹x, as exactly as `control` finds it worth, constants
  // apart where every row continues. What is left of x's size, where that is known.
  double improve(Control& control, std::vector<double>& x) {
    columns_ = used_ = 1;
    deflate_ = control.continues;
    factored_ = false;
    residual_.swap(x);
    double left = 0.0;
    if (control.mode == Mode::kElimination) {
      eliminate(!kSparse && sizeof(Stored) == 4);
    } else if (control.mode == Mode::kKrylov) {
      const Operator op = make_operator(deflate_, 1);
      if (deflate_) op.remove_mean(residual_.data());
      const double size = norm2(residual_);
      const Index limit = 200 + 4 * static_cast<Index>(control.crossing());
      correction_.resize(residual_.size());
      const KrylovResult result = krylov(op, {size * control.reduction()}, {true}, limit, 400)[0];
      control.products += result.products;
      if (!(result.residual <= 0.5 * size)) control.stalled = 4;  // Krylov is of no use here
      left = result.residual / size;
    } else {
      control.sought = 0.1 * std::max(control.half_span(), control.target());
      series(control);
      left = kInf;
    }
    x.swap(correction_);
    return left;
  }

  // x := Σ_j (γP_π)^j x in the most products of a pass.
  void sum_of_products(Control& control, std::vector<double>& x) {
    columns_ = 1;
    deflate_ = control.continues;
    residual_.swap(x);
    control.sought = 0.0;
    series(control);
    x.swap(correction_);
  }

  Matrix& matrix() { return matrix_; }
  bool eliminated() const { return factored_; }

  // Solves for K right-hand sides (K,S); returns how many residuals missed the tolerance, or the
  // rounding level where that is higher. `mass` (K), for the transposed system: the Σ d x that is
  // known of the solution, d = A1, where b only has it up to rounding (M20).
  Index solve(Index right_sides, const double* b, double* out, double* residual_out,
              const double* mass = nullptr) {
    deflate_ = std::all_of(closed_.begin(), closed_.end(), [](char closed) { return closed != 0; });
    first_ = first_method();
    const Index S = model_.states;
    Index failed = 0;
    for (Index k = 0; k < right_sides; k += used_) {
      used_ = std::min(right_sides - k, kMostTogether);
      columns_ = used_ == 1 ? 1 : (used_ <= 4 ? 4 : kMostColumns);
      products_ = 0;
      mass_ = mass ? mass + k : nullptr;
      failed += solve_columns(b + k * S, out + k * S, residual_out + k);
      // Factors serve all that are left, and take about as long as S products with one of them.
      const Index left = right_sides - k - used_;
      if (first_ == kKrylov && S <= kDirectLimit && products_ * left > S) first_ = kDirect;
    }
    if (mass) settle_mass(right_sides, out, mass);
    return failed;
  }

 private:
  using Operator = PolicyOperator<Matrix>;
  using Flags = std::array<bool, kMostColumns>;
  enum Inner { kDirect, kKrylov, kRichardson };  // the last keeps the mass exactly

  static constexpr Index kDirectAuto = 256;  // factors cost less than a few dozen products
  static constexpr bool kSparse = std::is_same<Matrix, CsrPolicyMatrix>::value;
  // A dense matrix kept in float belongs to a single right-hand side.
  static constexpr Index kMostTogether =
      kSparse || std::is_same<Stored, double>::value ? kMostColumns : 1;

  Inner first_method() const {
    if (model_.states <= kDirectAuto) return kDirect;
    return kSparse ? kRichardson : kKrylov;
  }

  Operator make_operator(bool deflate, Index columns) const {
    return {matrix_, discount_, options_.transpose, deflate, columns, team_, interrupt_};
  }

  // Right-hand sides `used_` of them, side by side.
  Index solve_columns(const double* b, double* out, double* residual_out) {
    const Index S = model_.states;
    const std::size_t n = static_cast<std::size_t>(S * columns_);
    rhs_.assign(n, 0.0);
    for (Index w = 0; w < used_; ++w)
      for (Index s = 0; s < S; ++s) rhs_[s * columns_ + w] = b[w * S + s];
    x_.assign(n, 0.0);
    correction_.assign(n, 0.0);
    residual_.resize(n);
    size_ = make_operator(false, columns_).norms(rhs_.data(), options_.transpose);
    Flags open{};
    Columns reached{};
    for (Index w = 0; w < used_; ++w) {
      open[w] = size_[w] != 0.0 && std::isfinite(size_[w]);
      if (open[w]) continue;
      if (size_[w] != 0.0) reached[w] = std::numeric_limits<double>::quiet_NaN();
      for (std::size_t i = static_cast<std::size_t>(w); i < n; i += columns_) rhs_[i] = 0.0;
    }
    if (any(open)) {
      start();
      refine(first_, open, reached);
      if (any(open) && first_ == kRichardson) refine(kKrylov, open, reached);
      if (any(open) && first_ != kDirect && S <= kDirectLimit) {
        for (std::size_t i = 0; i < n; ++i)
          if (open[i % columns_]) x_[i] = 0.0;
        refine(kDirect, open, reached);
      } else if (any(open) && kSparse) {
        patient_ = true;
        refine(kRichardson, open, reached);
        patient_ = false;
      }
    }
    for (Index w = 0; w < used_; ++w) {
      residual_out[w] = reached[w];
      if (std::isfinite(reached[w]))
        for (Index s = 0; s < S; ++s) out[w * S + s] = x_[s * columns_ + w];
      else
        std::fill_n(out + w * S, S, std::numeric_limits<double>::quiet_NaN());
      open[w] = open[w] || !std::isfinite(reached[w]);
    }
    return std::count(open.begin(), open.end(), true);
  }

  // x += α A⁻ᵀ1 such that Σ d x is the mass: rounding leaves an error along the slow mode. Products
  // that take constants off keep the mass they started with.
  void settle_mass(Index right_sides, double* out, const double* mass) {
    if (deflate_ && !factored_) return;
    const Index S = model_.states;
    std::vector<double> slow;
    for (Index k = 0; k < right_sides; ++k) {
      double* const x = out + k * S;
      double left = mass[k], size = 0.0, unit = 0.0;
      for (Index s = 0; s < S; ++s) {
        left -= defect_[s] * x[s];
        size += defect_[s] * std::abs(x[s]);
      }
      // Without factors the slow mode costs as much as x did.
      if (!std::isfinite(left) || (!factored_ && std::abs(left) <= 1e-10 * size)) continue;
      if (slow.empty()) {
        slow.assign(S, 1.0);
        if (factored_) {
          elimination_->solve(slow.data(), true);
        } else {
          const std::vector<double> ones(S, 1.0);
          double residual;
          solve(1, ones.data(), slow.data(), &residual);
        }
      }
      for (Index s = 0; s < S; ++s) unit += defect_[s] * slow[s];
      for (Index s = 0; s < S; ++s) x[s] += left / unit * slow[s];
    }
  }

  static bool any(const Flags& flags) { return std::count(flags.begin(), flags.end(), true) > 0; }

  // The part of the solution along the slow mode is known beforehand: the constant that carries the
  // mean of b, or for the transpose the total mass Σb/(1−γ), spread like |b|. A direct solve of the
  // transpose starts from zero instead, because it keeps a non-negative solution non-negative.
  void start() {
    if (!deflate_ || (options_.transpose && first_ == kDirect)) return;
    Columns sum{}, size{}, scale{};
    for (std::size_t i = 0; i < x_.size(); ++i) {
      sum[i % columns_] += rhs_[i];
      size[i % columns_] += std::abs(rhs_[i]);
    }
    for (Index w = 0; w < used_ && mass_; ++w) sum[w] = mass_[w];
    for (Index w = 0; w < columns_; ++w) {
      const double parts = options_.transpose ? size[w] : static_cast<double>(model_.states);
      scale[w] = size[w] > 0.0 ? sum[w] / (1.0 - discount_) / parts : 0.0;
    }
    for (std::size_t i = 0; i < x_.size(); ++i)
      x_[i] = scale[i % columns_] * (options_.transpose ? std::abs(rhs_[i]) : 1.0);
  }

  // b − Ax from scratch; returns its norms. Where every row continues, A(α + z) = (1 − γ)α + Az is
  // used as it stands, so a large constant in x does not drown the rest.
  Columns residual() {
    const Operator op = make_operator(false, columns_);
    Columns constant{};
    if (!deflate_ || options_.transpose)
      return op.residual(rhs_.data(), constant, x_.data(), residual_.data(), options_.transpose);
    Columns low, high;
    op.range(x_.data(), low, high);
    for (Index w = 0; w < columns_; ++w) {
      low[w] = 0.5 * (low[w] + high[w]);
      constant[w] = (1.0 - discount_) * low[w];
    }
    shifted_ = x_;
    op.shift(PerColumn(low, columns_), shifted_.data());
    return op.residual(rhs_.data(), constant, shifted_.data(), residual_.data(), false);
  }

  // Corrects the open columns of x until their residuals are small enough or no longer fall. Closes
  // those that end at the tolerance or at the rounding level; `reached` are the final residuals.
  void refine(Inner method, Flags& open, Columns& reached) {
    constexpr int kRounds = 8;
    gave_up_ = false;
    const Operator op = make_operator(false, columns_);
    Flags going = open;
    Columns previous = residual(), current = previous, least = previous, target{};
    best_ = x_;
    bool restored = false;
    for (int round = 0; round < kRounds; ++round) {
      const Columns length = op.norms(x_.data(), options_.transpose);
      Columns keep{}, drop{};
      for (Index w = 0; w < columns_; ++w) {
        const Tolerance tolerance(options_.tol, size_[w], length[w]);
        going[w] = going[w] && !tolerance.met(current[w]);
        target[w] = tolerance.target();
        keep[w] = going[w] ? 1.0 : 0.0;
        drop[w] = going[w] ? 0.0 : -1.0;
      }
      if (!any(going) || gave_up_) break;
      if (std::count(drop.begin(), drop.begin() + columns_, -1.0) > 0) {
        const std::vector<double> all = residual_;
        op.add(PerColumn(drop, columns_), all.data(), residual_.data());
      }
      correct(method, target, going);
      op.add(PerColumn(keep, columns_), correction_.data(), x_.data());
      current = residual();
      for (Index w = 0; w < columns_; ++w) {
        if (!going[w]) continue;
        const bool better = current[w] < least[w];
        if (better) {
          least[w] = current[w];
          copy_column(w, columns_, x_, best_);
        }
        if (!(current[w] < 0.5 * previous[w]) && (round > 0 || !(current[w] < 1e3 * previous[w]))) {
          going[w] = false;
          if (!better) {
            copy_column(w, columns_, best_, x_);
            restored = true;
          }
        }
        previous[w] = current[w];
      }
    }
    if (restored) current = residual();
    const Columns length = op.norms(x_.data(), options_.transpose);
    for (Index w = 0; w < columns_; ++w) {
      if (!open[w]) continue;
      reached[w] = current[w];
      open[w] = !Tolerance(options_.tol, size_[w], length[w])
                     .solved(current[w], model_.additions(), model_.actions);
    }
  }

  // correction ≈ A⁻¹ residual, in the columns that are going
  void correct(Inner method, const Columns& target, const Flags& going) {
    if (method == kDirect) return eliminate(false);
    const Operator op = make_operator(deflate_, columns_);
    Columns mean{};
    if (deflate_) mean = op.remove_mean(residual_.data());
    if (method == kRichardson)
      richardson(op, target, going,
                 static_cast<Index>(std::min(1e7, 40.0 / (1.0 - discount_) + 100.0)));
    else
      krylov(op, target, going, 2000, 0);
    // For A itself the constant removed from the residual, and the one left by the compressed
    // solve, are both exact multiples of an eigenvector.
    if (deflate_ && !options_.transpose) {
      shifted_.resize(x_.size());
      Columns sum = op.image(correction_.data(), shifted_.data());
      for (Index w = 0; w < columns_; ++w)
        sum[w] = (sum[w] / static_cast<double>(model_.states) - mean[w]) / (1.0 - discount_);
      op.shift(PerColumn(sum, columns_), correction_.data());
    }
  }

  // BiCGStab, in at most so many products, and where it fails GMRES in `more`, or in what is left.
  KrylovResults krylov(const Operator& op, const Columns& target, const Flags& going, Index limit,
                       Index more) {
    // Max norm and 1-norm against the 2-norm of the recursions.
    const double root = std::sqrt(static_cast<double>(model_.states));
    Columns target2{};
    for (Index w = 0; w < columns_; ++w)
      target2[w] = options_.transpose ? target[w] / root : target[w];
    KrylovResults results{};
    BiCgStab<Operator>(op, residual_, correction_, target2, results).run(limit);
    Index products = 0;
    for (const KrylovResult& result : results) products = std::max(products, result.products);
    products_ += products;
    const Operator single = make_operator(deflate_, 1);
    const std::size_t n = static_cast<std::size_t>(model_.states);
    std::vector<double> x(n), rest(n);
    for (Index w = 0; w < columns_; ++w) {
      if (!going[w] || results[w].residual <= target2[w] || (!more && results[w].products >= limit))
        continue;
      for (std::size_t i = 0; i < n; ++i) x[i] = correction_[i * columns_ + w];
      single(x, rest);
      for (std::size_t i = 0; i < n; ++i) rest[i] = residual_[i * columns_ + w] - rest[i];
      const Index left = more ? more : limit - results[w].products;
      const KrylovResult last = gmres(single, rest, x, target2[w], left);
      products_ += last.products;
      results[w] = {last.residual, results[w].products + last.products};
      for (std::size_t i = 0; i < n; ++i) correction_[i * columns_ + w] = x[i];
    }
    return results;
  }

  // correction_ := Σ_j (γP_π)^j residual_ until enough(j, sizes of the last term), which is asked
  // for every so many products, `limit` of them at most.
  template <class Enough>
  void series(const Operator& op, Index every, Index limit, Enough&& enough) {
    term_ = correction_ = residual_;
    next_.resize(term_.size());
    for (Index j = 1; j <= limit; ++j) {
      op.accumulate(term_.data(), next_.data(), correction_.data());
      term_.swap(next_);
      if (j % every == 0 && enough(j, term_sizes(op))) return;
    }
  }

  void series(Control& control) {
    const Operator op = make_operator(false, 1);
    series(op, 10, control.means.limit,
           [&](Index j, const Columns& size) { return !control.another_product(size[0], j); });
  }

  // A keeps constants, and those of a correction are found exactly: only the rest of the last term
  // has to die out.
  Columns term_sizes(const Operator& op) const {
    if (!deflate_ || options_.transpose) return op.norms(term_.data(), options_.transpose);
    Columns low, high;
    op.range(term_.data(), low, high);
    for (Index w = 0; w < columns_; ++w) high[w] = 0.5 * (high[w] - low[w]);
    return high;
  }

  // Σ_j (γP_π)^j r while it contracts well: gives up once the measured rate predicts more products
  // than a Krylov method is likely to need. Nothing contracts before news has crossed the states,
  // which takes the diameter of a grid at most on most problems.
  void richardson(const Operator& op, const Columns& target, const Flags& going, Index limit) {
    constexpr Index kWindow = 32;
    constexpr double kPatience = 4000.0;
    const Index crossing =
        kWindow *
        (1 + static_cast<Index>(2.0 * std::sqrt(static_cast<double>(model_.states))) / kWindow);
    term_ = residual_;
    Columns window = term_sizes(op), long_window = window;
    series(op, 8, limit, [&](Index j, const Columns& size) {
      bool done = true;
      for (Index w = 0; w < columns_; ++w) {
        if (!going[w] || size[w] <= 0.1 * target[w] * (1.0 - discount_)) continue;
        const double rate = std::pow(size[w] / window[w], 1.0 / kWindow);
        done = done && j % kWindow == 0 && size[w] * rate <= target[w] * (1.0 - rate);
      }
      if (done) return true;
      if (j % kWindow == 0) window = size;
      if (j % crossing != 0) return false;
      for (Index w = 0; w < columns_; ++w) {
        if (!going[w] || patient_) continue;
        const double rate = std::pow(size[w] / long_window[w], 1.0 / crossing);
        const double left = std::log(target[w] * (1.0 - rate) / size[w]) / std::log(rate);
        if (!(rate < 1.0 && left < kPatience)) gave_up_ = true;
      }
      long_window = size;
      return gave_up_;
    });
  }

  // correction_ := A⁻¹ residual_, with P_π as it is kept, or from P again.
  void eliminate(bool again) {
    factor(again);
    correction_ = residual_;
    elimination_->solve(correction_.data(), options_.transpose, columns_);
  }

  void factor(bool again) {
    if (factored_) return;
    const Index S = model_.states, A = model_.actions;
    if (!elimination_) elimination_ = std::make_unique<Elimination>(S);
    team_.run(S, again ? 2.0 * model_.work() : matrix_.work(), [&](Index s, int) {
      double* const row = elimination_->row(s);
      std::fill(row, row + S, 0.0);
      if (!again) return matrix_.add_row(s, discount_, row);
      model_.policy_row(s, weight_.data() + s * A, row);
      for (Index t = 0; t < S; ++t) row[t] *= discount_;
    });
    std::copy(defect_.begin(), defect_.end(), elimination_->defect());
    elimination_->factor(team_, interrupt_);
    factored_ = true;
  }

  const Model& model_;
  Matrix& matrix_;
  std::unique_ptr<Elimination>& elimination_;
  double discount_;
  const PolicySystemOptions options_;
  Team& team_;
  Interrupt& interrupt_;
  bool deflate_ = false, factored_ = false;
  bool gave_up_ = false;  // Richardson, for being slow
  bool patient_ = false;  // which it may be, as the last resort
  Inner first_ = kDirect;
  Index columns_ = 1, used_ = 0;  // at work; those in use come first
  Index products_ = 0;            // with the columns, in Krylov methods
  Columns size_{};                // ‖b‖
  const double* mass_ = nullptr;  // of the columns in use
  std::vector<double> weight_, defect_;
  std::vector<double> rhs_, x_, best_, correction_, residual_, shifted_, term_, next_;
  std::vector<char> closed_;  // whether all that leaves a state arrives somewhere
};

template <class Model, class Stored = double>
auto make_policy_matrix(const Model& model, const PolicyPattern* pattern, bool keep_mass) {
  using Matrix = typename PolicyMatrixOf<Model, Stored>::type;
  if constexpr (std::is_same<Matrix, CsrPolicyMatrix>::value)
    return std::make_unique<Matrix>(*pattern);
  else
    return std::make_unique<Matrix>(model.states, keep_mass);
}

}  // namespace birl
