// From a request to a kernel and its grid: the code between a launcher and the kernels, the same
// for the GPU (cuda/entry/block_solve.cu, cuda/entry/block_policy_solve.cu) and for the host
// (tests/native).
//
// Each function calls body(kernel, grid) with the kernel of the plan that cuda/block/selection.h
// makes, and returns what it returns.
#pragma once

#include "core/request.h"
#include "cuda/block/outer.h"
#include "cuda/block/policy_solve.h"
#include "cuda/block/selection.h"
#include "cuda/block/solve.h"

namespace birl::device {

constexpr unsigned kBlockThreads = 256;  // most threads of a block

// body(zero) with a zero of the storage type.
template <class Body>
auto with_storage(const Batch& batch, Body&& body) {
  return batch.is_double ? body(double{}) : body(float{});
}

template <class Real, class Body>
auto with_block_home(const Batch& batch, const Plan& plan, Body&& body) {
  const Real* const values = static_cast<const Real*>(batch.transition);
  const int S = static_cast<int>(batch.states), A = static_cast<int>(batch.actions);
  switch (plan.residence) {
    case Residence::kShared:
      return body(SharedRows<Real>{values, S, A});
    case Residence::kCsr:
      return body(CsrRows<Real>{values, S, A, batch.crow, batch.col, batch.nnz});
    default:
      return body(GlobalRows<Real>{values, S, A});
  }
}

template <class Real, class Body>
auto with_home(const Batch& batch, const Plan& plan, Body&& body) {
  const Real* const values = static_cast<const Real*>(batch.transition);
  const int S = static_cast<int>(batch.states), A = static_cast<int>(batch.actions);
  if (plan.residence != Residence::kRegisters) return with_block_home<Real>(batch, plan, body);
  switch (plan.tile) {  // of kRegisterTiles
    case 0:
      return body(RegisterRows<Real, 8, 2>{values, S, A});
    case 1:
      return body(RegisterRows<Real, 8, 4>{values, S, A});
    case 2:
      return body(RegisterRows<Real, 16, 2>{values, S, A});
    default:
      return body(RegisterRows<Real, 16, 3>{values, S, A});
  }
}

template <class Kernel>
Grid grid_of(const Kernel& kernel, const Batch& batch, const DeviceLimits& limits, bool one_warp) {
  const Bytes bytes = footprint(kernel);
  return {block_count(batch.total(), bytes, limits),
          block_threads(batch.states * batch.actions, one_warp ? 32 : kBlockThreads), bytes};
}

template <class Home>
SolveKernel<Home> solve_kernel(const Home& home, const Batch& batch, const Solve& request,
                               const Plan& plan) {
  const Kernel name = plan.residence == Residence::kRegisters ? Kernel::kCudaWarp
                      : plan.residence == Residence::kCsr     ? Kernel::kCudaCsr
                                                              : Kernel::kCudaBlock;
  return {home, batch, request, name, plan.direct, plan.spill_matrix, plan.spill_vectors};
}

template <class Body>
auto with_solve(const Batch& batch, const Solve& request, const DeviceLimits& limits, Body&& body) {
  return with_storage(batch, [&](auto zero) {
    using Real = decltype(zero);
    const Plan plan = choose_plan(batch, limits, [&](const Plan& candidate) {
      return with_home<Real>(batch, candidate, [&](const auto& home) {
        return footprint(solve_kernel(home, batch, request, candidate));
      });
    });
    return with_home<Real>(batch, plan, [&](const auto& home) {
      const auto kernel = solve_kernel(home, batch, request, plan);
      return body(kernel, grid_of(kernel, batch, limits, plan.residence == Residence::kRegisters));
    });
  });
}

template <class Home>
PolicySolveKernel<Home> policy_solve_kernel(const Home& home, const Batch& batch,
                                            const PolicySolve& request, const Plan& plan) {
  return {home,
          {batch.problems, static_cast<int>(request.right_sides), request.policy, batch.discount,
           request.rhs, request.out, request.residual, request.transpose, plan.spill_matrix,
           plan.spill_vectors}};
}

template <class Body>
auto with_policy_solve(const Batch& batch, const PolicySolve& request, const DeviceLimits& limits,
                       Body&& body) {
  return with_storage(batch, [&](auto zero) {
    using Real = decltype(zero);
    const Plan plan = choose_block_plan(batch, limits, [&](const Plan& candidate) {
      return with_block_home<Real>(batch, candidate, [&](const auto& home) {
        return footprint(policy_solve_kernel(home, batch, request, candidate));
      });
    });
    return with_block_home<Real>(batch, plan, [&](const auto& home) {
      const auto kernel = policy_solve_kernel(home, batch, request, plan);
      return body(kernel, grid_of(kernel, batch, limits, false));
    });
  });
}

// Here body also gets the number of items, which is not the number of problems.
template <class Body>
auto with_outer(const Batch& batch, const Outer& request, Body&& body) {
  return with_storage(batch, [&](auto zero) {
    using Real = decltype(zero);
    const OuterKernel<Real> kernel{batch.problems,
                                   static_cast<int>(batch.states),
                                   static_cast<int>(batch.actions),
                                   batch.crow,
                                   batch.col,
                                   batch.nnz,
                                   request.weight,
                                   request.vector,
                                   request.shift,
                                   static_cast<Real*>(request.out)};
    const Index items = batch.transitions * kernel.items_per_transition();
    const Grid grid{block_count(items, {0, 0}, {}), kBlockThreads, {0, 0}};
    return body(kernel, items, grid);
  });
}

}  // namespace birl::device
