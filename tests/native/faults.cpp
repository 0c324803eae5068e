// Planted faults, one per argument: the sanitizers have to report each (CMakeLists.txt expects it).
//
//   overflow          one element past an on-chip array           AddressSanitizer
//   undefined         a shift by the width of its type            UndefinedBehaviorSanitizer
//   shared_place      two items write the same place              ThreadSanitizer
//   between_phases    control flow reads an array                 ThreadSanitizer
//   barriers          the real solve kernel, without each of its barriers in turn:
//                     ThreadSanitizer has to report every one     (exit code 0: it did)
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
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

// How the child ends that runs the solve kernel without barrier `skipped`.
bool reported(const Case<double>& c, int skipped) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    alarm(20);  // threads that went different ways wait for each other
    Solution<double> out(c);
    run_threads(solve_kernel(shared_rows(c), c, out, kShort, start), c.items(), 2, skipped);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int barriers() {
  Traits traits;
  traits.discount = 0.99;
  traits.successors = 1;
  const Case<double> c = make_case<double>(5, 2, traits, 4);
  Solution<double> whole(c);
  expect(!reported(c, -1), "without a fault nothing is reported");
  const int passed =
      run_threads(solve_kernel(shared_rows(c), c, whole, kShort, start), c.items(), 2);
  expect(passed > 30, "the problem is long enough");
  int missed = 0;
  for (int skipped = 0; skipped < passed - 1; ++skipped)
    if (!reported(c, skipped)) {
      ++missed;
      std::printf("barrier %d can be left out\n", skipped);
    }
  expect(missed == 0, std::to_string(missed) + " missing barriers go unnoticed");
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
