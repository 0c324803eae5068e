// All inner loops, compiled once per instruction set and chosen at run time (cpu/isa/dispatch.cpp).
// A file of them must instantiate nothing that another file could share, which could be the copy of
// a newer instruction set: no standard containers, no std::min.
#pragma once

#include "cpu/isa/adjoint.h"
#include "cpu/isa/columns.h"
#include "cpu/isa/dense.h"
#include "cpu/isa/packed.h"
#include "cpu/isa/sparse.h"

namespace birl {

struct Isa {
  const char* name;
  const DenseRoutines& dense;
  const PackedRoutines<float>& packed_single;
  const PackedRoutines<double>& packed_double;
  const AdjointRoutines& adjoint;
  const ColumnRoutines& columns;
  const SparseRoutines& sparse;
};

// The best the processor supports, or the one named by BIRL_ISA.
const Isa& isa();
const char* compiled_instruction_sets();

#ifdef BIRL_ISA
namespace BIRL_ISA {
extern const DenseRoutines kDense;
extern const PackedRoutines<float> kPackedSingle;
extern const PackedRoutines<double> kPackedDouble;
extern const AdjointRoutines kAdjoint;
extern const ColumnRoutines kColumns;
extern const SparseRoutines kSparse;
extern const Isa kIsa;
}  // namespace BIRL_ISA
#endif

}  // namespace birl
