// Random problems, and what the kernels should make of them: Newton's method with plain Gaussian
// elimination in long double, written from the equations alone.
#pragma once

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "core/common.h"

namespace test {

using birl::Index;
using Long = long double;

template <class Real>
struct Case {
  std::string name;
  int N = 1, G = 1, S = 1, A = 1;
  std::vector<Real> transition, reward;       // (N,S,A,S), (N,G,S,A)
  std::vector<double> log_reference;          // (N,G,S,A) or empty
  std::vector<double> discount, temperature;  // (N,G)
  std::vector<Index> crow, col;               // the pattern of all transitions
  std::vector<Real> stored;                   // (N,nnz)

  Index items() const { return static_cast<Index>(N) * G; }
  Index table() const { return static_cast<Index>(S) * A; }
};

struct Traits {
  double discount = 0.9, temperature = 0.1;
  bool masked = false, terminal = false;
  int N = 1, G = 1, successors = 4;
};

template <class Real>
void find_pattern(Case<Real>& c) {
  const Index rows = c.table();
  c.crow.assign(1, 0);
  c.col.clear();
  for (Index row = 0; row < rows; ++row) {
    for (int t = 0; t < c.S; ++t) {
      bool used = false;
      for (int n = 0; n < c.N; ++n) used = used || c.transition[(n * rows + row) * c.S + t] != 0;
      if (used) c.col.push_back(t);
    }
    c.crow.push_back(static_cast<Index>(c.col.size()));
  }
  c.stored.clear();
  for (int n = 0; n < c.N; ++n)
    for (Index row = 0; row < rows; ++row)
      for (Index k = c.crow[row]; k < c.crow[row + 1]; ++k)
        c.stored.push_back(c.transition[(n * rows + row) * c.S + c.col[k]]);
}

template <class Real>
Case<Real> make_case(int S, int A, const Traits& traits, unsigned seed) {
  Case<Real> c;
  c.N = traits.N, c.G = traits.G, c.S = S, c.A = A;
  c.name = "S=" + std::to_string(S) + " A=" + std::to_string(A) +
           (sizeof(Real) == 4 ? " float32" : " float64") +
           " gamma=" + std::to_string(traits.discount) +
           " tau=" + std::to_string(traits.temperature) + (traits.masked ? " masked" : "") +
           (traits.terminal ? " terminal" : "") + " N=" + std::to_string(c.N) +
           " G=" + std::to_string(c.G);
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  std::normal_distribution<double> normal;
  std::vector<char> hidden(S * A, 0);
  if (traits.masked)
    for (int s = 0; s < S; ++s) {
      for (int a = 0; a < A; ++a) hidden[s * A + a] = uniform(random) < 0.3;
      hidden[s * A + static_cast<int>(uniform(random) * A)] = 0;
    }
  c.transition.assign(static_cast<Index>(c.N) * S * A * S, Real(0));
  for (Index row = 0; row < static_cast<Index>(c.N) * S * A; ++row) {
    const bool ends = traits.terminal && row / A % S == 0;
    if (ends || hidden[row % (S * A)]) continue;
    std::vector<double> p(S, 0.0);
    double sum = 0.0;
    for (int i = 0; i < traits.successors; ++i) {
      const double mass = uniform(random) + 0.01;
      p[static_cast<int>(uniform(random) * S)] += mass;
      sum += mass;
    }
    for (int t = 0; t < S; ++t) c.transition[row * S + t] = static_cast<Real>(p[t] / sum);
  }
  for (Index i = 0; i < c.items() * S * A; ++i) {
    const bool masked = hidden[i % (S * A)];
    c.reward.push_back(masked ? Real(0) : static_cast<Real>(normal(random)));
    if (traits.masked)
      c.log_reference.push_back(masked ? -INFINITY : std::log(0.05 + uniform(random)));
  }
  for (Index i = 0; i < c.items(); ++i) {
    c.discount.push_back(traits.discount * (1.0 - 0.001 * static_cast<double>(i % 7)));
    c.temperature.push_back(traits.temperature * (1.0 + 0.1 * static_cast<double>(i % 3)));
  }
  find_pattern(c);
  return c;
}

// Two states that take turns: rounding errors of sweeps come around undamped.
inline Case<double> make_cycle(double discount) {
  Traits traits;
  traits.discount = discount;
  Case<double> c = make_case<double>(2, 1, traits, 1);
  c.transition = {0.0, 1.0, 1.0, 0.0};
  c.reward = {0.51, 0.95};
  find_pattern(c);
  return c;
}

// x := M⁻¹x with partial pivoting.
inline void gauss(std::vector<Long> m, std::vector<Long>& x) {
  const int n = static_cast<int>(x.size());
  for (int k = 0; k < n; ++k) {
    int pivot = k;
    for (int i = k + 1; i < n; ++i)
      if (std::fabs(m[i * n + k]) > std::fabs(m[pivot * n + k])) pivot = i;
    for (int j = 0; j < n; ++j) std::swap(m[k * n + j], m[pivot * n + j]);
    std::swap(x[k], x[pivot]);
    for (int i = k + 1; i < n; ++i) {
      const Long f = m[i * n + k] / m[k * n + k];
      for (int j = k; j < n; ++j) m[i * n + j] -= f * m[k * n + j];
      x[i] -= f * x[k];
    }
  }
  for (int i = n - 1; i >= 0; --i) {
    for (int j = i + 1; j < n; ++j) x[i] -= m[i * n + j] * x[j];
    x[i] /= m[i * n + i];
  }
}

struct Truth {
  std::vector<Long> value, advantage, policy, log_policy, matrix;  // matrix: I − γP_π
};

// P(t|s,a)/σ of problem `item`.
template <class Real>
Long probability(const Case<Real>& c, Index item, int row, int t) {
  const Real* p = c.transition.data() + (item / c.G * c.table() + row) * c.S;
  Long sum = 0;
  for (int u = 0; u < c.S; ++u) sum += p[u];
  return sum == 0 ? 0 : p[t] / sum;
}

// I − γP_π
template <class Real, class Policy>
std::vector<Long> policy_system(const Case<Real>& c, Index item, const Policy& policy) {
  const int S = c.S, A = c.A;
  std::vector<Long> matrix(S * S, 0);
  for (int s = 0; s < S; ++s) {
    matrix[s * S + s] = 1;
    for (int row = s * A; row < s * A + A; ++row)
      for (int t = 0; t < S; ++t)
        matrix[s * S + t] -=
            static_cast<Long>(c.discount[item]) * policy[row] * probability(c, item, row, t);
  }
  return matrix;
}

// One application of T at `value`, with its policy.
template <class Real>
Truth bellman(const Case<Real>& c, Index item, const std::vector<Long>& value) {
  const int S = c.S, A = c.A;
  const Long gamma = c.discount[item], tau = c.temperature[item];
  Truth out;
  out.value.resize(S);
  out.advantage.resize(S * A);
  out.policy.resize(S * A);
  out.log_policy.resize(S * A);
  for (int s = 0; s < S; ++s) {
    std::vector<Long> q(A), x(A);
    Long top = -INFINITY, total = 0;
    for (int a = 0; a < A; ++a) {
      const int row = s * A + a;
      const Index at = item * c.table() + row;
      const Real* p = c.transition.data() + (item / c.G * c.table() + row) * S;
      Long sum = 0, product = 0;
      for (int t = 0; t < S; ++t) sum += p[t], product += p[t] * value[t];
      q[a] = c.reward[at] + (sum == 0 ? 0 : gamma * product / sum);
      x[a] = q[a] / tau + (c.log_reference.empty() ? 0.0 : c.log_reference[at]);
      top = x[a] > top ? x[a] : top;
    }
    for (int a = 0; a < A; ++a) total += std::exp(x[a] - top);
    out.value[s] = tau * (top + std::log(total));
    for (int a = 0; a < A; ++a) {
      const int row = s * A + a;
      out.log_policy[row] = x[a] - top - std::log(total);
      out.policy[row] = std::exp(out.log_policy[row]);
      out.advantage[row] = std::isinf(x[a]) ? 0 : q[a] - out.value[s];
    }
  }
  return out;
}

// V* and what belongs to it.
template <class Real>
Truth fixed_point(const Case<Real>& c, Index item) {
  std::vector<Long> value(c.S, 0);
  Truth at;
  for (int pass = 0; pass < 200; ++pass) {
    at = bellman(c, item, value);
    std::vector<Long> step(c.S);
    Long size = 0, largest = 0;
    for (int s = 0; s < c.S; ++s) step[s] = at.value[s] - value[s];
    gauss(policy_system(c, item, at.policy), step);
    for (int s = 0; s < c.S; ++s) {
      value[s] += step[s];
      size = std::fmax(size, std::fabs(step[s]));
      largest = std::fmax(largest, std::fabs(value[s]));
    }
    if (size <= 1e-17L * largest) break;
  }
  at = bellman(c, item, value);
  at.value = value;
  at.matrix = policy_system(c, item, at.policy);
  return at;
}

}  // namespace test
