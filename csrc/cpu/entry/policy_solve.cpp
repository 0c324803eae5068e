#include "cpu/solvers/policy_system_solver.h"

namespace birl {
namespace {

// 1/σ for every row, zero for a row without continuation.
template <class Model>
void inverse_row_sums(const Model& model, double* inverse) {
  const Index rows = model.states * model.actions;
  std::vector<double> least(rows);
  model.row_sums(0, rows, inverse, least.data());
  for (Index i = 0; i < rows; ++i) inverse[i] = inverse_row_sum(inverse[i]);
}

}  // namespace

Index policy_solve(const Batch& batch, const PolicySolve& request, Interrupt& interrupt) {
  if (batch.total() == 0) return 0;
  const Index S = batch.states, A = batch.actions, K = request.right_sides;
  std::atomic<Index> failed{0};
  with_models(batch, [&](auto model_of) {
    using Model = decltype(model_of(0));
    std::unique_ptr<PolicyPattern> pattern;
    const double work = 4.0 * model_of(0).work() + static_cast<double>(S * S * K);
    Team team(request.threads), alone(1);
    if (batch.sparse())
      pattern =
          std::make_unique<PolicyPattern>(batch.crow, batch.col, S, A, request.transpose, team);
    const bool across = batch.total() >= team.size();
    Team &outer = across ? team : alone, &within = across ? alone : team;
    struct Workspace {
      std::unique_ptr<typename PolicySystem<Model>::Matrix> matrix;
      std::unique_ptr<Elimination> elimination;
      std::vector<double> inverse_sum;
      Index transition = -1;
    };
    std::vector<Workspace> workspaces(outer.size());
    std::vector<std::vector<double>> rows(team.size(), std::vector<double>(S));
    const PolicySystemOptions options{request.transpose, 0.0};

    outer.run(batch.total(), work * static_cast<double>(batch.total()), [&](Index i, int worker) {
      interrupt.check();
      Workspace& workspace = workspaces[worker];
      const Index n = i / batch.problems;
      const Model model = model_of(n);
      if (!workspace.matrix) workspace.matrix = make_policy_matrix(model, pattern.get(), false);
      if (workspace.transition != n) {
        workspace.inverse_sum.resize(S * A);
        inverse_row_sums(model, workspace.inverse_sum.data());
        workspace.transition = n;
      }
      PolicySystem<Model> system(model, *workspace.matrix, workspace.elimination, batch.discount[i],
                                 options, within, interrupt);
      const Index chunk = model.chunk();
      within.run((S + chunk - 1) / chunk, 2.0 * model.work(), [&](Index c, int helper) {
        system.form(c * chunk, std::min(S, (c + 1) * chunk), workspace.inverse_sum.data(),
                    request.policy + i * S * A, rows[std::max(worker, helper)].data());
      });
      failed.fetch_add(system.solve(K, request.rhs + i * K * S, request.out + i * K * S,
                                    request.residual + i * K),
                       std::memory_order_relaxed);
    });
  });
  return failed.load();
}

}  // namespace birl
