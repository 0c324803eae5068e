// The arguments every entry point shares: N transitions, each with G problems on it.
#pragma once

#include "cpu/model/sparse.h"
#include "cpu/model/transition.h"

namespace birl {

struct Batch {
  bool is_double;
  Index transitions, problems, states, actions;  // N, G, S, A
  const void* transition;                        // (N,S,A,S), or (N,nnz) when crow is given
  const Index* crow;
  const Index* col;
  Index nnz;
  const void* reward;           // (N,G,S,A)
  const double* log_reference;  // (N,G,S,A) or null
  const double* discount;       // (N,G)
  const double* temperature;    // (N,G)

  bool sparse() const { return crow != nullptr; }
  Index total() const { return transitions * problems; }
};

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
