// What is asked of an operation, once for every device: N transitions with G problems each, and
// what to write where. Pointers are the device's.
//
// A request is declared by the list of its fields and by nothing else: NEED(type, name) has to be
// given, MAY(type, name, otherwise) may be. core/named.h fills them by their names.
#pragma once

#include "core/common.h"

namespace birl {

#define BIRL_MEMBER(type, name) type name;
#define BIRL_MEMBER_OR(type, name, otherwise) type name = otherwise;
#define BIRL_VISIT(type, name) visit(#name, &Self::name, true);
#define BIRL_VISIT_OR(type, name, otherwise) visit(#name, &Self::name, false);

// Members of a struct, and visit(name, pointer to member, whether it has to be given) for each.
#define BIRL_FIELDS(Request, FIELDS)      \
  FIELDS(BIRL_MEMBER, BIRL_MEMBER_OR)     \
  template <class Visit>                  \
  static void each_field(Visit&& visit) { \
    using Self = Request;                 \
    FIELDS(BIRL_VISIT, BIRL_VISIT_OR)     \
  }

#define BIRL_BATCH(NEED, MAY)                                                   \
  NEED(bool, is_double) /* storage type of P and r */                           \
  NEED(Index, transitions)                                                      \
  NEED(Index, problems)                                                         \
  NEED(Index, states)                                                           \
  NEED(Index, actions)                                                          \
  NEED(const void*, transition)    /* (N,S,A,S), or (N,nnz) if crow is given */ \
  MAY(const Index*, crow, nullptr) /* (S·A + 1) */                              \
  MAY(const Index*, col, nullptr)  /* (nnz) */                                  \
  MAY(Index, nnz, 0)                                                            \
  NEED(const void*, reward)                  /* (N,G,S,A) */                    \
  MAY(const double*, log_reference, nullptr) /* (N,G,S,A) */                    \
  NEED(const double*, discount)              /* (N,G) */                        \
  NEED(const double*, temperature)           /* (N,G) */

struct Batch {
  BIRL_FIELDS(Batch, BIRL_BATCH)

  bool sparse() const { return crow != nullptr; }
  Index total() const { return transitions * problems; }
};

// On a GPU those from kNewton to kPolicyIteration are one: Newton with an elimination where a block
// solves a problem, and with series of products where the whole device does.
enum class Method : Index {
  kAuto,
  kValueIteration,
  kNewton,
  kKrylov,           // Newton, inexact
  kPolicyIteration,  // modified
  kSweep,            // T of the start as it is, in one pass
};

#define BIRL_SOLVE(NEED, MAY)                                                                    \
  MAY(const double*, initial, nullptr) /* (N,G,S) */                                             \
  NEED(double*, value)                 /* (N,G,S) */                                             \
  MAY(double*, relative, nullptr)      /* (N,G,S): value - kOffset of info, exactly */           \
  NEED(void*, q)                       /* (N,G,S,A), as the next three of the type of P and r */ \
  NEED(void*, advantage)               /* q - value, from the relative form and so more exact */ \
  NEED(void*, policy)                                                                            \
  NEED(void*, log_policy)                                                                        \
  NEED(double*, info)  /* (N,G,kInfo + S), see core/common.h */                                  \
  NEED(Index*, status) /* (N,G) */                                                               \
  MAY(Method, method, Method::kAuto)                                                             \
  MAY(double, tol, 0.0)         /* relative and certified; 0: as far as rounding allows */       \
  MAY(Index, max_iterations, 0) /* passes over P; 0: until rounding level */                     \
  NEED(Rigour, validate)                                                                         \
  MAY(int, threads, 1) /* of a CPU */

struct Solve {
  BIRL_FIELDS(Solve, BIRL_SOLVE)
};

// Tables (N,G,S,A) are in the type of P and r. A cotangent that is null is zero; a derivative that
// is null is not wanted.
#define BIRL_SOLVE_VJP(NEED, MAY)                                                           \
  NEED(const double*, relative) /* (N,G,S), as the next four from Solve */                  \
  NEED(const void*, advantage)                                                              \
  NEED(const void*, policy)                                                                 \
  NEED(const double*, info)                                                                 \
  NEED(const Index*, status) /* where it is not zero, derivatives are NaN */                \
  MAY(const double*, value_bar, nullptr)                                                    \
  MAY(const void*, q_bar, nullptr)                                                          \
  MAY(const void*, advantage_bar, nullptr)                                                  \
  MAY(const void*, policy_bar, nullptr)                                                     \
  MAY(const void*, log_policy_bar, nullptr)                                                 \
  MAY(void*, transition_bar, nullptr)      /* as P: (N,S,A,S), or (N,nnz) on its pattern */ \
  MAY(void*, reward_bar, nullptr)          /* (N,G,S,A) */                                  \
  MAY(double*, log_reference_bar, nullptr) /* (N,G,S,A) */                                  \
  MAY(double*, discount_bar, nullptr)      /* (N,G) */                                      \
  MAY(double*, temperature_bar, nullptr)   /* (N,G) */                                      \
  MAY(int, threads, 1)

struct SolveVjp {
  BIRL_FIELDS(SolveVjp, BIRL_SOLVE_VJP)
};

#define BIRL_POLICY_SOLVE(NEED, MAY)                                                     \
  NEED(Index, right_sides)    /* K */                                                    \
  NEED(const double*, policy) /* (N,G,S,A) */                                            \
  NEED(const double*, rhs)    /* (N,G,K,S) */                                            \
  NEED(double*, out)          /* (N,G,K,S) */                                            \
  NEED(double*, residual)     /* (N,G,K): max |b - Ax|, or sum |b - A'x| if transpose */ \
  NEED(bool, transpose)                                                                  \
  MAY(int, threads, 1) /* of a CPU */

struct PolicySolve {
  BIRL_FIELDS(PolicySolve, BIRL_POLICY_SOLVE)
};

#define BIRL_OUTER(NEED, MAY)                 \
  NEED(const double*, weight) /* (N,G,S,A) */ \
  NEED(const double*, vector) /* (N,G,S) */   \
  NEED(const double*, shift)  /* (N,S,A) */   \
  NEED(void*, out)            /* as the transition */

struct Outer {
  BIRL_FIELDS(Outer, BIRL_OUTER)
};

}  // namespace birl
