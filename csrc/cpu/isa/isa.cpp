#include "cpu/isa/isa.h"

namespace birl::BIRL_ISA {

#define BIRL_STRING_(x) #x
#define BIRL_STRING(x) BIRL_STRING_(x)
const Isa kIsa = {
    BIRL_STRING(BIRL_ISA), kDense, kPackedSingle, kPackedDouble, kAdjoint, kColumns, kSparse};

}  // namespace birl::BIRL_ISA
