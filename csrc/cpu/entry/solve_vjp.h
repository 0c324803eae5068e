// Derivatives of a solution by the implicit function theorem, (M10) to (M12), in one call.
#pragma once

#include "cpu/model/batch.h"
#include "cpu/support/parallel.h"

namespace birl {

struct Conditioning {
  double condition = 0.0;  // the largest of the systems solved by elimination, see Elimination
  Index problem = 0;       // whose it is
};

// Where 1 − γ is not tiny no condition can be large, and none is looked for.
Conditioning solve_vjp(const Batch& batch, const SolveVjp& request, Interrupt& interrupt);

}  // namespace birl
