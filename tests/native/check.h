// The least a test program needs: failures are printed, counted, and decide the exit code.
#pragma once

#include <cstdio>
#include <string>

namespace test {

inline int failures = 0;
inline long checks = 0;

inline bool expect(bool holds, const std::string& what) {
  ++checks;
  if (!holds && ++failures <= 20) std::printf("FAILED %s\n", what.c_str());
  return holds;
}

// |found − wanted| <= bound; NaN fails.
inline bool near(double found, double wanted, double bound, const std::string& what) {
  const double gap = found > wanted ? found - wanted : wanted - found;
  char numbers[128];
  std::snprintf(numbers, sizeof numbers, ": %.17g, expected %.17g within %.3g (off by %.3g)", found,
                wanted, bound, gap);
  return expect(gap <= bound || found == wanted, what + numbers);
}

inline int summary(const char* name) {
  std::printf("%s: %ld checks, %d failed\n", name, checks, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace test
