#include "cpu/entry/solve.h"

#include <memory>

#include "cpu/solvers/general_solver.h"
#include "cpu/solvers/packed_solver.h"

namespace birl {
namespace {

// One solver and the transition it has prepared.
template <class Solver, class Model>
struct Worker {
  std::unique_ptr<Solver> solver;
  std::unique_ptr<Model> model;
  Index transition = -1;

  template <class ModelOf, class Make>
  void take(Index n, ModelOf&& model_of, Make&& make) {
    if (!solver) solver = make();
    if (transition == n) return;
    transition = n;
    model = std::make_unique<Model>(model_of(n));
    solver->take(*model);
  }
};

// Neighbouring problems go to a worker together: as long as it stays on one transition it prepares
// that once.
template <class Solver, class Model, class ModelOf, class Make>
void solve_all(const Batch& batch, const Solve& request, ModelOf&& model_of, Team& team,
               double work, Interrupt& interrupt, Make&& make) {
  using Real = typename Model::Real;
  const Index S = batch.states, A = batch.actions, total = batch.total();
  std::vector<Worker<Solver, Model>> workers(team.size());
  const Index length = std::max<Index>(1, total / (32 * team.size()));
  team.run((total + length - 1) / length, work, [&](Index item, int index) {
    Worker<Solver, Model>& worker = workers[index];
    for (Index i = item * length; i < std::min(total, (item + 1) * length); ++i) {
      interrupt.check();
      worker.take(i / batch.problems, model_of, make);
      Outcome outcome{};
      const Defect defect = worker.solver->solve(
          problem_at<Real>(batch, i), request.initial ? request.initial + i * S : nullptr,
          tables_at<Real>(request, i, S, A), outcome);
      if (defect.status != Status::kConverged)
        report<Real>(request, i, defect, batch.temperature[i], Solver::kKernel, S, A);
      else
        report(request, i, outcome, batch.temperature[i], Solver::kKernel, S);
    }
  });
}

template <class Model, class ModelOf>
void solve_small(const Batch& batch, const Solve& request, ModelOf&& model_of, Team& team,
                 Interrupt& interrupt) {
  using Solver = PackedSolver<Model>;
  const Index S = batch.states, A = batch.actions;
  Team alone(1);
  const double work =
      30.0 * static_cast<double>(batch.total()) * (static_cast<double>(S * S * A) + 100.0);
  solve_all<Solver, Model>(batch, request, model_of, team, work, interrupt, [&] {
    return std::make_unique<Solver>(request, alone, interrupt, S, A);
  });
}

template <class Model, class ModelOf>
void solve_general(const Batch& batch, const Solve& request, ModelOf&& model_of, Team& team,
                   Interrupt& interrupt) {
  using Solver = GeneralSolver<Model>;
  std::unique_ptr<PolicyPattern> pattern;
  if (batch.sparse())
    pattern = std::make_unique<PolicyPattern>(batch.crow, batch.col, batch.states, batch.actions,
                                              false, team);
  const auto prepared = [&](Index n) { return with_pattern(model_of(n), pattern.get()); };
  // Across problems where there are enough of them, else across the states of one.
  Team alone(1);
  const bool across = batch.total() >= team.size();
  Team &outer = across ? team : alone, &within = across ? alone : team;
  const double work = 20.0 * model_of(0).work() * static_cast<double>(batch.total());
  solve_all<Solver, Model>(batch, request, prepared, outer, work, interrupt, [&] {
    return std::make_unique<Solver>(request, pattern.get(), within, interrupt);
  });
}

// Whether the solver of small problems knows the method.
bool is_small(const Solve& request) {
  return request.method != Method::kKrylov && request.method != Method::kPolicyIteration;
}

}  // namespace

void solve(const Batch& batch, const Solve& request, Interrupt& interrupt) {
  if (batch.total() == 0) return;
  Team team(request.threads);
  with_models(batch, [&](auto model_of) {
    using Model = decltype(model_of(0));
    if (is_small(request) && PackedSolver<Model>::fits(batch.states, batch.actions))
      solve_small<Model>(batch, request, model_of, team, interrupt);
    else
      solve_general<Model>(batch, request, model_of, team, interrupt);
  });
}

}  // namespace birl
