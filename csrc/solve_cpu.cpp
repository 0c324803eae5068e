#include "solve.h"

#include <memory>

#include "general_solver.h"
#include "lane_solver.h"

namespace birl {
namespace {

// All problems, in spans of neighbours, each worker with a solver of its own. A span that stays on
// one transition prepares it once.
template <class Solver, class ModelOf, class Make>
void solve_all(const Batch& batch, const Solve& request, ModelOf&& model_of, Team* team,
               double work, Interrupt& interrupt, Make&& make) {
  using Model = decltype(model_of(0));
  using Real = typename Model::Real;
  const Index S = batch.states, A = batch.actions, total = batch.total();
  struct Worker {
    std::unique_ptr<Solver> solver;
    Index transition = -1;
    std::unique_ptr<Model> model;
  };
  std::vector<Worker> workers(team ? team->size() : 1);
  const auto span = [&](Index begin, Index end, Worker& worker) {
    if (!worker.solver) worker.solver = make();
    for (Index i = begin; i < end; ++i) {
      interrupt.check();
      if (worker.transition != i / batch.problems) {
        worker.transition = i / batch.problems;
        worker.model = std::make_unique<Model>(model_of(worker.transition));
        worker.solver->take(*worker.model);
      }
      const Problem<Real> problem = problem_at<Real>(batch, i);
      Outcome outcome{};
      const Defect defect =
          worker.solver->solve(problem, request.initial ? request.initial + i * S : nullptr,
                               tables_at<Real>(request, i, S, A), outcome);
      if (defect.status == Status::kConverged)
        report(request, i, outcome, problem.temperature, Solver::kKernel);
      else
        report<Real>(request, i, defect, problem.temperature, Solver::kKernel, S, A);
    }
  };
  if (!team) return span(0, total, workers[0]);
  const Index length = std::max<Index>(1, total / (32 * team->size()));
  team->run((total + length - 1) / length, work, [&](Index item, int worker) {
    span(item * length, std::min(total, (item + 1) * length), workers[worker]);
  });
}

// Methods that the solver of small problems knows: automatic, value iteration, Newton.
bool is_small(const Solve& request) { return request.method <= 2; }

}  // namespace

void solve(const Batch& batch, const Solve& request, Interrupt& interrupt) {
  if (batch.total() == 0) return;
  const Index S = batch.states, A = batch.actions;
  with_models(batch, [&](auto model_of) {
    using Model = decltype(model_of(0));
    Team team(request.threads), alone(1);
    const double entries = static_cast<double>(S) * static_cast<double>(S * A);
    if (is_small(request) && LaneSolver<Model>::fits(S, A)) {
      const double work = 30.0 * static_cast<double>(batch.total()) * (entries + 100.0);
      return solve_all<LaneSolver<Model>>(batch, request, model_of, &team, work, interrupt, [&] {
        return std::make_unique<LaneSolver<Model>>(request, alone, interrupt, S, A);
      });
    }
    std::unique_ptr<PolicyPattern> pattern;
    if (batch.sparse()) pattern = std::make_unique<PolicyPattern>(batch.crow, batch.col, S, A);
    // Across problems where there are enough of them, else across the states of one.
    const bool across = batch.total() >= team.size();
    const double work = 20.0 * model_of(0).work() * static_cast<double>(batch.total());
    solve_all<GeneralSolver<Model>>(batch, request, model_of, across ? &team : nullptr, work,
                                    interrupt, [&] {
                                      return std::make_unique<GeneralSolver<Model>>(
                                          request, pattern.get(), across ? alone : team, interrupt);
                                    });
  });
}

}  // namespace birl
