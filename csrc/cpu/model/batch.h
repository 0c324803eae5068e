// The problems of a batch, and the models of its transitions.
#pragma once

#include "core/request.h"
#include "cpu/model/sparse_pattern.h"
#include "cpu/model/transition.h"

namespace birl {

// One problem (n, g) of a batch.
template <class Real>
struct Problem {
  const Real* reward;
  const double* log_reference;
  double discount, temperature;
};

template <class Real>
Problem<Real> problem_at(const Batch& batch, Index i) {
  const Index offset = i * batch.states * batch.actions;
  return {static_cast<const Real*>(batch.reward) + offset,
          batch.log_reference ? batch.log_reference + offset : nullptr, batch.discount[i],
          batch.temperature[i]};
}

// Calls body(model_of) with a function n -> transition model, in the batch's storage form.
template <class Body>
void with_models(const Batch& batch, Body&& body) {
  const auto typed = [&](auto zero) {
    using Real = decltype(zero);
    const Real* values = static_cast<const Real*>(batch.transition);
    if (batch.sparse()) {
      const Index longest = longest_row(batch.crow, batch.states * batch.actions);
      body([&batch, values, longest](Index n) {
        return CsrTransition<Real>{values + n * batch.nnz, batch.crow,    batch.col,
                                   batch.states,           batch.actions, longest};
      });
    } else {
      body([&batch, values](Index n) {
        return DenseTransition<Real>{values + n * batch.states * batch.actions * batch.states,
                                     batch.states, batch.actions};
      });
    }
  };
  if (batch.is_double)
    typed(double{});
  else
    typed(float{});
}

// The model with the pattern of its policies' matrices, which makes sparse products faster.
template <class Real>
CsrTransition<Real> with_pattern(CsrTransition<Real> model, const PolicyPattern* pattern) {
  model.rows = &pattern->rows();
  return model;
}
template <class Real>
DenseTransition<Real> with_pattern(DenseTransition<Real> model, const PolicyPattern*) {
  return model;
}

}  // namespace birl
