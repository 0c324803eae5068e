// The CPU routines and the code around them, run for the sanitizers: every solver, odd sizes, one
// thread and three. Values against the naive solver of cases.h; bits whatever the threads.
#include "cpu.h"
#include "cpu/isa/isa.h"

namespace test {
namespace {

template <class Real>
void values(const Case<Real>& c, const Solution<Real>& found, const std::string& what) {
  for (Index item = 0; item < c.items(); ++item) {
    const std::string where = what + " " + c.name + " item " + std::to_string(item);
    if (!expect(found.status[item] == 0, where + " status " + std::to_string(found.status[item])))
      continue;
    const Truth truth = fixed_point(c, item);
    for (int s = 0; s < c.S; ++s)
      near(found.value[item * c.S + s], static_cast<double>(truth.value[s]), found.bound(item),
           where + " value " + std::to_string(s));
  }
}

// With a cotangent of one for every value, that of the reward sums to S/(1 − γ) (M10).
template <class Real>
void mass(const Case<Real>& c, const Cotangents<Real>& found, const std::string& what) {
  for (Index item = 0; item < c.items(); ++item) {
    double sum = 0.0;
    for (Index j = 0; j < c.table(); ++j) sum += found.reward[item * c.table() + j];
    const double wanted = c.S / (1.0 - c.discount[item]);
    near(sum, wanted, (sizeof(Real) == 4 ? 1e-5 : 1e-11) * wanted, what + " " + c.name + " mass");
  }
}

template <class Real>
void everything(const Case<Real>& c, bool sparse, bool closed, Index method = 0,
                bool with_truth = true) {
  const std::string what = sparse ? "csr" : "dense";
  Solution<Real> one(c);
  solve(c, sparse, method, 1, one);
  if (with_truth) values(c, one, what);
  Solution<Real> swept(c);
  sweep(c, sparse, one.value, 1, swept);
  for (std::size_t i = 0; with_truth && i < one.value.size(); ++i)
    near(swept.value[i], one.value[i], 2.0 * one.bound(static_cast<Index>(i) / c.S),
         what + " " + c.name + " is no fixed point");
  Cotangents<Real> cotangents(c, sparse);
  solve_vjp(c, sparse, one, 1, cotangents);
  if (closed && with_truth) mass(c, cotangents, what);
  Solution<Real> three(c);
  solve(c, sparse, method, 3, three);
  expect(bits(one) == bits(three), what + " " + c.name + ": the threads change solve");
  Solution<Real> swept_by_three(c);
  sweep(c, sparse, one.value, 3, swept_by_three);
  expect(bits(swept) == bits(swept_by_three), what + " " + c.name + ": the threads change sweep");
  Cotangents<Real> by_three(c, sparse);
  solve_vjp(c, sparse, one, 3, by_three);
  expect(bits(cotangents) == bits(by_three), what + " " + c.name + ": the threads change the vjp");
  for (const bool transpose : {false, true}) {
    Systems alone = systems_of(c, one), team = alone;
    const Index failed = policy_solve(c, sparse, transpose, 1, alone);
    expect(policy_solve(c, sparse, transpose, 3, team) == failed &&
               bytes_of(alone.x, alone.residual) == bytes_of(team.x, team.residual),
           what + " " + c.name + ": the threads change policy_solve");
    expect(failed == 0, what + " " + c.name + ": policy_solve fails");
  }
}

template <class Real>
void sizes() {
  for (const int S : {1, 2, 7, 16, 17, 33})
    for (const int A : {1, 2, 5, 9, 17}) {
      if (S > 17 && A > 5) continue;
      Traits traits;
      traits.masked = (S + A) % 2 == 0;
      traits.terminal = S % 3 == 1;
      everything(make_case<Real>(S, A, traits, 100 * S + A), A % 2 == 0, !traits.terminal);
    }
}

// Enough work for every thread, in one problem or in many of them on a few transitions.
template <class Real>
void teams() {
  Traits traits;
  traits.N = 3;
  traits.G = 10;
  everything(make_case<Real>(18, 3, traits, 1), false, false, 0, false);
  traits.N = 1;
  traits.G = 4;
  traits.discount = 0.99;
  for (const Index method : {0, 1, 2, 3, 4}) {
    traits.discount = method == 1 ? 0.9 : 0.99;
    traits.masked = method % 2 == 1;
    traits.terminal = method > 2;
    everything(make_case<Real>(130, 2, traits, 2 + static_cast<unsigned>(method)), method == 4,
               false, method, false);
  }
  // One problem whose states are shared out.
  traits = {};
  traits.successors = 200;
  everything(make_case<Real>(399, 4, traits, 8), sizeof(Real) == 8, false, 0, false);
}

}  // namespace
}  // namespace test

// Argument: "values" or "threads"; none is both.
int main(int count, char** arguments) {
  const auto wanted = [&](const char* name) {
    return count < 2 || std::strcmp(arguments[1], name) == 0;
  };
  std::printf("instruction set %s\n", birl::isa().name);
  if (wanted("values")) {
    test::sizes<float>();
    test::sizes<double>();
  }
  if (wanted("threads")) {
    test::teams<float>();
    test::teams<double>();
  }
  return test::summary("test_cpu");
}
