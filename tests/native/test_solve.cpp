// The solve kernel against the naive solver of cases.h, in every order of its threads.
#include "agreement.h"

namespace test {
namespace {

using birl::Rigour;
using birl::Status;

constexpr HostRun kForward{32, Order::kForward, 0, 1};
const HostRun kOtherRuns[] = {{32, Order::kBackward, 0, 1},
                              {32, Order::kShuffled, 1, 1},
                              {96, Order::kShuffled, 2, 3},
                              {7, Order::kShuffled, 3, 2}};

template <class Home, class Real>
void one(const Home& home, const Case<Real>& c, const char* what, const Solution<Real>* twin) {
  const Solution<Real> found = solve(home, c, options(), kForward);
  agrees(c, found, what);
  for (const HostRun& run : kOtherRuns)
    expect(same_bits(found, solve(home, c, options(), run)),
           std::string(what) + " " + c.name + ": bits depend on the order");
  if (twin) expect(same_bits(found, *twin), std::string(what) + " " + c.name + ": not its twin");
}

template <class Real>
void all_homes(const Case<Real>& c) {
  const Solution<Real> shared = solve(shared_rows(c), c, options(), kForward);
  one(shared_rows(c), c, "shared", &shared);
  one(global_rows(c), c, "global", &shared);
  one(csr_rows(c), c, "csr", static_cast<const Solution<Real>*>(nullptr));
}

template <class Real>
void sizes() {
  for (const int S : {1, 2, 31, 32, 33, 64, 65})
    for (const int A : {1, 2, 5, 17}) {
      if (S > 33 && A == 5) continue;
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
      traits.N = 2;
      traits.G = 3;
      traits.masked = discount < 0.999;
      all_homes(make_case<Real>(13, 3, traits, 7));
      traits.terminal = true;
      all_homes(make_case<Real>(13, 3, traits, 8));
    }
}

// A warp with P in registers gives the bits of a block with P in shared memory.
template <class Real>
void registers() {
  for (const int S : {1, 2, 5, 8, 10, 15, 16})
    for (const int A : {1, 3, 4, 6}) {
      Traits traits;
      traits.discount = 0.99;
      traits.N = 3;
      traits.masked = A == 3;
      traits.terminal = S == 10;
      const Case<Real> c = make_case<Real>(S, A, traits, 10 * S + A);
      const Solution<Real> twin = solve(shared_rows(c), c, options(), kForward);
      const HostRun warp{32, Order::kShuffled, 5, 1};
      if (S <= 8 && S * A <= 64) {
        const RegisterRows<Real, 8, 2> home{c.transition.data(), S, A};
        expect(same_bits(solve(home, c, options(), warp), twin), "registers 8x2 " + c.name);
      }
      if (S * A <= 96) {
        const RegisterRows<Real, 16, 3> home{c.transition.data(), S, A};
        expect(same_bits(solve(home, c, options(), warp), twin), "registers 16x3 " + c.name);
      }
      agrees(c, twin, "shared");
    }
}

// Every method ends at the same place; a start changes the way and not the end.
void methods() {
  Traits traits;
  traits.discount = 0.97;
  const Case<double> c = make_case<double>(20, 4, traits, 3);
  for (const Index method : {1, 2, 3, 4})
    agrees(c, solve(shared_rows(c), c, options(method)), "method " + std::to_string(method));
  const std::vector<double> initial(c.S, 1e3);
  agrees(c, solve(shared_rows(c), c, options(), {}, initial.data()), "initial");

  const Solution<double> loose = solve(shared_rows(c), c, options(1, 1e-3));
  const Solution<double> tight = solve(shared_rows(c), c, options(1, 1e-10));
  expect(loose.status[0] == 0 && tight.status[0] == 0, "a tolerance is met");
  expect(loose.row(0)[2] < tight.row(0)[2], "a loose tolerance takes fewer passes");
  for (int s = 0; s < c.S; ++s)
    near(loose.value[s], tight.value[s], loose.row(0)[1] + tight.row(0)[1], "loose value");
  // Mixes within a sweep, so that a far start leaves its mark on the middle alone.
  Traits fast;
  fast.successors = 2000;
  const Case<double> mixing = make_case<double>(20, 3, fast, 6);
  const std::vector<double> far(mixing.S, 1e9);
  const Solution<double> back =
      solve(shared_rows(mixing), mixing, options(1, 1e-4), {}, far.data());
  double largest = 0.0;
  for (const double v : back.value) largest = std::fmax(largest, std::fabs(v));
  for (const double r : mixing.reward) largest = std::fmax(largest, std::fabs(r));
  expect(back.status[0] == 0 && back.row(0)[1] <= 1.0001e-4 * largest,
         "a tolerance is that of the value handed out");

  const Solution<double> few = solve(shared_rows(c), c, options(1, 1e-10, 3));
  expect(few.status[0] == static_cast<Index>(Status::kMaxIterations), "iteration limit");
  expect(few.row(0)[2] == 3.0, "exactly the passes allowed");
  const Solution<double> beyond = solve(shared_rows(c), c, options(0, 1e-18));
  expect(beyond.status[0] == static_cast<Index>(Status::kStagnated), "below the rounding floor");

  Traits slow;
  slow.discount = 0.9999;
  slow.temperature = 1e-3;
  slow.successors = 1;
  const Case<double> chain = make_case<double>(24, 3, slow, 4);
  const Solution<double> newton = solve(shared_rows(chain), chain);
  expect(newton.row(0)[2] < 200.0, "a slowly mixing problem is left to Newton");
  agrees(chain, newton, "slow");
  Solution<double> without(chain);
  run_serial(solve_kernel(shared_rows(chain), chain, without, options(), nullptr, false), 1, {});
  expect(without.row(0)[2] > 200.0, "without an elimination value iteration goes on");
}

// Close to a discount of one.
void endings() {
  Traits traits;
  traits.discount = 1.0 - 1e-9;
  traits.temperature = 1e-4;
  traits.successors = 1;
  for (unsigned seed = 0; seed < 20; ++seed) {
    const Case<double> c = make_case<double>(10, 3, traits, seed);
    const Solution<double> found = solve(shared_rows(c), c, options(2, 0.0, 100));
    expect(found.status[0] == 0, "several closed classes");
  }

  const Case<double> cycle = make_cycle(0.9999);
  const Solution<double> found = solve(shared_rows(cycle), cycle, options(1));
  expect(found.status[0] == 0 && found.row(0)[1] <= 1e-5, "value iteration on a cycle");
  agrees(cycle, found, "cycle");

  // Negative probabilities: Newton's method may go in circles.
  Case<double> circles = make_case<double>(2, 2, {}, 1);
  circles.discount[0] = 1.0 - 1e-9;
  circles.temperature[0] = 0.01;
  circles.transition = {-2.0, 3.0, 4.0, -3.0, -3.0, 4.0, -1.0, 2.0};
  circles.reward = {0.0, 2.0, -2.0, 0.0};
  const Solution<double> ended =
      solve(shared_rows(circles), circles, options(2, 0.0, 0, Rigour::kOff));
  expect(ended.status[0] == static_cast<Index>(Status::kMaxIterations) && ended.row(0)[2] == 1000.0,
         "a thousand steps are enough");
}

template <class Real>
void invalid() {
  Traits traits;
  traits.N = 3;
  traits.G = 2;
  const Case<Real> good = make_case<Real>(6, 3, traits, 11);
  const Solution<Real> wanted = solve(shared_rows(good), good);
  const double nan = std::nan("");

  struct Fault {
    Status status;
    Index place;
    double value;
    bool whole;  // spoils both problems of the transition
    Case<Real> c;
  };
  std::vector<Fault> faults;
  const auto plant = [&](Status status, Index place, double value, bool whole, auto&& change) {
    faults.push_back({status, place, value, whole, good});
    change(faults.back().c);
  };
  const Index entries = good.table() * good.S, pairs = good.table();
  plant(Status::kDiscount, 0, 1.0, false, [](auto& c) { c.discount[2] = 1.0; });
  plant(Status::kDiscount, 0, nan, false, [&](auto& c) { c.discount[2] = nan; });
  plant(Status::kTemperature, 0, 0.0, false, [](auto& c) { c.temperature[2] = 0.0; });
  plant(Status::kTemperature, 0, INFINITY, false, [](auto& c) { c.temperature[2] = INFINITY; });
  plant(Status::kNonFiniteReward, 5, INFINITY, false,
        [&](auto& c) { c.reward[2 * pairs + 5] = INFINITY; });
  plant(Status::kNonFiniteReward, 5, nan, false, [&](auto& c) {
    c.reward[2 * pairs + 5] = c.reward[2 * pairs + 9] = static_cast<Real>(nan);
  });
  plant(Status::kReference, 4, nan, false, [&](auto& c) {
    c.log_reference.assign(c.reward.size(), 0.0);
    c.log_reference[2 * pairs + 4] = nan;
    for (int a = 0; a < 3; ++a) c.log_reference[2 * pairs + 9 + a] = -INFINITY;
  });
  plant(Status::kNoAction, 3, 0.0, false, [&](auto& c) {
    c.log_reference.assign(c.reward.size(), 0.0);
    for (int a = 0; a < 3; ++a) c.log_reference[2 * pairs + 9 + a] = -INFINITY;
  });
  // An entry that is none is told before a state without an action, wherever it stands.
  plant(Status::kReference, 17, INFINITY, false, [&](auto& c) {
    c.log_reference.assign(c.reward.size(), 0.0);
    for (int a = 0; a < 3; ++a) c.log_reference[2 * pairs + 9 + a] = -INFINITY;
    c.log_reference[2 * pairs + 17] = INFINITY;
  });
  plant(Status::kNonFiniteProbability, 41, INFINITY, true, [&](auto& c) {
    c.transition[entries + 41] = INFINITY;
    c.transition[entries + 2] = -1;
  });
  plant(Status::kNegativeProbability, 2, -1.0, true, [&](auto& c) {
    c.transition[entries + 2] = -1;
    c.transition[entries + 60] = 5;
  });
  plant(Status::kRowSum, 10, 5.0, true, [&](auto& c) {
    for (int t = 0; t < 6; ++t) c.transition[entries + 60 + t] = t == 1 ? 5 : 0;
  });
  for (const Fault& fault : faults) {
    const Solution<Real> found = solve(shared_rows(fault.c), fault.c);
    expect(same_bits(found, solve(shared_rows(fault.c), fault.c, options(), kOtherRuns[2])),
           "invalid: order");
    expect(same_bits(found, solve(global_rows(fault.c), fault.c)), "invalid: not its twin");
    const std::string what = "status " + std::to_string(static_cast<Index>(fault.status));
    for (Index item = 0; item < good.items(); ++item) {
      const bool bad = item == 2 || (fault.whole && item == 3);
      const Index status = found.status[item];
      if (!bad) {
        expect(status == 0, what + ": a neighbour fails");
        if (!fault.c.log_reference.empty()) continue;
        expect(std::memcmp(&found.value[item * 6], &wanted.value[item * 6], 48) == 0,
               what + ": a neighbour changes");
        continue;
      }
      expect(status == static_cast<Index>(fault.status), what + " is " + std::to_string(status));
      expect(found.row(item)[3] == static_cast<double>(fault.place),
             what + " place " + std::to_string(found.row(item)[3]));
      const double value = found.row(item)[4];
      expect(value == fault.value || (std::isnan(value) && std::isnan(fault.value)),
             what + " value " + std::to_string(value));
      for (int s = 0; s < 6; ++s) expect(std::isnan(found.value[item * 6 + s]), what + " value");
      for (Index row = item * pairs; row < (item + 1) * pairs; ++row)
        expect(std::isnan(found.q[row]) && std::isnan(found.policy[row]), what + " tables");
    }
  }

  Case<Real> ending = good;  // a row of zeros ends the process, or is a row sum of zero
  for (int t = 0; t < 6; ++t) ending.transition[t] = 0;
  const SolveOptions strict = options(0, 0.0, 0, Rigour::kStochastic);
  expect(solve(shared_rows(ending), ending).status[0] == 0, "an ending row is allowed");
  const Solution<Real> refused = solve(shared_rows(ending), ending, strict);
  expect(refused.status[0] == static_cast<Index>(Status::kRowSum), "or not");
  expect(refused.row(0)[4] == 0.0, "with a sum of zero");
  const SolveOptions off = options(0, 0.0, 0, Rigour::kOff);
  expect(solve(shared_rows(ending), ending, off).status[0] == 0, "no check of the tables at all");
  Case<Real> growing = ending;
  growing.discount[0] = 1.5;
  expect(
      solve(shared_rows(growing), growing, off).status[0] == static_cast<Index>(Status::kDiscount),
      "but of the discount");
}

void overflow() {
  Case<double> c = make_case<double>(4, 2, {}, 5);
  c.discount[0] = 0.999;
  for (double& reward : c.reward) reward = 1e308;
  c.reward[0] = -1e308;
  expect(solve(shared_rows(c), c).status[0] == static_cast<Index>(Status::kNonFinite), "overflow");
  Case<float> narrow = make_case<float>(4, 2, {}, 5);
  narrow.discount[0] = 0.99;
  for (float& reward : narrow.reward) reward = 1e37f;
  expect(solve(shared_rows(narrow), narrow).status[0] == static_cast<Index>(Status::kNonFinite),
         "a value beyond single precision");
}

void nothing() {
  Case<double> c = make_case<double>(4, 2, {}, 5);
  c.N = 0;
  const Solution<double> found = solve(shared_rows(c), c);
  expect(found.value.empty(), "a batch of none");
}

}  // namespace
}  // namespace test

int main() {
  using namespace test;
  sizes<double>();
  sizes<float>();
  hard<double>();
  hard<float>();
  registers<double>();
  registers<float>();
  methods();
  endings();
  invalid<double>();
  invalid<float>();
  overflow();
  nothing();
  return summary("solve");
}
