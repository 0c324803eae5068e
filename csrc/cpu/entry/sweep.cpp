#include "cpu/entry/sweep.h"

#include <cmath>

namespace birl {

// Work is dealt out by chunks of states of one transition; a chunk's rows stay in cache while all G
// problems use them, so P is read from memory once.
void sweep(const Batch& batch, const Sweep& request, Interrupt& interrupt) {
  if (batch.total() == 0) return;
  const Index S = batch.states, A = batch.actions, G = batch.problems;
  with_models(batch, [&](auto model_of) {
    using Model = decltype(model_of(0));
    const Index chunk = model_of(0).chunk();
    const Index chunks = (S + chunk - 1) / chunk;

    // With V = c + W centred, rounding is relative to the span of V and not to its size.
    std::vector<double> centre(batch.total()), w(batch.total() * S);
    for (Index i = 0; i < batch.total(); ++i) {
      const double* v = request.value + i * S;
      const auto ends = std::minmax_element(v, v + S);
      centre[i] = 0.5 * *ends.first + 0.5 * *ends.second;
      if (!std::isfinite(centre[i])) centre[i] = 0.0;
      for (Index s = 0; s < S; ++s) w[i * S + s] = v[s] - centre[i];
    }

    Team team(request.threads);
    std::vector<SweepScratch<Model>> scratch(team.size(), SweepScratch<Model>(model_of(0)));
    const double work = 2.0 * model_of(0).work() * static_cast<double>(batch.total()) +
                        40.0 * batch.total() * S * A;
    std::vector<std::vector<double>> q(team.size(), std::vector<double>(std::min(S, chunk) * A));
    team.run(batch.transitions * chunks, work, [&](Index item, int worker) {
      interrupt.check();
      const Index n = item / chunks, s0 = (item % chunks) * chunk, s1 = std::min(S, s0 + chunk);
      const Model model = model_of(n);
      SweepScratch<Model>& mine = scratch[worker];
      const Index rows = (s1 - s0) * A;
      for (Index i = n * G; i < (n + 1) * G; ++i) {
        const Problem<typename Model::Real> problem = problem_at<typename Model::Real>(batch, i);
        double* mine_q = q[worker].data();
        const double* const wi = w.data() + i * S;
        if (i == n * G) {
          model.products_and_sums(s0 * A, s1 * A, wi, mine.product.data(), mine.sum.data(),
                                  mine.least.data());
          for (Index row = 0; row < rows; ++row) mine.sum[row] = inverse_row_sum(mine.sum[row]);
        } else {
          model.products(s0 * A, s1 * A, wi, mine.product.data());
        }
        q_values(problem, mine.product.data(), mine.sum.data(), s0 * A, s1 * A, mine_q);
        // Everything is relative to γc, also the rows that do not continue from c.
        const double constant = problem.discount * centre[i];
        for (Index row = 0; row < rows; ++row)
          if (mine.sum[row] == 0.0) mine_q[row] -= constant;
        const Index at = i * S * A + s0 * A;
        const auto optional = [at](double* p) { return p ? p + at : nullptr; };
        kernels().soft_maximum(
            {s1 - s0, A, mine_q, problem.log_reference ? problem.log_reference + s0 * A : nullptr,
             problem.temperature, request.value_out + i * S + s0, optional(request.policy),
             optional(request.log_policy), optional(request.advantage), mine.soft_maximum.data()});
        for (Index s = s0; s < s1; ++s) request.value_out[i * S + s] += constant;
      }
    });
  });
}

}  // namespace birl
