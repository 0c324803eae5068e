// The layer itself: what the teams promise to a kernel, and what they find in a wrong one.
#include "check.h"
#include "run_solve.h"

namespace test {
namespace {

// Neighbours are read in the phase that writes them: the boundary between two phases is missing.
struct MissingBoundary {
  int* out;

  struct Arrays {
    int* x;
  };
  template <class Chip, class Spill>
  Arrays lay_out(Chip& chip, Spill&) const {
    return {chip.template take<int>(64)};
  }
  template <class Team>
  void run(Team& team, const Arrays& m, Index) const {
    team.phase([&](Thread t) { m.x[t.rank] = 1; });
    team.phase([&](Thread t) {
      m.x[t.rank] = 2;
      out[t.rank] = m.x[(t.rank + 1) % t.count];
    });
  }
};

void order_shows_a_missing_boundary() {
  std::vector<int> forward(32), backward(32);
  run_serial(MissingBoundary{forward.data()}, 1, {32, Order::kForward, 0, 1});
  run_serial(MissingBoundary{backward.data()}, 1, {32, Order::kBackward, 0, 1});
  expect(forward != backward, "a missing boundary shows in the order");
}

// What was never written is NaN.
struct ReadsTheUnwritten {
  double* out;

  struct Arrays {
    double* x;
  };
  template <class Chip, class Spill>
  Arrays lay_out(Chip& chip, Spill&) const {
    return {chip.template take<double>(32)};
  }
  template <class Team>
  void run(Team& team, const Arrays& m, Index) const {
    team.phase([&](Thread t) { out[t.rank] = m.x[t.rank]; });
  }
};

void the_unwritten_is_nan() {
  std::vector<double> out(32, 0.0);
  run_serial(ReadsTheUnwritten{out.data()}, 1, {32, Order::kForward, 0, 1});
  for (const double x : out) expect(std::isnan(x), "unwritten memory");
}

// Threads with real barriers give the bits of threads run one after another.
template <class Real>
void threads_agree_with_phases() {
  for (const int S : {1, 5, 9}) {
    Traits traits;
    traits.discount = 0.99;
    traits.N = 2;
    traits.terminal = S == 5;
    const Case<Real> c = make_case<Real>(S, 2, traits, 21);
    const Solution<Real> wanted = solve(shared_rows(c), c);
    Solution<Real> found(c);
    run_threads(solve_kernel(shared_rows(c), c, found, options()), c.items(), 4);
    expect(same_bits(found, wanted), "threads " + c.name);
  }
}

void footprints_are_what_an_arena_hands_out() {
  const Case<float> c = make_case<float>(7, 3, {}, 1);
  Solution<float> out(c);
  const auto kernel = solve_kernel(shared_rows(c), c, out, options());
  const Bytes bytes = footprint(kernel);
  std::vector<double> chip(bytes.chip / sizeof(double) + 2), spill(2);
  Arena arena(chip.data()), other(spill.data());
  kernel.lay_out(arena, other);
  const auto used =
      reinterpret_cast<char*>(arena.take<char>(0)) - reinterpret_cast<char*>(chip.data());
  expect(static_cast<std::size_t>(used) == bytes.chip && bytes.spill == 0, "footprint");
}

}  // namespace
}  // namespace test

int main() {
  using namespace test;
  order_shows_a_missing_boundary();
  the_unwritten_is_nan();
  threads_agree_with_phases<double>();
  threads_agree_with_phases<float>();
  footprints_are_what_an_arena_hands_out();
  return summary("layer");
}
