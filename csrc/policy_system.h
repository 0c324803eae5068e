// Linear systems with A = I − γP_π and its transpose.
#pragma once

#include "batch.h"
#include "parallel.h"

namespace birl {

struct PolicySolve {
  Index right_sides;     // K
  const double* policy;  // (N,G,S,A)
  const double* rhs;     // (N,G,K,S)
  double* out;           // (N,G,K,S)
  double* residual;      // (N,G,K): ‖b − Ax‖, max norm, or 1-norm if transpose
  bool transpose;
  Index method;          // 0 auto, 2 direct, 3 Krylov, 5 Richardson with exact mass
  double tol;            // relative to ‖b‖; 0: as far as rounding allows
  Index max_iterations;  // products with P_π per right-hand side; 0: a default
  int threads;
};

// Solves all N·G·K systems; returns how many missed both the tolerance and the rounding level.
Index policy_solve(const Batch& batch, const PolicySolve& request, Interrupt& interrupt);

// 1/σ for every row, zero for a row without continuation.
template <class Model>
void inverse_row_sums(const Model& model, double* inverse) {
  const Index rows = model.states * model.actions;
  std::vector<double> least(rows);
  model.row_sums(0, rows, inverse, least.data());
  for (Index i = 0; i < rows; ++i) inverse[i] = inverse_row_sum(inverse[i]);
}

// A as an operator. With `deflate`, its compression to vectors of mean zero: valid when A maps
// constants to (1 − γ) times themselves, that is when every row continues. The slow mode 1 − γ is
// then gone; the transpose leaves mean zero (total mass zero) invariant and is only kept there.
template <class Matrix>
class PolicyOperator {
 public:
  PolicyOperator(const Matrix& matrix, double discount, bool transpose, bool deflate, Team& team,
                 Interrupt& interrupt)
      : matrix_(matrix),
        discount_(discount),
        transpose_(transpose),
        deflate_(deflate),
        team_(team),
        interrupt_(interrupt) {}

  // y = γ P_π x, without its mean if deflated
  void step(const double* x, double* y) const {
    interrupt_.check();
    if (transpose_)
      matrix_.apply_transpose(x, y, team_);
    else
      matrix_.apply(x, y, team_);
    const Index n = matrix_.size();
    for (Index i = 0; i < n; ++i) y[i] *= discount_;
    if (deflate_) remove_mean(y);
  }

  void operator()(const std::vector<double>& x, std::vector<double>& y) const {
    step(x.data(), y.data());
    for (std::size_t i = 0; i < x.size(); ++i) y[i] = x[i] - y[i];
    if (deflate_) remove_mean(y.data());
  }

  double remove_mean(double* x) const {
    const Index n = matrix_.size();
    double sum = 0.0;
    for (Index i = 0; i < n; ++i) sum += x[i];
    const double mean = sum / static_cast<double>(n);
    for (Index i = 0; i < n; ++i) x[i] -= mean;
    return mean;
  }

 private:
  const Matrix& matrix_;
  double discount_;
  bool transpose_, deflate_;
  Team& team_;
  Interrupt& interrupt_;
};

}  // namespace birl
