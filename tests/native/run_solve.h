// Calling the solve kernel on the host.
#pragma once

#include <cstring>

#include "cases.h"
#include "check.h"
#include "cuda/block/solve.h"
#include "cuda/layer/host_team.h"

namespace test {

using namespace birl::device;
using birl::Batch;
using birl::kEps;

template <class Real>
struct Solution {
  std::vector<double> value, relative, info;
  std::vector<Real> q, advantage, policy, log_policy;
  std::vector<Index> status;

  explicit Solution(const Case<Real>& c)
      : value(c.items() * c.S, -7.0),
        relative(value),
        info(c.items() * (birl::kInfo + c.S), -7.0),
        q(c.items() * c.table(), Real(-7)),
        advantage(q),
        policy(q),
        log_policy(q),
        status(c.items(), -7),
        width(birl::kInfo + c.S) {}

  const double* row(Index item) const { return info.data() + item * width; }

  Index width;  // of a row
};

template <class T>
bool same_bits(const std::vector<T>& x, const std::vector<T>& y) {
  return x.size() == y.size() &&
         (x.empty() || std::memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0);
}

// Whatever the kernel is called.
template <class Real>
bool same_bits(const Solution<Real>& x, const Solution<Real>& y) {
  std::vector<double> info = x.info;
  for (std::size_t i = birl::kInfo - 1; i < info.size(); i += x.width) info[i] = y.info[i];
  return same_bits(x.value, y.value) && same_bits(x.q, y.q) &&
         same_bits(x.advantage, y.advantage) && same_bits(x.policy, y.policy) &&
         same_bits(x.log_policy, y.log_policy) && same_bits(info, y.info) &&
         same_bits(x.status, y.status);
}

struct SolveOptions {
  Index method;
  double tol;
  Index max_iterations;
  birl::Rigour validate;
};

inline SolveOptions options(Index method = 0, double tol = 0.0, Index max_iterations = 0,
                            birl::Rigour validate = birl::Rigour::kOrEnding) {
  return {method, tol, max_iterations, validate};
}

template <class Real>
SharedRows<Real> shared_rows(const Case<Real>& c) {
  return {c.transition.data(), c.S, c.A};
}
template <class Real>
GlobalRows<Real> global_rows(const Case<Real>& c) {
  return {c.transition.data(), c.S, c.A};
}
template <class Real>
CsrRows<Real> csr_rows(const Case<Real>& c) {
  return {c.stored.data(), c.S, c.A, c.crow.data(), c.col.data(), static_cast<Index>(c.col.size())};
}

template <class Real>
Batch device_batch(const Case<Real>& c, bool sparse) {
  return {sizeof(Real) == 8,
          c.N,
          c.G,
          c.S,
          c.A,
          sparse ? c.stored.data() : c.transition.data(),
          sparse ? c.crow.data() : nullptr,
          sparse ? c.col.data() : nullptr,
          sparse ? static_cast<Index>(c.col.size()) : 0,
          c.reward.data(),
          c.log_reference.empty() ? nullptr : c.log_reference.data(),
          c.discount.data(),
          c.temperature.data()};
}

template <class Real>
birl::Solve request_of(Solution<Real>& out, const SolveOptions& how, const double* initial) {
  return {initial,
          out.value.data(),
          out.relative.data(),
          out.q.data(),
          out.advantage.data(),
          out.policy.data(),
          out.log_policy.data(),
          out.info.data(),
          out.status.data(),
          static_cast<birl::Method>(how.method),
          how.tol,
          how.max_iterations,
          how.validate};
}

template <class Home, class Real = typename Home::Real>
SolveKernel<Home> solve_kernel(const Home& home, const Case<Real>& c, Solution<Real>& out,
                               const SolveOptions& how, const double* initial = nullptr,
                               bool direct = true) {
  return {home, device_batch(c, false), request_of(out, how, initial),
          Plan{Residence::kGlobal, 0, direct, true, true}};
}

template <class Home, class Real = typename Home::Real>
Solution<Real> solve(const Home& home, const Case<Real>& c, const SolveOptions& how = options(),
                     const HostRun& run = {}, const double* initial = nullptr) {
  Solution<Real> out(c);
  run_serial(solve_kernel(home, c, out, how, initial), c.items(), run);
  for (Index item = 0; item < c.items(); ++item)
    expect(out.row(item)[birl::kInfo - 1] == static_cast<double>(Home::kName), "a kernel's name");
  return out;
}

}  // namespace test
