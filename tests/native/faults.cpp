// Planted faults, one per argument: the sanitizers have to report each (CMakeLists.txt expects it).
//
//   overflow          one element past an on-chip array           AddressSanitizer
//   undefined         a shift by the width of its type            UndefinedBehaviorSanitizer
//   shared_place      two items write the same place              ThreadSanitizer
//   between_phases    control flow reads an array                 ThreadSanitizer
//   barriers          the real kernels, without each of their barriers in turn: ThreadSanitizer
//                     has to report every one                     (exit code 0: it did)
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "cuda/block/policy_solve.h"
#include "run_solve.h"

namespace test {
namespace {

struct Toy {
  struct Arrays {
    int* x;
  };
  template <class Chip, class Spill>
  Arrays lay_out(Chip& chip, Spill&) const {
    return {chip.template take<int>(16)};
  }
};

struct Overflow : Toy {
  template <class Team>
  void run(Team& team, const Arrays& m, Index) const {
    team.phase([&](Thread t) { m.x[t.rank + 1] = t.rank; });
  }
};

struct Undefined : Toy {
  int* out;
  template <class Team>
  void run(Team& team, const Arrays&, Index) const {
    team.phase([&](Thread t) { *out += 1 << (t.rank + 20); });
  }
};

struct SharedPlace : Toy {
  int* out;
  template <class Team>
  void run(Team& team, const Arrays&, Index item) const {
    team.phase([&](Thread t) {
      if (t.rank == 0) *out = static_cast<int>(item);
    });
  }
};

struct BetweenPhases : Toy {
  template <class Team>
  void run(Team& team, const Arrays& m, Index) const {
    team.phase([&](Thread t) { m.x[t.rank] = 0; });
    while (m.x[0] < 3) team.phase([&](Thread t) { ++m.x[t.rank]; });
  }
};

// An accepted sweep and two Newton steps, from a start, so that the first sweep reads it.
const double start[] = {1.0, 2.0, 3.0, 4.0, 5.0};
const SolveOptions kShort = options(2, 0.0, 3);

// run(skipped barrier) in a child of its own; whether that ended in a report.
template <class Run>
bool reported(int skipped, const Run& run) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    if (!std::freopen("/dev/null", "w", stderr)) _exit(1);
    alarm(20);  // threads that went different ways wait for each other
    run(skipped);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

// Leaves out each barrier but the last, after which the threads are joined; `spare` of them may go
// unnoticed.
template <class Run>
void every_barrier_is_needed(const char* kernel, int least, int spare, const Run& run) {
  expect(!reported(-1, run), std::string(kernel) + ": reported without a fault");
  const int passed = run(-1);
  expect(passed >= least, std::string(kernel) + ": too short a run");
  std::string unnoticed;
  for (int skipped = 0; skipped < passed - 1; ++skipped)
    if (!reported(skipped, run)) {
      unnoticed += " " + std::to_string(skipped);
      --spare;
    }
  expect(spare == 0, std::string(kernel) + ": barriers that can be left out:" + unnoticed);
}

int barriers() {
  Traits traits;
  traits.discount = 0.99;
  traits.successors = 1;
  const Case<double> c = make_case<double>(5, 2, traits, 4);
  every_barrier_is_needed("solve", 30, 0, [&](int skipped) {
    Solution<double> out(c);
    const auto kernel = solve_kernel(shared_rows(c), c, out, kShort, start);
    return run_threads(kernel, c.items(), 2, skipped);
  });

  const std::vector<double> policy(c.table(), 0.5),
      rhs = {1.0, -2.0, 3.0, -4.0, 5.0, 2.0, 2.0, 1.0, 0.5, 3.0};
  // Forming the matrix does not touch x. So the barrier in front of it is spare: twice the one
  // after the middles, or, where there are none, the one after the correction.
  for (const bool transpose : {false, true})
    every_barrier_is_needed("policy_solve", 12, transpose ? 1 : 2, [&](int skipped) {
      std::vector<double> out(rhs.size()), residual(2);
      const PolicySolveKernel<SharedRows<double>> kernel{
          shared_rows(c),
          device_batch(c, false),
          {2, policy.data(), rhs.data(), out.data(), residual.data(), transpose},
          {}};
      return run_threads(kernel, c.items(), 2, skipped);
    });
  return summary("barriers");
}

}  // namespace
}  // namespace test

int main(int count, char** arguments) {
  using namespace test;
  const std::string fault = count > 1 ? arguments[1] : "";
  int place = 0;
  if (fault == "overflow") run_serial(Overflow{}, 1, {16, Order::kForward, 0, 1});
  if (fault == "undefined") run_serial(Undefined{{}, &place}, 1, {16, Order::kForward, 0, 1});
  if (fault == "shared_place") run_serial(SharedPlace{{}, &place}, 2, {4, Order::kForward, 0, 2});
  if (fault == "between_phases") run_threads(BetweenPhases{}, 1, 4);
  if (fault == "barriers") return barriers();
  return 0;
}
