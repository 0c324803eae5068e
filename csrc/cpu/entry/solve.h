// The fixed point V* = TV*, to a certified tolerance.
#pragma once

#include "cpu/model/batch.h"
#include "cpu/support/parallel.h"

namespace birl {

void solve(const Batch& batch, const Solve& request, Interrupt& interrupt);

}  // namespace birl
