// Policies and right-hand sides, and what a solver should make of them.
#pragma once

#include "cases.h"
#include "check.h"

namespace test {

struct Systems {
  std::vector<double> policy, rhs;  // (N,G,S,A), (N,G,K,S)
  int K;
};

template <class Real>
Systems make_systems(const Case<Real>& c, int K, bool positive, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  Systems systems{{}, {}, K};
  for (Index i = 0; i < c.items() * c.S; ++i) {
    std::vector<double> p(c.A);
    double sum = 0.0;
    for (int a = 0; a < c.A; ++a) sum += p[a] = uniform(random);
    for (int a = 0; a < c.A; ++a) systems.policy.push_back(p[a] / sum);
  }
  for (Index i = 0; i < c.items() * K * c.S; ++i)
    systems.rhs.push_back(positive ? uniform(random) : uniform(random) - 0.5);
  return systems;
}

struct Answer {
  std::vector<double> x, residual;
};

inline bool same_bits(const Answer& x, const Answer& y) {
  return same_bits(x.x, y.x) && same_bits(x.residual, y.residual);
}

// By Gaussian elimination in long double.
template <class Real>
void expect_solved(const Case<Real>& c, const Systems& systems, bool transpose, const Answer& found,
                   const std::string& name) {
  for (Index item = 0; item < c.items(); ++item) {
    std::vector<Long> matrix = policy_system(c, item, systems.policy.data() + item * c.table());
    if (transpose)
      for (int i = 0; i < c.S; ++i)
        for (int j = 0; j < i; ++j) std::swap(matrix[i * c.S + j], matrix[j * c.S + i]);
    for (int k = 0; k < systems.K; ++k) {
      const Index at = (item * systems.K + k) * c.S;
      std::vector<Long> x(systems.rhs.begin() + at, systems.rhs.begin() + at + c.S);
      Long size = 0, bound = 0;
      for (const Long e : x) size = transpose ? size + std::fabs(e) : std::fmax(size, std::fabs(e));
      gauss(matrix, x);
      for (const Long e : x)
        bound = transpose ? bound + std::fabs(e) : std::fmax(bound, std::fabs(e));
      const std::string where =
          name + " " + c.name + " system " + std::to_string(item) + "," + std::to_string(k);
      const double rounding = 50.0 * kEps * static_cast<double>(size + bound);
      expect(found.residual[item * systems.K + k] <= rounding, where + ": a large residual");
      // ‖x − x*‖ <= ‖residual‖/(1 − γ) in either norm, (M5) and (M13); and π's own rounding
      const double allowed = rounding / (1.0 - c.discount[item]);
      for (int s = 0; s < c.S; ++s)
        near(found.x[at + s], static_cast<double>(x[s]), allowed,
             where + " x " + std::to_string(s));
    }
  }
}

}  // namespace test
