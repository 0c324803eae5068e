// The large solve kernel against the naive solver of cases.h, for every home and kind of team.
#include "agreement.h"
#include "run_large.h"

namespace test {
namespace {

using birl::Rigour;
using birl::Status;

const WideRun kFirst{1, 4, Order::kForward, 0};
const WideRun kRuns[] = {{3, 4, Order::kBackward, 0},
                         {2, 5, Order::kShuffled, 1},
                         {7, 3, Order::kShuffled, 2}};

template <class Home, class Real>
Solution<Real> orders(const Home& home, const Case<Real>& c, const char* what, Index method = 0) {
  const Solution<Real> found = solve_large(home, c, options(method), kFirst);
  agrees(c, found, what);
  for (const WideRun& run : kRuns)
    expect(same_bits(found, solve_large(home, c, options(method), run)),
           std::string(what) + " " + c.name + ": bits depend on the team");
  return found;
}

template <class Real>
void all_homes(const Case<Real>& c, Index method = 0) {
  const Solution<Real> staged = orders(far_rows(c), c, "staged", method);
  const Solution<Real> plain = orders(far_rows(c, false, false), c, "far", method);
  expect(same_bits(staged, plain), c.name + ": what is kept on chip changes bits");
  for (const WideRun& run : kRuns)
    expect(same_bits(staged, solve_large(cluster_rows(c, run.blocks), c, options(method), run)),
           c.name + ": a cluster and a grid differ");
  const HostPattern pattern(c);
  orders(wide_csr<1>(c, pattern.view()), c, "csr 1", method);
  orders(wide_csr<4>(c, pattern.view()), c, "csr 4", method);
  orders(wide_csr<8>(c), c, "csr without a pattern", method);
}

template <class Real>
void sizes() {
  for (const int S : {1, 2, 31, 32, 33, 65})
    for (const int A : {1, 3, 33}) {
      if (S > 33 && A > 3) continue;
      Traits traits;
      traits.masked = (S + A) % 2 == 0;
      traits.terminal = S % 3 == 0;
      all_homes(make_case<Real>(S, A, traits, 100 * S + A));
    }
}

}  // namespace
}  // namespace test

int main() {
  using namespace test;
  sizes<double>();
  sizes<float>();
  return summary("large solve");
}
