// Routines on data in single and in double precision.
#pragma once

namespace birl {

template <template <class> class Routines>
struct ByPrecision {
  Routines<float> f32;
  Routines<double> f64;

  template <class Real>
  const Routines<Real>& rows() const {
    if constexpr (sizeof(Real) == 4)
      return f32;
    else
      return f64;
  }
};

}  // namespace birl
