// Policies and right-hand sides, and what a solver should make of them.
#pragma once

#include "cases.h"

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

}  // namespace test
