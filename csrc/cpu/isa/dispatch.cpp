// Picks the instruction set once, at first use.
#include <cstdlib>
#include <cstring>

#include "cpu/isa/adjoint.h"
#include "cpu/isa/columns.h"
#include "cpu/isa/dense.h"
#include "cpu/isa/packed.h"
#include "cpu/isa/sliced.h"

namespace birl {

namespace baseline {
extern const Kernels kTable;
extern const LaneKernels<float> kLanesSingle;
extern const LaneKernels<double> kLanesDouble;
extern const VjpKernels kVjpTable;
extern const BlockKernels kBlockTable;
extern const CsrKernels kCsrTable;
}  // namespace baseline
#ifdef BIRL_X86_DISPATCH
namespace avx2 {
extern const Kernels kTable;
extern const LaneKernels<float> kLanesSingle;
extern const LaneKernels<double> kLanesDouble;
extern const VjpKernels kVjpTable;
extern const BlockKernels kBlockTable;
extern const CsrKernels kCsrTable;
}  // namespace avx2
namespace avx512 {
extern const Kernels kTable;
extern const LaneKernels<float> kLanesSingle;
extern const LaneKernels<double> kLanesDouble;
extern const VjpKernels kVjpTable;
extern const BlockKernels kBlockTable;
extern const CsrKernels kCsrTable;
}  // namespace avx512
#endif

const char* compiled_instruction_sets() {
#ifdef BIRL_X86_DISPATCH
  return "baseline avx2 avx512";
#else
  return "baseline";
#endif
}

namespace {

struct Tables {
  const Kernels* kernels;
  const LaneKernels<float>* lanes_single;
  const LaneKernels<double>* lanes_double;
  const VjpKernels* vjp;
  const BlockKernels* block;
  const CsrKernels* csr;
};

const Tables& chosen() {
  static const Tables tables = [] {
#ifdef BIRL_X86_DISPATCH
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
    const char* wanted = std::getenv("BIRL_ISA");
    const bool lower_than_512 = wanted && std::strcmp(wanted, "avx512") != 0;
    const bool lower_than_2 = wanted && std::strcmp(wanted, "baseline") == 0;
    if (has_avx512 && !lower_than_512)
      return Tables{&avx512::kTable,    &avx512::kLanesSingle, &avx512::kLanesDouble,
                    &avx512::kVjpTable, &avx512::kBlockTable,  &avx512::kCsrTable};
    if (has_avx2 && !lower_than_2)
      return Tables{&avx2::kTable,    &avx2::kLanesSingle, &avx2::kLanesDouble,
                    &avx2::kVjpTable, &avx2::kBlockTable,  &avx2::kCsrTable};
#endif
    return Tables{&baseline::kTable,    &baseline::kLanesSingle, &baseline::kLanesDouble,
                  &baseline::kVjpTable, &baseline::kBlockTable,  &baseline::kCsrTable};
  }();
  return tables;
}

}  // namespace

const Kernels& kernels() { return *chosen().kernels; }
const VjpKernels& vjp_kernels() { return *chosen().vjp; }
const BlockKernels& block_kernels() { return *chosen().block; }
const CsrKernels& csr_kernels() { return *chosen().csr; }

template <>
const LaneKernels<float>& lane_kernels<float>() {
  return *chosen().lanes_single;
}
template <>
const LaneKernels<double>& lane_kernels<double>() {
  return *chosen().lanes_double;
}

}  // namespace birl
