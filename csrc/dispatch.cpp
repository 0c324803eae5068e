// Picks the instruction set once, at first use.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace birl {

namespace baseline {
extern const Kernels kTable;
}
#ifdef BIRL_X86_DISPATCH
namespace avx2 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
#endif

const char* compiled_instruction_sets() {
#ifdef BIRL_X86_DISPATCH
  return "baseline avx2 avx512";
#else
  return "baseline";
#endif
}

const Kernels& kernels() {
  static const Kernels* const chosen = [] {
#ifdef BIRL_X86_DISPATCH
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
    const char* wanted = std::getenv("BIRL_ISA");
    const bool lower_than_512 = wanted && std::strcmp(wanted, "avx512") != 0;
    const bool lower_than_2 = wanted && std::strcmp(wanted, "baseline") == 0;
    if (has_avx512 && !lower_than_512) return &avx512::kTable;
    if (has_avx2 && !lower_than_2) return &avx2::kTable;
#endif
    return &baseline::kTable;
  }();
  return *chosen;
}

}  // namespace birl
