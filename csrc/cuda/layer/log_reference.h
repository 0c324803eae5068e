// log μ of one problem or state; absent means zero everywhere.
#pragma once

#include "core/soft_maximum.h"
#include "cuda/layer/layer.h"

namespace birl::device {

struct LogReference {
  const double* values;

  BIRL_DEVICE double operator[](Index row) const { return values ? values[row] : 0.0; }
  BIRL_DEVICE bool masked(Index row) const { return birl::masked(values, row); }
  // Whether one of the rows [row, row + actions) is available.
  BIRL_DEVICE bool any(Index row, Index actions) const {
    if (!values) return true;
    for (Index a = 0; a < actions; ++a)
      if (!birl::masked(values[row + a])) return true;
    return false;
  }
};

}  // namespace birl::device
