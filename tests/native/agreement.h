// A solution against the naive solver of cases.h.
#pragma once

#include "check.h"
#include "run_solve.h"

namespace test {

// Values within the certified bound, and the bound not far above what rounding explains.
template <class Real>
void agrees(const Case<Real>& c, const Solution<Real>& found, const std::string& what) {
  const double eps = std::numeric_limits<Real>::epsilon();
  for (Index item = 0; item < c.items(); ++item) {
    const std::string where = what + " " + c.name + " item " + std::to_string(item);
    if (!expect(found.status[item] == 0, where + " status " + std::to_string(found.status[item])))
      continue;
    const Truth truth = fixed_point(c, item);
    const double bound = found.row(item)[1], tau = c.temperature[item];
    double largest = 1.0;
    for (const Long v : truth.value)
      largest = std::fmax(largest, std::fabs(static_cast<double>(v)));
    expect(bound <= 1e-9 * largest / (1.0 - c.discount[item]), where + ": a loose bound");
    for (int s = 0; s < c.S; ++s)
      near(found.value[item * c.S + s], static_cast<double>(truth.value[s]), bound,
           where + " value " + std::to_string(s));
    const double relative = 2.0 * bound / tau + 1e-13;  // (M7)
    for (Index row = 0; row < c.table(); ++row) {
      const Index at = item * c.table() + row;
      const std::string entry = where + " row " + std::to_string(row);
      const double policy = static_cast<double>(truth.policy[row]);
      near(found.policy[at], policy, (relative + 2 * eps) * policy + 1e-300 + 1e-38 * (eps > 1e-9),
           entry + " policy");
      const double log_policy = static_cast<double>(truth.log_policy[row]);
      near(found.log_policy[at], log_policy, relative + eps * std::fabs(log_policy),
           entry + " log policy");
      const double advantage = static_cast<double>(truth.advantage[row]);
      near(found.advantage[at], advantage, 2.0 * bound + eps * (1.0 + std::fabs(advantage)),
           entry + " advantage");
      const double q = static_cast<double>(truth.advantage[row] + truth.value[row / c.A]);
      near(found.q[at], q, bound + 1e-13 * largest + eps * std::fabs(q), entry + " q");
    }
  }
}

}  // namespace test
