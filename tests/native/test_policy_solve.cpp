// The policy-system kernel and the outer product against plain sums and Gaussian elimination.
#include "check.h"
#include "cuda/block/outer.h"
#include "cuda/block/policy_solve.h"
#include "run_solve.h"
#include "systems.h"

namespace test {
namespace {

template <class Home, class Real = typename Home::Real>
Answer policy_solve(const Home& home, const Case<Real>& c, const Systems& systems, bool transpose,
                    const HostRun& how = {}) {
  Answer answer{std::vector<double>(systems.rhs.size(), -7.0),
                std::vector<double>(c.items() * systems.K, -7.0)};
  const PolicySolveKernel<Home> kernel{home,
                                       device_batch(c, false),
                                       {systems.K, systems.policy.data(), systems.rhs.data(),
                                        answer.x.data(), answer.residual.data(), transpose},
                                       {}};
  run_serial(kernel, c.items(), how);
  return answer;
}

template <class Real>
void solves(const Case<Real>& c, const Systems& systems, bool transpose) {
  const Answer found = policy_solve(shared_rows(c), c, systems, transpose);
  const std::string what = c.name + (transpose ? " transposed" : "");
  for (const HostRun& run :
       {HostRun{32, Order::kBackward, 0, 1}, HostRun{48, Order::kShuffled, 1, 2},
        HostRun{5, Order::kForward, 0, 1}}) {
    const Answer other = policy_solve(shared_rows(c), c, systems, transpose, run);
    expect(same_bits(found, other), what + ": bits depend on the order");
  }
  const Answer global = policy_solve(global_rows(c), c, systems, transpose);
  expect(same_bits(found.x, global.x), what + ": not its twin");
  const Answer csr = policy_solve(csr_rows(c), c, systems, transpose);
  expect_solved(c, systems, transpose, found, transpose ? "dense transposed" : "dense");
  expect_solved(c, systems, transpose, csr, transpose ? "csr transposed" : "csr");
}

// A non-negative right-hand side has every component to full relative accuracy.
void keeps_small_components() {
  Traits traits;
  traits.discount = 0.9999999;
  const Case<double> c = make_case<double>(20, 3, traits, 17);
  const Systems systems = make_systems(c, 1, true, 3);
  const Answer found = policy_solve(shared_rows(c), c, systems, true);
  std::vector<Long> matrix = policy_system(c, 0, systems.policy.data());
  for (int s = 0; s < c.S; ++s) {  // the row sums the kernel takes for exact
    Long sum = 0;
    for (int t = 0; t < c.S; ++t) sum += matrix[s * c.S + t];
    matrix[s * c.S + s] += (1 - static_cast<Long>(c.discount[0])) - sum;
  }
  for (int i = 0; i < c.S; ++i)
    for (int j = 0; j < i; ++j) std::swap(matrix[i * c.S + j], matrix[j * c.S + i]);
  std::vector<Long> x(systems.rhs.begin(), systems.rhs.end());
  gauss(matrix, x);
  for (int s = 0; s < c.S; ++s)
    near(found.x[s], static_cast<double>(x[s]), 1e-11 * static_cast<double>(x[s]), "relative");
}

void a_bad_right_side_stays_alone() {
  const Case<double> c = make_case<double>(9, 2, {}, 5);
  Systems systems = make_systems(c, 3, false, 4);
  const Answer wanted = policy_solve(shared_rows(c), c, systems, false);
  systems.rhs[c.S + 2] = std::nan("");
  const Answer found = policy_solve(shared_rows(c), c, systems, false);
  for (int s = 0; s < c.S; ++s) {
    expect(found.x[s] == wanted.x[s], "the first column");
    expect(std::isnan(found.x[c.S + s]), "the second is NaN");
    expect(found.x[2 * c.S + s] == wanted.x[2 * c.S + s], "the third column");
  }
  expect(std::isnan(found.residual[1]), "its residual");
}

template <class Real>
void outer(const Case<Real>& c) {
  const Systems systems = make_systems(c, 1, false, 9);
  std::vector<double> shift;
  for (Index i = 0; i < c.N * c.table(); ++i) shift.push_back(0.25 * static_cast<double>(i % 5));
  const Index nnz = static_cast<Index>(c.col.size());
  std::vector<Real> dense(c.transition.size(), Real(-7)), sparse(c.stored.size(), Real(-7));
  const auto kernel = [&](bool on_pattern, std::vector<Real>& out) {
    return OuterKernel<Real>{device_batch(c, on_pattern),
                             {systems.policy.data(), systems.rhs.data(), shift.data(), out.data()}};
  };
  const auto on_dense = kernel(false, dense), on_pattern = kernel(true, sparse);
  run_serial(on_dense, c.N * on_dense.items_per_transition(), {32, Order::kShuffled, 3, 2});
  run_serial(on_pattern, c.N * on_pattern.items_per_transition(), {32, Order::kShuffled, 3, 2});
  const double eps = std::numeric_limits<Real>::epsilon();
  for (int n = 0; n < c.N; ++n)
    for (Index row = 0; row < c.table(); ++row) {
      const auto wanted = [&](int t) {
        Long sum = -static_cast<Long>(shift[n * c.table() + row]);
        for (int g = 0; g < c.G; ++g)
          sum += static_cast<Long>(systems.policy[(n * c.G + g) * c.table() + row]) *
                 systems.rhs[(n * c.G + g) * c.S + t];
        return static_cast<double>(sum);
      };
      for (int t = 0; t < c.S; ++t)
        near(dense[(n * c.table() + row) * c.S + t], wanted(t), eps * (2.0 + std::fabs(wanted(t))),
             "outer " + c.name);
      for (Index k = c.crow[row]; k < c.crow[row + 1]; ++k)
        near(sparse[n * nnz + k], wanted(static_cast<int>(c.col[k])), 4.0 * eps,
             "outer on a pattern " + c.name);
    }
}

template <class Real>
void all() {
  for (const int S : {1, 2, 7, 31, 32, 33, 65})
    for (const bool transpose : {false, true})
      for (const double discount : {0.9, 0.9999}) {
        Traits traits;
        traits.discount = discount;
        traits.N = 2;
        traits.G = 2;
        traits.terminal = S == 7 || S == 33;
        const Case<Real> c = make_case<Real>(S, S == 65 ? 2 : 5, traits, 50 + S);
        solves(c, make_systems(c, S == 7 ? 40 : 3, false, 2), transpose);
        if (!transpose) outer(c);
      }
}

}  // namespace
}  // namespace test

int main() {
  using namespace test;
  all<double>();
  all<float>();
  keeps_small_components();
  a_bad_right_side_stays_alone();
  return summary("policy_solve");
}
