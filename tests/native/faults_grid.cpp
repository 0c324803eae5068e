// Planted faults in the kernels of the grid: ThreadSanitizer has to report each barrier of the team
// that is left out, and most of those inside the blocks (the last of a step is always followed by
// one of the team, and is there for the sake of a simple rule). Exit code 0: it did.
//
// The argument names the kernel: solve, sparse, policy.
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "run_grid.h"
#include "systems.h"

namespace test {
namespace {

constexpr int kBlocks = 2, kThreads = 2;

// How the child ends that runs `go` with a barrier left out.
template <class Go>
bool reported(Go&& go, int skipped, bool inner) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    alarm(20);  // threads that went different ways wait for each other
    go(skipped, inner);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

// `spare`: barriers behind steps after which, with this data, every thread goes on with numbers of
// its own until the next barrier; no more than these may be left out.
template <class Go>
void all_barriers(Go&& go, const char* name, int spare) {
  expect(!reported(go, -1, false), std::string(name) + ": without a fault nothing is reported");
  const Passed passed = go(-1, false);
  std::printf("%s: %d barriers of the team, %d of a block\n", name, passed.team, passed.block);
  int missed = 0, noticed = 0;
  for (int skipped = 0; skipped < passed.team - 1; ++skipped)
    if (!reported(go, skipped, false)) {
      ++missed;
      std::printf("barrier %d of the team can be left out\n", skipped);
    }
  expect(missed <= spare, std::to_string(missed) + " missing barriers of the team go unnoticed");
  for (int skipped = 0; skipped < passed.block - 1; skipped += 3)
    noticed += reported(go, skipped, true);
  expect(noticed > passed.block / 12, std::to_string(noticed) + " barriers of a block are missed");
}

int main_of(const std::string& kernel) {
  Traits traits;
  traits.discount = kernel == "policy" ? 0.3 : 0.9;  // a few rounds of corrections
  traits.successors = 3;
  const Case<double> c = make_case<double>(6, 2, traits, 4);
  const HostPattern pattern(c), transposed(c, true);
  const auto solve = [&](const HostPattern* of) {
    return [&c, of](int skipped, bool inner) {
      Solution<double> out(c);
      return with_kernel(c, of, out, options(0, 0.0, 2), nullptr, [&](const auto& task) {
        return run_grid_threads(task, 1, kBlocks, kThreads, skipped, inner);
      });
    };
  };
  if (kernel == "solve") all_barriers(solve(nullptr), "solve", 0);
  if (kernel == "sparse") all_barriers(solve(&pattern), "sparse", 2);
  if (kernel == "policy") {
    const Systems systems = make_systems(c, 2, false, 5);
    std::vector<double> x(systems.rhs.size()), residual(2);
    const birl::PolicySolve request{2,        systems.policy.data(), systems.rhs.data(),
                                    x.data(), residual.data(),       true};
    all_barriers(
        [&](int skipped, bool inner) {
          return with_grid_policy_solve(
              device_batch(c, false), request, transposed.view(), [&](const auto& task) {
                return run_grid_threads(task, 1, kBlocks, kThreads, skipped, inner);
              });
        },
        "policy", 8);
  }
  return summary(kernel.c_str());
}

}  // namespace
}  // namespace test

int main(int count, char** arguments) { return test::main_of(count > 1 ? arguments[1] : ""); }
