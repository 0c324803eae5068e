// One application of the soft Bellman operator, in the relative form V = c + W:
//     q'(s,a) = r(s,a) + γ Σ_t P(t|s,a) W(t) / σ(s,a)         ( = Q − γc where the row continues)
//     tw(s)   = τ log Σ_a μ(a|s) exp(q'(s,a)/τ)               ( = TV − γc )
// c is zero unless every available row continues, so rows without continuation need no special
// case.
#pragma once

#include "cpu/model/batch.h"

namespace birl {

// Scratch of one worker: products of a chunk of rows, then the soft maximum's.
template <class Model>
struct SweepScratch {
  std::vector<double> product, sum, least, soft_maximum;

  explicit SweepScratch(const Model& model) {
    const Index states = std::min(model.states, model.chunk());
    product.resize(states * model.actions);
    sum.resize(product.size());
    least.resize(product.size());
    soft_maximum.resize(soft_maximum_scratch(model.actions));
  }
};

// q' of rows [row0, row1) from their products Σ_t P W and 1/σ.
template <class Real>
void q_values(const Problem<Real>& problem, const double* product, const double* inverse_sum,
              Index row0, Index row1, double* q) {
  dense_routines().rows<Real>().q_values(row1 - row0, problem.reward + row0, product, inverse_sum,
                                         problem.discount, q);
}

}  // namespace birl
