// From a request to a wide kernel and its grid, as dispatch.h for one block: which team, what lies
// on chip. The same for the GPU (solve_large.cu, policy_solve_large.cu) and for the host.
#pragma once

#include "device/dispatch.h"
#include "device/large_policy_solve.h"
#include "device/large_solve.h"

namespace birl::device {

struct WideLimits {
  DeviceLimits block;
  bool cooperative, clusters;
};

enum class WideKind { kCluster, kGrid, kAlone };

struct WidePlan {
  WideKind kind = WideKind::kAlone;
  int blocks = 1;  // of a cluster
  Index tile = 1;
  bool staged = false, near = false, far_tables = false;
};

constexpr int kLargestCluster = 8;  // every device with clusters has that many

// Memory of a block that leaves room for a second one on its multiprocessor.
inline std::size_t half_chip(const WideLimits& limits) { return limits.block.chip / 2 - 1024; }

// One block for each problem keeps the device busy once there are twice as many as processors.
inline bool many(const DeviceBatch& batch, const WideLimits& limits) {
  return batch.total() >= 2 * static_cast<Index>(limits.block.processors);
}

constexpr Index kNearActions = 512;  // most whose tables are kept on chip

inline WidePlan far_plan(const DeviceBatch& batch, const WideLimits& limits) {
  WidePlan plan;
  plan.kind = limits.cooperative && !many(batch, limits) ? WideKind::kGrid : WideKind::kAlone;
  const Index S = batch.states, A = batch.actions;
  if (batch.sparse()) {
    plan.tile = A < 512 ? 512 / A : 1;
    plan.far_tables = A > kNearActions;
    return plan;
  }
  const std::size_t size = batch.is_double ? 8 : 4, pitch = static_cast<std::size_t>(S + 3) / 4 * 4;
  const std::size_t state = pitch * static_cast<std::size_t>(A) * size;
  plan.far_tables = A > kNearActions;
  const std::size_t vectors =
      16384 + (plan.far_tables ? 0 : 16 * static_cast<std::size_t>(A < 16 ? 16 : A));
  std::size_t room = half_chip(limits) > vectors ? half_chip(limits) - vectors : 0;
  plan.near = pitch * 8 <= room / 2;
  if (plan.near) room -= pitch * 8;
  plan.tile = A < 16 ? 16 / A : 1;  // two rows for each warp
  while (plan.tile > 1 && state * static_cast<std::size_t>(plan.tile) > room) --plan.tile;
  plan.staged = state * static_cast<std::size_t>(plan.tile) <= room;
  return plan;
}

// Smallest cluster whose blocks have room for everything, else the whole device.
template <class FootprintOf>
WidePlan choose_wide_plan(const DeviceBatch& batch, const WideLimits& limits,
                          FootprintOf&& cluster_footprint) {
  if (limits.clusters && !batch.sparse())
    for (int blocks = 2; blocks <= kLargestCluster; blocks *= 2) {
      WidePlan plan;
      plan.kind = WideKind::kCluster;
      plan.blocks = blocks;
      plan.tile = batch.actions < 16 ? 16 / batch.actions : 1;
      plan.near = true;
      if (cluster_footprint(plan) <= limits.block.chip) return plan;
    }
  return far_plan(batch, limits);
}

template <class Real, bool kOnChip>
DenseWide<Real, kOnChip> dense_wide(const DeviceBatch& batch, const WidePlan& plan) {
  return {
      static_cast<const Real*>(batch.transition),     batch.states, batch.actions, plan.tile,
      (batch.states + plan.blocks - 1) / plan.blocks, plan.staged,  plan.near,     plan.far_tables};
}

template <class Real, int kLanes>
CsrWide<Real, kLanes> csr_wide(const DeviceBatch& batch, const WidePattern& pattern,
                               const WidePlan& plan) {
  return {static_cast<const Real*>(batch.transition),
          batch.states,
          batch.actions,
          plan.tile,
          batch.crow,
          batch.col,
          batch.nnz,
          pattern,
          plan.far_tables};
}

constexpr int kCsrLanes = 8;  // rows of 5 to 50 entries keep most of them busy

// body(home) with the home of a plan that is no cluster.
template <class Real, class Body>
auto with_far_home(const DeviceBatch& batch, const WidePattern& pattern, const WidePlan& plan,
                   Body&& body) {
  if (batch.sparse()) return body(csr_wide<Real, kCsrLanes>(batch, pattern, plan));
  return body(dense_wide<Real, false>(batch, plan));
}

template <class Home>
LargeSolve<Home> large_solve_kernel(const Home& home, const DeviceBatch& batch,
                                    const DeviceSolve& request, const WidePlan& plan) {
  const Kernel name = plan.kind == WideKind::kCluster ? Kernel::kCudaCluster
                      : batch.sparse()                ? Kernel::kCudaCsr
                                                      : Kernel::kCudaGrid;
  using Real = typename Home::Real;
  return {home,
          {batch.problems,
           static_cast<const Real*>(batch.reward),
           batch.log_reference,
           batch.discount,
           batch.temperature,
           request.initial,
           request.value,
           static_cast<Real*>(request.q),
           static_cast<Real*>(request.advantage),
           static_cast<Real*>(request.policy),
           static_cast<Real*>(request.log_policy),
           request.info,
           request.status,
           {request.method, request.tol, request.max_iterations, request.validate},
           name,
           false,
           false,
           false}};
}

template <class Home>
LargePolicySolve<Home> large_policy_solve_kernel(const Home& home, const DeviceBatch& batch,
                                                 const DevicePolicySolve& request) {
  return {home,
          {batch.problems, request.right_sides, request.policy, batch.discount, request.rhs,
           request.out, request.residual, request.transpose, 0, request.tol}};
}

}  // namespace birl::device
