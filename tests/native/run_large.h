// Calling the wide kernels on the host.
#pragma once

#include "device/host_wide_team.h"
#include "device/large_solve.h"
#include "run_solve.h"
#include "sparse.h"

namespace test {

using birl::WidePattern;

// The pattern of P_π as a device would hold it.
struct HostPattern {
  birl::PolicyPattern pattern;
  std::vector<std::int32_t> col, transpose_col;

  template <class Real>
  explicit HostPattern(const Case<Real>& c)
      : pattern(c.crow.data(), c.col.data(), c.S, c.A),
        col(pattern.col.begin(), pattern.col.end()),
        transpose_col(pattern.transpose_col.begin(), pattern.transpose_col.end()) {}

  WidePattern view() const {
    return {pattern.crow.data(),           col.data(),           pattern.slot.data(),
            pattern.transpose_crow.data(), transpose_col.data(), pattern.transpose_slot.data(),
            static_cast<Index>(col.size())};
  }
};

template <class Real>
DenseWide<Real, false> far_rows(const Case<Real>& c, bool staged = true, bool near = true,
                                bool far_tables = false) {
  return {c.transition.data(), c.S, c.A, 2, 0, staged, near, far_tables};
}
template <class Real>
DenseWide<Real, true> cluster_rows(const Case<Real>& c, int blocks) {
  return {c.transition.data(), c.S, c.A, 3, (c.S + blocks - 1) / blocks, false, true, false};
}
template <int kLanes, class Real>
CsrWide<Real, kLanes> wide_csr(const Case<Real>& c, const WidePattern& pattern = {}) {
  return {
      c.stored.data(), c.S,  c.A, 5, c.crow.data(), c.col.data(), static_cast<Index>(c.col.size()),
      pattern,         false};
}

template <class Home, class Real = typename Home::Real>
LargeSolve<Home> large_solve(const Home& home, const Case<Real>& c, Solution<Real>& out,
                             const SolveOptions& how, const double* initial = nullptr) {
  return {home, solve_kernel(global_rows(c), c, out, how, initial).arguments};
}

template <class Home, class Real = typename Home::Real>
Solution<Real> solve_large(const Home& home, const Case<Real>& c,
                           const SolveOptions& how = options(), const WideRun& run = {},
                           const double* initial = nullptr) {
  Solution<Real> out(c);
  run_wide_serial(large_solve(home, c, out, how, initial), c.items(), run);
  return out;
}

}  // namespace test
