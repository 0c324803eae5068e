#include "solve.h"

#include <array>
#include <memory>

#include "general_solver.h"
#include "lane_solver.h"

namespace birl {
namespace {

// One solver and the transition it has prepared.
template <class Solver, class Model>
struct Bench {
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

// body(begin, end, worker) over spans of neighbouring problems: a worker that stays on one
// transition prepares it once.
template <class Body>
void spans(Index total, Team& team, double work, Body&& body) {
  const Index length = std::max<Index>(1, total / (32 * team.size()));
  team.run((total + length - 1) / length, work, [&](Index item, int worker) {
    body(item * length, std::min(total, (item + 1) * length), worker);
  });
}

template <class Real>
const double* initial_at(const Solve& request, Index i, Index S) {
  return request.initial ? request.initial + i * S : nullptr;
}

template <class Model, class ModelOf>
void solve_small(const Batch& batch, const Solve& request, ModelOf&& model_of, Team& team,
                 Interrupt& interrupt) {
  using Real = typename Model::Real;
  using Solver = LaneSolver<Model>;
  const Index S = batch.states, A = batch.actions, total = batch.total();
  Team alone(1);
  const auto make = [&] { return std::make_unique<Solver>(request, alone, interrupt, S, A); };
  constexpr Index kAbreast = Solver::kAbreast;
  std::vector<std::array<Bench<Solver, Model>, kAbreast>> workers(team.size());
  const double work = 30.0 * static_cast<double>(total) * (static_cast<double>(S * S * A) + 100.0);
  spans(total, team, work, [&](Index begin, Index end, int worker) {
    for (Index first = begin; first < end; first += kAbreast) {
      interrupt.check();
      const Index count = std::min(kAbreast, end - first);
      bool at_work[kAbreast] = {};
      Defect defect[kAbreast];
      for (Index k = 0; k < count; ++k) {
        Bench<Solver, Model>& bench = workers[worker][k];
        bench.take((first + k) / batch.problems, model_of, make);
        defect[k] = bench.solver->begin(problem_at<Real>(batch, first + k),
                                        initial_at<Real>(request, first + k, S));
        at_work[k] = defect[k].status == Status::kConverged;
      }
      for (bool any = true; any;) {
        any = false;
        for (Index k = 0; k < count; ++k)
          if (at_work[k]) any |= at_work[k] = !workers[worker][k].solver->step();
      }
      for (Index k = 0; k < count; ++k) {
        const Index i = first + k;
        if (defect[k].status != Status::kConverged)
          report<Real>(request, i, defect[k], batch.temperature[i], Solver::kKernel, S, A);
        else
          report(request, i, workers[worker][k].solver->finish(tables_at<Real>(request, i, S, A)),
                 batch.temperature[i], Solver::kKernel);
      }
    }
  });
}

template <class Model, class ModelOf>
void solve_general(const Batch& batch, const Solve& request, ModelOf&& model_of, Team& team,
                   Interrupt& interrupt) {
  using Real = typename Model::Real;
  using Solver = GeneralSolver<Model>;
  const Index S = batch.states, A = batch.actions, total = batch.total();
  std::unique_ptr<PolicyPattern> pattern;
  if (batch.sparse()) pattern = std::make_unique<PolicyPattern>(batch.crow, batch.col, S, A);
  // Across problems where there are enough of them, else across the states of one.
  Team alone(1);
  const bool across = total >= team.size();
  Team &outer = across ? team : alone, &within = across ? alone : team;
  const auto make = [&] {
    return std::make_unique<Solver>(request, pattern.get(), within, interrupt);
  };
  std::vector<Bench<Solver, Model>> workers(outer.size());
  const double work = 20.0 * model_of(0).work() * static_cast<double>(total);
  spans(total, outer, work, [&](Index begin, Index end, int worker) {
    for (Index i = begin; i < end; ++i) {
      interrupt.check();
      workers[worker].take(i / batch.problems, model_of, make);
      Outcome outcome{};
      const Defect defect =
          workers[worker].solver->solve(problem_at<Real>(batch, i), initial_at<Real>(request, i, S),
                                        tables_at<Real>(request, i, S, A), outcome);
      if (defect.status != Status::kConverged)
        report<Real>(request, i, defect, batch.temperature[i], Solver::kKernel, S, A);
      else
        report(request, i, outcome, batch.temperature[i], Solver::kKernel);
    }
  });
}

// Methods that the solver of small problems knows: automatic, value iteration, Newton.
bool is_small(const Solve& request) { return request.method <= 2; }

}  // namespace

void solve(const Batch& batch, const Solve& request, Interrupt& interrupt) {
  if (batch.total() == 0) return;
  Team team(request.threads);
  with_models(batch, [&](auto model_of) {
    using Model = decltype(model_of(0));
    if (is_small(request) && LaneSolver<Model>::fits(batch.states, batch.actions))
      solve_small<Model>(batch, request, model_of, team, interrupt);
    else
      solve_general<Model>(batch, request, model_of, team, interrupt);
  });
}

}  // namespace birl
