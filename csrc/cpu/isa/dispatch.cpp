// Picks the instruction set once, at first use.
#include <cstdlib>
#include <cstring>

#include "cpu/isa/isa.h"

namespace birl {

namespace baseline {
extern const Isa kIsa;
}
#ifdef BIRL_X86_DISPATCH
namespace avx2 {
extern const Isa kIsa;
}
namespace avx512 {
extern const Isa kIsa;
}
#endif

const char* compiled_instruction_sets() {
#ifdef BIRL_X86_DISPATCH
  return "baseline avx2 avx512";
#else
  return "baseline";
#endif
}

const Isa& isa() {
  static const Isa& chosen = []() -> const Isa& {
#ifdef BIRL_X86_DISPATCH
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
    const char* wanted = std::getenv("BIRL_ISA");
    const bool lower_than_512 = wanted && std::strcmp(wanted, "avx512") != 0;
    const bool lower_than_2 = wanted && std::strcmp(wanted, "baseline") == 0;
    if (has_avx512 && !lower_than_512) return avx512::kIsa;
    if (has_avx2 && !lower_than_2) return avx2::kIsa;
#endif
    return baseline::kIsa;
  }();
  return chosen;
}

const DenseRoutines& dense_routines() { return isa().dense; }
const AdjointRoutines& adjoint_routines() { return isa().adjoint; }
const ColumnRoutines& column_routines() { return isa().columns; }
const SparseRoutines& sparse_routines() { return isa().sparse; }
template <class Real>
const PackedRoutines<Real>& packed_routines() {
  if constexpr (sizeof(Real) == 4)
    return isa().packed_single;
  else
    return isa().packed_double;
}
template const PackedRoutines<float>& packed_routines();
template const PackedRoutines<double>& packed_routines();

}  // namespace birl
