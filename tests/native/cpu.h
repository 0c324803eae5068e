// The CPU module's entry points on the problems of cases.h, with memory of exactly the right size.
#pragma once

#include <cstring>

#include "cases.h"
#include "check.h"
#include "cpu/entry/policy_solve.h"
#include "cpu/entry/solve.h"
#include "cpu/entry/solve_vjp.h"

namespace test {

template <class Real>
birl::Batch batch_of(const Case<Real>& c, bool sparse) {
  birl::Batch batch{sizeof(Real) == 8,
                    c.N,
                    c.G,
                    c.S,
                    c.A,
                    c.transition.data(),
                    nullptr,
                    nullptr,
                    0,
                    c.reward.data(),
                    c.log_reference.empty() ? nullptr : c.log_reference.data(),
                    c.discount.data(),
                    c.temperature.data()};
  if (sparse) {
    batch.transition = c.stored.data();
    batch.crow = c.crow.data();
    batch.col = c.col.data();
    batch.nnz = static_cast<Index>(c.col.size());
  }
  return batch;
}

inline birl::Interrupt never() {
  return birl::Interrupt([] { return false; });
}

template <class Real>
struct Solution {
  std::vector<double> value, relative, info;
  std::vector<Real> q, advantage, policy, log_policy;
  std::vector<Index> status;

  explicit Solution(const Case<Real>& c)
      : value(c.items() * c.S),
        relative(value.size()),
        info(c.items() * (birl::kInfo + c.S)),
        q(c.items() * c.table()),
        advantage(q.size()),
        policy(q.size()),
        log_policy(q.size()),
        status(c.items()),
        width(birl::kInfo + c.S) {}

  double bound(Index item) const { return info[item * width + 1]; }

  Index width;  // of a row of info
};

// Every number of every table, one after the other.
using Bytes = std::vector<unsigned char>;
template <class... Tables>
Bytes bytes_of(const Tables&... tables) {
  Bytes all;
  const auto add = [&all](const auto& table) {
    const auto* const from = reinterpret_cast<const unsigned char*>(table.data());
    all.insert(all.end(), from, from + table.size() * sizeof(table[0]));
  };
  (add(tables), ...);
  return all;
}
template <class Real>
Bytes bits(const Solution<Real>& s) {
  return bytes_of(s.value, s.relative, s.info, s.q, s.advantage, s.policy, s.log_policy, s.status);
}

template <class Real>
void solve(const Case<Real>& c, bool sparse, Index method, int threads, Solution<Real>& out) {
  birl::Interrupt interrupt = never();
  birl::solve(batch_of(c, sparse),
              {nullptr, out.value.data(), out.relative.data(), out.q.data(), out.advantage.data(),
               out.policy.data(), out.log_policy.data(), out.info.data(), out.status.data(),
               static_cast<birl::Method>(method), 0.0, 0, birl::Rigour::kOrEnding, threads},
              interrupt);
}

// T of `value`, and the tables there.
template <class Real>
void sweep(const Case<Real>& c, bool sparse, const std::vector<double>& value, int threads,
           Solution<Real>& out) {
  birl::Interrupt interrupt = never();
  birl::solve(batch_of(c, sparse),
              {value.data(), out.value.data(), out.relative.data(), out.q.data(),
               out.advantage.data(), out.policy.data(), out.log_policy.data(), out.info.data(),
               out.status.data(), birl::Method::kSweep, 0.0, 1, birl::Rigour::kOff, threads},
              interrupt);
}

struct Systems {
  std::vector<double> policy, rhs, x, residual;
};

// The systems of a solution's policies, two right-hand sides each.
template <class Real>
Systems systems_of(const Case<Real>& c, const Solution<Real>& solution) {
  Systems systems;
  systems.policy.assign(solution.policy.begin(), solution.policy.end());
  for (Index i = 0; i < 2 * c.items() * c.S; ++i)
    systems.rhs.push_back(std::sin(1.0 + static_cast<double>(i)));
  systems.x.resize(systems.rhs.size());
  systems.residual.resize(2 * c.items());
  return systems;
}

template <class Real>
Index policy_solve(const Case<Real>& c, bool sparse, bool transpose, int threads,
                   Systems& systems) {
  birl::Interrupt interrupt = never();
  return birl::policy_solve(batch_of(c, sparse),
                            {2, systems.policy.data(), systems.rhs.data(), systems.x.data(),
                             systems.residual.data(), transpose, threads},
                            interrupt);
}

template <class Real>
struct Cotangents {
  std::vector<double> value_bar;
  std::vector<Real> policy_bar;
  std::vector<Real> transition, reward;
  std::vector<double> log_reference, discount, temperature;

  Cotangents(const Case<Real>& c, bool sparse)
      : value_bar(c.items() * c.S, 1.0),
        policy_bar(c.items() * c.table()),
        transition(sparse ? c.stored.size() : c.transition.size()),
        reward(policy_bar.size()),
        log_reference(policy_bar.size()),
        discount(c.items()),
        temperature(c.items()) {}
};
template <class Real>
Bytes bits(const Cotangents<Real>& g) {
  return bytes_of(g.transition, g.reward, g.log_reference, g.discount, g.temperature);
}

template <class Real>
void solve_vjp(const Case<Real>& c, bool sparse, const Solution<Real>& at, int threads,
               Cotangents<Real>& out) {
  birl::Interrupt interrupt = never();
  birl::solve_vjp(batch_of(c, sparse),
                  {at.value.data(), at.advantage.data(), at.policy.data(), at.info.data(),
                   at.status.data(), out.value_bar.data(), nullptr, nullptr, out.policy_bar.data(),
                   nullptr, out.transition.data(), out.reward.data(), out.log_reference.data(),
                   out.discount.data(), out.temperature.data(), threads},
                  interrupt);
}

}  // namespace test
