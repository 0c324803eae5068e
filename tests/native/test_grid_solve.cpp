// The solve kernel of the grid against the naive solver of cases.h, for every home and launch.
#include "agreement.h"
#include "run_grid.h"

namespace test {
namespace {

using birl::Rigour;
using birl::Status;

const GridRun kFirst{1, 4, Order::kForward, 0};
const GridRun kRuns[] = {
    {3, 4, Order::kBackward, 0}, {2, 5, Order::kShuffled, 1}, {7, 3, Order::kShuffled, 2}};

template <class Real>
void orders(const Case<Real>& c, const HostPattern* pattern, const char* what, Index method) {
  const Solution<Real> found = solve_grid(c, pattern, options(method), kFirst);
  agrees(c, found, std::string(what) + " method " + std::to_string(method));
  for (const GridRun& run : kRuns)
    expect(same_bits(found, solve_grid(c, pattern, options(method), run)),
           std::string(what) + " " + c.name + ": bits depend on the team");
}

template <class Real>
void all_homes(const Case<Real>& c, Index method = 0) {
  const HostPattern pattern(c);
  orders(c, nullptr, "dense", method);
  orders(c, &pattern, "csr", method);
}

template <class Real>
void sizes() {
  for (const int S : {1, 2, 33, 65, 130})
    for (const int A : {1, 3, 33}) {
      if (S > 33 && A != 3) continue;
      Traits traits;
      traits.masked = (S + A) % 2 == 0;
      traits.terminal = S % 3 == 0;
      all_homes(make_case<Real>(S, A, traits, 100 * S + A));
    }
}

template <class Real>
void hard() {
  for (const double discount : {0.0, 0.5, 0.999, 0.9999})
    for (const double temperature : {1e-3, 1.0}) {
      Traits traits;
      traits.discount = discount;
      traits.temperature = temperature;
      traits.G = 2;
      traits.masked = discount < 0.999;
      traits.terminal = discount == 0.5;
      all_homes(make_case<Real>(13, 3, traits, 7));
    }
}

void methods() {
  Traits traits;
  traits.discount = 0.97;
  traits.N = 2;
  const Case<double> c = make_case<double>(40, 4, traits, 3);
  for (const Index method : {1, 2, 3, 4}) all_homes(c, method);
  const std::vector<double> initial(c.items() * c.S, 1e3);
  agrees(c, solve_grid(c, nullptr, options(), {}, initial.data()), "initial");

  const Solution<double> loose = solve_grid(c, nullptr, options(1, 1e-3));
  const Solution<double> tight = solve_grid(c, nullptr, options(1, 1e-10));
  expect(loose.status[0] == 0 && tight.status[0] == 0, "a tolerance is met");
  expect(loose.row(0)[2] < tight.row(0)[2], "a loose tolerance takes fewer passes");
  double largest = 0.0;
  for (int s = 0; s < c.S; ++s) largest = std::fmax(largest, std::fabs(tight.value[s]));
  expect(loose.row(0)[1] <= 1.01e-3 * largest && tight.row(0)[1] <= 1.01e-10 * largest,
         "it is the certified error that meets the tolerance");
  const std::vector<double> far(c.items() * c.S, 1e9);
  const Solution<double> back = solve_grid(c, nullptr, options(1, 1e-4), {}, far.data());
  expect(back.status[0] == 0 && back.row(0)[1] <= 1.01e-4 * largest,
         "a tolerance is that of the value handed out");
  const Solution<double> few = solve_grid(c, nullptr, options(1, 1e-10, 3));
  expect(few.status[0] == static_cast<Index>(Status::kMaxIterations), "iteration limit");
  expect(few.row(0)[2] == 3.0, "exactly the passes allowed");
  const Solution<double> beyond = solve_grid(c, nullptr, options(0, 1e-18));
  expect(beyond.status[0] == static_cast<Index>(Status::kStagnated), "below the rounding floor");
  const Solution<double> warm = solve_grid(c, nullptr, options(), {}, tight.value.data());
  const Solution<double> cold = solve_grid(c, nullptr, options());
  expect(warm.row(0)[2] < cold.row(0)[2], "a good start saves passes");
  expect(cold.row(0)[2] < 12.0 && cold.row(0)[5] > 0.0, "Newton's inner products are counted");
}

void cycle() {
  const Case<double> c = make_cycle(0.9999);
  const Solution<double> found = solve_grid(c, nullptr, options(1));
  expect(found.status[0] == 0 && found.row(0)[1] <= 1e-5, "value iteration on a cycle");
  agrees(c, found, "cycle");
}

// Two halves that hardly mix: sweeps would take thousands of passes.
void slow_mixing() {
  Traits traits;
  traits.discount = 0.999;
  traits.successors = 8;
  Case<double> c = make_case<double>(40, 3, traits, 4);
  for (Index row = 0; row < c.table(); ++row) {
    double* const p = c.transition.data() + row * c.S;
    const int half = static_cast<int>(row / c.A) / 20;
    std::vector<double> moved(c.S, 0.0);
    for (int t = 0; t < c.S; ++t) {
      moved[half * 20 + t % 20] += p[t] * (1.0 - 1e-3);
      moved[(1 - half) * 20 + t % 20] += p[t] * 1e-3;
    }
    std::copy(moved.begin(), moved.end(), p);
  }
  find_pattern(c);
  const Solution<double> newton = solve_grid(c);
  agrees(c, newton, "slow");
  expect(newton.row(0)[2] < 60.0, "where it mixes slowly the passes stay few");
  const HostPattern pattern(c);
  const Solution<double> sparse = solve_grid(c, &pattern);
  agrees(c, sparse, "slow csr");
  expect(sparse.row(0)[2] < 60.0, "where it mixes slowly the passes stay few, csr");
}

template <class Real>
void invalid() {
  Traits traits;
  traits.N = 3;
  traits.G = 2;
  const Case<Real> good = make_case<Real>(6, 3, traits, 11);
  const double nan = std::nan("");
  const Index entries = good.table() * good.S, pairs = good.table();

  // Fails as the small kernels do, wherever the problem is in the batch, and nothing else changes.
  const auto as_the_small_kernel = [&](const char* what, auto&& change) {
    Case<Real> c = good;
    change(c);
    const Solution<Real> wanted = solve(shared_rows(c), c), well = solve_grid(good);
    for (const GridRun& run : kRuns)
      for (const Solution<Real>& found : {solve_grid(c, nullptr, options(), run)}) {
        int failed = 0;
        for (Index item = 0; item < c.items(); ++item) {
          const std::string where = std::string(what) + " item " + std::to_string(item);
          expect(found.status[item] == wanted.status[item], where + " status");
          if (found.status[item] == 0) {
            expect(std::memcmp(&found.value[item * 6], &well.value[item * 6], 48) == 0,
                   where + ": a neighbour changes");
            continue;
          }
          ++failed;
          expect(found.row(item)[3] == wanted.row(item)[3], where + " place");
          expect(std::memcmp(found.row(item) + 4, wanted.row(item) + 4, 8) == 0 ||
                     std::isnan(wanted.row(item)[4]),
                 where + " value");
          for (Index i = item * 6; i < item * 6 + 6; ++i) expect(std::isnan(found.value[i]), where);
          for (Index i = item * pairs; i < (item + 1) * pairs; ++i)
            expect(std::isnan(found.q[i]) && std::isnan(found.policy[i]), where + " tables");
        }
        expect(failed > 0, std::string(what) + " goes unnoticed");
      }
  };
  as_the_small_kernel("discount", [](auto& c) { c.discount[2] = 1.0; });
  as_the_small_kernel("discount", [&](auto& c) { c.discount[2] = nan; });
  as_the_small_kernel("temperature", [](auto& c) { c.temperature[2] = 0.0; });
  as_the_small_kernel("reward", [&](auto& c) {
    c.reward[2 * pairs + 5] = c.reward[2 * pairs + 9] = static_cast<Real>(nan);
  });
  as_the_small_kernel("probability", [&](auto& c) {
    c.transition[entries + 40] = INFINITY;
    c.transition[entries + 2] = -1;
  });
  as_the_small_kernel("negative", [&](auto& c) {
    c.transition[entries + 2] = -1;
    c.transition[entries + 60] = 5;
  });
  as_the_small_kernel("row sum", [&](auto& c) {
    for (int t = 0; t < 6; ++t) c.transition[entries + 60 + t] = t == 1 ? 5 : 0;
  });

  Case<Real> masked = good;
  masked.log_reference.assign(masked.reward.size(), 0.0);
  for (int a = 0; a < 3; ++a) masked.log_reference[9 + a] = -INFINITY;
  const Solution<Real> without = solve_grid(masked);
  expect(without.status[0] == static_cast<Index>(Status::kNoAction) && without.row(0)[3] == 3.0,
         "a state without an action");
  masked.log_reference[4] = nan;
  const Solution<Real> wrong = solve_grid(masked);
  expect(wrong.status[0] == static_cast<Index>(Status::kReference) && wrong.row(0)[3] == 4.0,
         "a reference that is no number");

  Case<Real> ending = good;  // a row of zeros ends the process, or is a row sum of zero
  for (int t = 0; t < 6; ++t) ending.transition[t] = 0;
  const SolveOptions strict = options(0, 0.0, 0, Rigour::kStochastic);
  agrees(ending, solve_grid(ending), "an ending row");
  const Solution<Real> refused = solve_grid(ending, nullptr, strict);
  expect(refused.status[0] == static_cast<Index>(Status::kRowSum), "or not");
  const SolveOptions off = options(0, 0.0, 0, Rigour::kOff);
  expect(solve_grid(ending, nullptr, off).status[0] == 0, "no check at all");
}

// More states than a naive solver takes: a ring on which all move forward or stay.
void many_states() {
  Case<double> c;
  c.name = "ring";
  c.S = 2000;
  c.A = 2;
  c.discount = {0.99};
  c.temperature = {0.1};
  c.crow = {0};
  for (int s = 0; s < c.S; ++s)
    for (int a = 0; a < c.A; ++a) {
      for (const int t : {s, (s + 1) % c.S, (s + 1000 * a + 17) % c.S}) {
        c.col.push_back(t);
        c.stored.push_back(t == s ? 0.5 : 0.25);
      }
      c.crow.push_back(static_cast<Index>(c.col.size()));
      c.reward.push_back(std::sin(0.01 * s * (a + 1)));
    }
  const HostPattern pattern(c);
  const Solution<double> found = solve_grid(c, &pattern, options());
  expect(found.status[0] == 0 && found.row(0)[5] > 0.0, "many states");
  expect(same_bits(found, solve_grid(c, &pattern, options(), {5, 3, Order::kShuffled, 3})),
         "many states: bits depend on the team");
  for (int s = 0; s < c.S; ++s) {  // ‖TV − V‖ <= (1 + γ)·bound
    Long top = -INFINITY, total = 0, q[2];
    for (int a = 0; a < c.A; ++a) {
      Long product = 0;
      for (Index k = c.crow[s * 2 + a]; k < c.crow[s * 2 + a + 1]; ++k)
        product += static_cast<Long>(c.stored[k]) * found.value[c.col[k]];
      q[a] = (c.reward[s * 2 + a] + 0.99L * product) / 0.1L;
      top = std::fmax(top, q[a]);
    }
    for (const Long x : q) total += std::exp(x - top);
    near(found.value[s], static_cast<double>(0.1L * (top + std::log(total))), 2.0 * found.row(0)[1],
         "many states value");
  }
}

// The certificate counts the additions of the longest row, not of a usual one.
void one_long_row() {
  Case<double> c = make_case<double>(600, 1, {}, 3);
  for (int t = 0; t < c.S; ++t) c.transition[t] = 1.0 / c.S;
  find_pattern(c);
  const HostPattern pattern(c);
  const Solution<double> with = solve_grid(c, &pattern);
  // half-span and rounding make up the bound: what is left are units of eps, 8 + additions + 0.5
  const double gamma = c.discount[0];
  const double rounding = with.row(0)[1] * (1.0 - gamma) - gamma * with.row(0)[0];
  double largest = 0.0;
  for (const double r : c.reward) largest = std::fmax(largest, std::fabs(r));
  expect(rounding >= (8.5 + 600 / 8) * kEps * largest, "a long row's rounding is in the bound");
}

// Where only a masked action ends the process, every row that counts continues.
void a_masked_end() {
  Case<double> c = make_case<double>(6, 2, {}, 8);
  c.log_reference.assign(c.reward.size(), 0.0);
  c.log_reference[3] = -INFINITY;
  const Solution<double> grid = solve_grid(c), block = solve(shared_rows(c), c);
  for (int t = 0; t < c.S; ++t) c.transition[3 * c.S + t] = 0.0;
  expect(same_bits(solve_grid(c).info, grid.info), "a masked end changes the grid's solution");
  expect(same_bits(solve(shared_rows(c), c).info, block.info), "a masked end changes a block's");
}

// How many blocks work on a problem, and in how much memory.
void grids() {
  const birl::device::DeviceLimits limits{96 * 1024, 132};
  const Case<float> c = make_case<float>(6, 2, {}, 1);
  Solution<float> out(c);
  with_kernel(c, nullptr, out, options(), nullptr, [&](const auto& kernel) {
    Batch batch = device_batch(c, false);
    const GridLaunchConfig few = grid_launch_config(kernel, batch, limits, 264);
    expect(few.teams == 1 && few.blocks == 6, "no more blocks than states");
    expect(grid_launch_config(kernel, batch, limits, 4).blocks == 4, "no more than are resident");
    batch.transitions = 264;
    const GridLaunchConfig many = grid_launch_config(kernel, batch, limits, 264);
    expect(many.teams == 264 && many.blocks == 1, "one block for each of many problems");
    expect(many.workspace() == 264 * many.bytes && few.workspace() == few.bytes, "workspace");
    return 0;
  });
}

void overflow() {
  Case<double> c = make_case<double>(4, 2, {}, 5);
  c.discount[0] = 0.999;
  for (double& reward : c.reward) reward = 1e308;
  c.reward[0] = -1e308;
  expect(solve_grid(c).status[0] == static_cast<Index>(Status::kNonFinite), "overflow");
  Case<float> narrow = make_case<float>(4, 2, {}, 5);
  narrow.discount[0] = 0.99;
  for (float& reward : narrow.reward) reward = 1e37f;
  expect(solve_grid(narrow).status[0] == static_cast<Index>(Status::kNonFinite),
         "a value beyond single precision");
}

}  // namespace
}  // namespace test

int main() {
  using namespace test;
  sizes<double>();
  sizes<float>();
  hard<double>();
  hard<float>();
  methods();
  cycle();
  slow_mixing();
  invalid<double>();
  invalid<float>();
  many_states();
  one_long_row();
  overflow();
  a_masked_end();
  grids();
  return summary("grid solve");
}
