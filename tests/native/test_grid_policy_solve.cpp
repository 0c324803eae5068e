// The policy systems of the grid against Gaussian elimination in long double.
#include "check.h"
#include "run_grid.h"
#include "systems.h"

namespace test {
namespace {

template <class Real>
Answer answer(const Case<Real>& c, const Systems& systems, bool transpose, bool sparse,
              const GridRun& how = {}) {
  Answer out{std::vector<double>(systems.rhs.size(), -7.0),
             std::vector<double>(c.items() * systems.K, -7.0)};
  const HostPattern pattern(c, transpose);
  const birl::PolicySolve request{systems.K,    systems.policy.data(), systems.rhs.data(),
                                  out.x.data(), out.residual.data(),   transpose};
  with_grid_policy_solve(device_batch(c, sparse), request, pattern.view(), [&](const auto& kernel) {
    run_grid_serial(kernel, c.items(), how);
    return 0;
  });
  return out;
}

template <class Real>
void solves(const Case<Real>& c, const Systems& systems) {
  for (const bool transpose : {false, true})
    for (const bool sparse : {false, true}) {
      const std::string what =
          std::string(sparse ? "csr" : "dense") + (transpose ? " transposed" : "");
      const Answer found = answer(c, systems, transpose, sparse, {1, 4, Order::kForward, 0});
      expect_solved(c, systems, transpose, found, what);
      for (const GridRun& run :
           {GridRun{3, 4, Order::kBackward, 0}, GridRun{2, 5, Order::kShuffled, 1},
            GridRun{7, 3, Order::kShuffled, 2}})
        expect(same_bits(found, answer(c, systems, transpose, sparse, run)),
               what + " " + c.name + ": bits depend on the team");
    }
}

template <class Real>
void sizes() {
  for (const int S : {1, 2, 33, 65, 130})
    for (const int K : {1, 3, 4, 6}) {
      if ((S == 130 || sizeof(Real) == 4) && K != 3) continue;
      Traits traits;
      traits.terminal = S % 2 == 1 && K == 3;
      traits.discount = S == 33 ? 0.99 : 0.9;
      traits.G = K == 1 ? 2 : 1;
      traits.successors = S == 2 ? 2 : 5;
      const Case<Real> c = make_case<Real>(S, 3, traits, 100 * S + K);
      solves(c, make_systems(c, K, K == 4, 5));
    }
}

// More columns than are solved at once, of which one is not finite, and one is zero.
void many_columns() {
  const Case<double> c = make_case<double>(9, 2, {}, 3);
  Systems systems = make_systems(c, 70, false, 6);
  for (const bool transpose : {false, true}) {
    const Answer whole = answer(c, systems, transpose, false);
    expect_solved(c, systems, transpose, whole, "seventy");
    Systems one = systems;
    one.K = 1;
    one.rhs.assign(systems.rhs.begin() + 68 * c.S, systems.rhs.begin() + 69 * c.S);
    const Answer alone = answer(c, one, transpose, false);
    expect(std::equal(alone.x.begin(), alone.x.end(), whole.x.begin() + 68 * c.S),
           "a column depends on its neighbours");
    Systems spoilt = systems;
    spoilt.rhs[c.S + 2] = INFINITY;
    for (int s = 0; s < c.S; ++s) spoilt.rhs[2 * c.S + s] = 0.0;
    for (const auto& found :
         {answer(c, spoilt, transpose, false), answer(c, spoilt, transpose, true)}) {
      for (int s = 0; s < c.S; ++s) {
        expect(std::isnan(found.x[c.S + s]), "a column that is not finite");
        expect(found.x[2 * c.S + s] == 0.0, "a column of zeros");
      }
      expect(!(found.residual[1] <= 1e300), "its residual tells");
    }
    const Answer beside = answer(c, spoilt, transpose, false);
    expect(std::equal(beside.x.begin() + 3 * c.S, beside.x.end(), whole.x.begin() + 3 * c.S),
           "it spoils its neighbours");
  }
}

// Where γ is close to one the constant mode carries almost everything.
void close_to_one() {
  Traits traits;
  traits.discount = 0.9999;
  traits.successors = 20;
  const Case<double> c = make_case<double>(40, 3, traits, 9);
  solves(c, make_systems(c, 2, true, 7));
}

}  // namespace
}  // namespace test

int main() {
  using namespace test;
  sizes<double>();
  sizes<float>();
  many_columns();
  close_to_one();
  return summary("grid policy solve");
}
