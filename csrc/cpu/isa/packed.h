// Inner loops on small problems, their states on the lanes of SIMD registers (cpu/isa/isa.h).
//
// A table over (S,A) is stored [pack][a][lane], P is stored [pack][t][a][lane], a pack being
// `width` states. One value V(t), broadcast, then multiplies whole registers of P, and everything
// after the products (maximum, exp, sum, log) runs down the actions without crossing lanes. Lanes
// beyond the last state repeat it, so that reductions need no mask.
#pragma once

#include "core/certificate.h"

namespace birl {

// One application of T in the arithmetic of Number, on data stored as Real, in relative form:
// W = value − centre, q' = r + scale·ΣPW, image = τ log Σ_a μ exp(q'/τ), δ = image − W − constant.
template <class Number, class Real>
struct PackedSweep {
  Index states, actions;
  const Real* transition;
  const Real* reward;
  const Number* scale;          // γ/σ, zero for a row without continuation
  const Number* log_reference;  // base e, in single precision base 2; null: one everywhere
  Number temperature;
  const Number* value;  // null: W = 0, and P is not read
  Number centre, constant;
  Number* image;
  Number* q;
  Number* w;  // scratch, one number per padded state
};

// What a problem looks like once packed. `reward` must be finite for the rest to mean anything.
struct PackedProblem {
  double largest_reward, largest_reference;  // over available actions
  bool finite;                               // reward
  bool continues;                            // every available row
};

template <class Real>
struct PackedResult {
  Index states, actions;
  const double* q_relative;                   // q' of the last sweep, packed
  const double* image;                        // and its image
  const double* log_reference;                // packed, or null
  double temperature, offset;                 // V = image + offset
  double *value, *relative;                   // (S): V; the image alone, or null
  Real *q, *advantage, *policy, *log_policy;  // (S,A)
  double* scratch;                            // 6·width·A numbers
};

template <class Real>
struct PackedRoutines {
  Index width;
  // P (S,A,S) to the packed form.
  void (*pack_transition)(const Real* p, Index states, Index actions, Real* packed);
  // 1/σ of every packed row, zero where σ is. Returns whether all entries are finite and none is
  // negative, and every |σ − 1| <= tolerance; a σ of exactly zero passes if `ending`.
  bool (*inverse_row_sums)(const Real* packed, Index states, Index actions, double tolerance,
                           bool ending, double* inverse);
  // γ/σ, and log₂ μ, also in single precision unless `single_scale` is null.
  PackedProblem (*pack_problem)(const Real* reward, const double* log_reference, Index states,
                                Index actions, const double* inverse_sum, double discount,
                                Real* packed_reward, double* scale, double* packed_reference,
                                float* single_scale, float* single_reference);
  SweepRange (*sweep)(const PackedSweep<double, Real>&);
  SweepRange (*sweep_single)(const PackedSweep<float, Real>&);  // null for double storage
  void (*unpack)(const double* packed, Index states, Index actions, double* table);
  void (*result)(const PackedResult<Real>&);
};

template <class Real>
const PackedRoutines<Real>& packed_routines();

inline Index padded(Index states, Index width) { return (states + width - 1) / width * width; }

}  // namespace birl
