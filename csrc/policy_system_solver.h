// One system with I − γP_π or its transpose: a direct or an iterative method inside, residuals from
// scratch and corrections outside, until nothing more is gained.
#pragma once

#include <cmath>
#include <limits>
#include <memory>

#include "elimination.h"
#include "krylov.h"
#include "policy_matrix.h"
#include "policy_system.h"

namespace birl {

struct PolicySystemOptions {
  bool transpose;
  Index method;          // 0 auto, 2 direct, 3 Krylov, 5 Richardson with exact mass
  double tol;            // relative to ‖b‖; 0: as far as rounding allows
  Index max_iterations;  // products with P_π per right-hand side; 0: a default
};

inline double norm(const std::vector<double>& x, bool one_norm) {
  double sum = 0.0, largest = 0.0;
  for (const double e : x) {
    sum += std::abs(e);
    largest = std::max(largest, std::abs(e));
  }
  return one_norm || std::isnan(sum) ? sum : largest;
}

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
      double mass = 0.0, stopping = 0.0;
      for (Index i = s * A; i < s * A + A; ++i) {
        weight_[i] = policy[i] * inverse_sum[i];
        mass += policy[i];
        if (inverse_sum[i] == 0.0) stopping += policy[i];
      }
      // A softmax sums to one up to rounding; 1 − γ must not inherit that rounding error.
      const bool normalised = std::abs(mass - 1.0) <= 4.0 * kEps * static_cast<double>(A);
      const double lost = normalised ? stopping : 1.0 - (mass - stopping);
      defect_[s] = (1.0 - discount_) + discount_ * lost;
      closed_[s] = normalised && stopping == 0.0;
    }
    return weight_.data();
  }

  Matrix& matrix() { return matrix_; }

  // True if the residual met the tolerance, or the rounding level where that is higher.
  bool solve(const double* b, double* out, double* residual_out) {
    const std::size_t n = static_cast<std::size_t>(matrix_.size());
    deflate_ = std::all_of(closed_.begin(), closed_.end(), [](char closed) { return closed != 0; });
    rhs_.assign(b, b + n);
    x_.assign(n, 0.0);
    correction_.resize(n);
    const double size = norm(rhs_, options_.transpose);
    bool solved = size == 0.0;
    double reached = solved ? 0.0 : std::numeric_limits<double>::quiet_NaN();
    if (!solved && std::isfinite(size)) {
      start();
      const bool given = options_.method != kAuto;
      const bool small = model_.states <= kDirectAuto;
      constexpr bool sparse = std::is_same<Matrix, CsrPolicyMatrix>::value;
      const Index first =
          given ? options_.method : (small ? kDirect : (sparse ? kRichardson : kKrylov));
      reached = refine(first, solved);
      if (!solved && first == kRichardson) reached = refine(kKrylov, solved);
      if (!solved && first != kDirect && model_.states <= kDirectLimit) {
        std::fill(x_.begin(), x_.end(), 0.0);
        reached = refine(kDirect, solved);
      }
    }
    if (solved || std::isfinite(reached))
      std::copy(x_.begin(), x_.end(), out);
    else
      std::fill(out, out + n, std::numeric_limits<double>::quiet_NaN());
    *residual_out = reached;
    return solved;
  }

 private:
  static constexpr double kEps = std::numeric_limits<double>::epsilon();
  static constexpr Index kDirectAuto = 256;    // factors cost less than a few dozen products
  static constexpr Index kDirectLimit = 2500;  // beyond it the square matrix is the larger evil
  enum Method : Index { kAuto = 0, kDirect = 2, kKrylov = 3, kRichardson = 5 };

  // The part of the solution along the slow mode is known beforehand: the constant that carries the
  // mean of b, or for the transpose the total mass Σb/(1−γ), spread like |b|. A direct solve of the
  // transpose starts from zero instead, because it keeps a non-negative solution non-negative.
  void start() {
    if (!deflate_ || (options_.transpose && direct_first())) return;
    double sum = 0.0, size = 0.0;
    for (const double e : rhs_) {
      sum += e;
      size += std::abs(e);
    }
    const double mass = sum / (1.0 - discount_);
    for (std::size_t i = 0; i < x_.size(); ++i)
      x_[i] = options_.transpose ? mass * (std::abs(rhs_[i]) / size)
                                 : mass / static_cast<double>(x_.size());
  }

  bool direct_first() const {
    return options_.method == kDirect || (options_.method == kAuto && model_.states <= kDirectAuto);
  }

  // b − Ax from scratch. Where every row continues, A(α + z) = (1 − γ)α + Az is used as it stands,
  // so a large constant in x does not drown the rest.
  double residual() {
    const std::size_t n = x_.size();
    double middle = 0.0;
    if (deflate_ && !options_.transpose) {
      const auto ends = std::minmax_element(x_.begin(), x_.end());
      middle = 0.5 * (*ends.first + *ends.second);
    }
    shifted_ = x_;
    for (double& e : shifted_) e -= middle;
    residual_.resize(n);
    PolicyOperator<Matrix>(matrix_, discount_, options_.transpose, false, team_, interrupt_)(
        shifted_, residual_);
    const double constant = (1.0 - discount_) * middle;
    for (std::size_t i = 0; i < n; ++i) residual_[i] = (rhs_[i] - constant) - residual_[i];
    return norm(residual_, options_.transpose);
  }

  // Corrects x until the residual is small enough or no longer falls. Returns the final residual.
  double refine(Index method, bool& solved) {
    constexpr int kRounds = 8;
    const double size = norm(rhs_, options_.transpose);
    double previous = residual(), current = previous;
    best_ = x_;
    for (int round = 0; round < kRounds; ++round) {
      // Rounding of one product and one subtraction; the last bits are not worth a round.
      const double floor = 2.0 * kEps * (size + 2.0 * norm(x_, options_.transpose));
      if (current <= std::max(options_.tol * size, floor)) break;
      correct(method, std::max(0.5 * options_.tol * size, 0.25 * floor));
      for (std::size_t i = 0; i < x_.size(); ++i) x_[i] += correction_[i];
      current = residual();
      if (current < previous || round == 0) best_ = x_;
      if (!(current < 0.5 * previous) && (round > 0 || !(current < 1e3 * previous))) {
        if (!(current < previous)) {
          x_ = best_;
          current = residual();
        }
        break;
      }
      previous = current;
    }
    const double units = 16.0 + model_.additions() + 0.25 * static_cast<double>(model_.actions);
    const double floor = units * kEps * (size + 2.0 * norm(x_, options_.transpose));
    solved = current <= std::max(options_.tol * size, floor);
    return current;
  }

  // correction ≈ A⁻¹ residual
  void correct(Index method, double target) {
    if (method == kDirect) {
      factor();
      correction_ = residual_;
      elimination_->solve(correction_.data(), options_.transpose);
      return;
    }
    const PolicyOperator<Matrix> op(matrix_, discount_, options_.transpose, deflate_, team_,
                                    interrupt_);
    const double mean = deflate_ ? op.remove_mean(residual_.data()) : 0.0;
    const Index given = options_.max_iterations;
    if (method == kRichardson) {
      const double all = std::min(1e7, 40.0 / (1.0 - discount_) + 100.0);
      richardson(op, target, given > 0 ? given : static_cast<Index>(all));
    } else {
      const Index limit = given > 0 ? given : 2000;
      // Max norm and 1-norm against the 2-norm of the recursions.
      const double root = std::sqrt(static_cast<double>(x_.size()));
      const double target2 = options_.transpose ? target / root : target;
      KrylovResult result = bicgstab(op, residual_, correction_, target2, limit);
      if (!(result.residual <= target2) && result.products < limit) {
        std::vector<double> rest(x_.size());
        op(correction_, rest);
        for (std::size_t i = 0; i < rest.size(); ++i) rest[i] = residual_[i] - rest[i];
        gmres(op, std::move(rest), correction_, target2, limit - result.products);
      }
    }
    // For A itself the constant removed from the residual, and the one left by the compressed
    // solve, are both exact multiples of an eigenvector.
    if (deflate_ && !options_.transpose) {
      std::vector<double> image(x_.size());
      PolicyOperator<Matrix>(matrix_, discount_, false, false, team_, interrupt_)(correction_,
                                                                                  image);
      double sum = 0.0;
      for (const double e : image) sum += e;
      const double constant = (mean - sum / static_cast<double>(x_.size())) / (1.0 - discount_);
      for (double& e : correction_) e += constant;
    }
  }

  // Σ_j (γP_π)^j r while it contracts well: gives up once the measured rate predicts more products
  // than a Krylov method is likely to need.
  void richardson(const PolicyOperator<Matrix>& op, double target, Index limit) {
    constexpr Index kWindow = 32;
    constexpr double kPatience = 4000.0;
    const bool one_norm = options_.transpose;
    std::vector<double> term = residual_, next(term.size());
    correction_ = residual_;
    double window_start = norm(term, one_norm), size = window_start;
    for (Index j = 1; j <= limit; ++j) {
      op.step(term.data(), next.data());
      term.swap(next);
      for (std::size_t i = 0; i < term.size(); ++i) correction_[i] += term[i];
      if (j % 8 != 0) continue;
      size = norm(term, one_norm);
      if (size == 0.0) return;
      if (j % kWindow != 0) {
        if (size <= 0.1 * target * (1.0 - discount_)) return;
        continue;
      }
      const double rate = std::pow(size / window_start, 1.0 / kWindow);
      window_start = size;
      if (size * rate <= target * (1.0 - rate)) return;
      const double predicted = std::log(target * (1.0 - rate) / size) / std::log(rate);
      if (options_.method != kRichardson && !(rate < 1.0 && predicted < kPatience)) return;
    }
  }

  void factor() {
    if (factored_) return;
    const Index S = model_.states;
    if (!elimination_) elimination_ = std::make_unique<Elimination>(S);
    for (Index s = 0; s < S; ++s) {
      std::fill(elimination_->row(s), elimination_->row(s) + S, 0.0);
      matrix_.add_row(s, discount_, elimination_->row(s));
    }
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
  std::vector<double> weight_, defect_, rhs_, x_, best_, correction_, residual_, shifted_;
  std::vector<char> closed_;  // whether all that leaves a state arrives somewhere
};

template <class Model, class Stored = double>
auto make_policy_matrix(const Model& model, const PolicyPattern* pattern) {
  using Matrix = typename PolicyMatrixOf<Model, Stored>::type;
  if constexpr (std::is_same<Matrix, CsrPolicyMatrix>::value)
    return std::make_unique<Matrix>(*pattern);
  else
    return std::make_unique<Matrix>(model.states, !std::is_same<Stored, double>::value);
}

}  // namespace birl
