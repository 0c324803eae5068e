// Memory runs out at the k-th request, for every k: the call ends in std::bad_alloc, without a leak
// (the sanitizers look), a crash or a hang, and the next one gives the right bits.
#include <atomic>
#include <cstdlib>
#include <new>

#include "cpu.h"

namespace {

std::atomic<long> requests{0};
std::atomic<long> fatal{0};  // the request that fails; 0 is none

void* allocate(std::size_t size, std::align_val_t alignment = std::align_val_t{16}) {
  if (++requests == fatal) throw std::bad_alloc();
  const auto unit = static_cast<std::size_t>(alignment);
  if (void* const place = std::aligned_alloc(unit, (size + unit - 1) / unit * unit)) return place;
  throw std::bad_alloc();
}

}  // namespace

void* operator new(std::size_t size) { return allocate(size); }
void* operator new[](std::size_t size) { return allocate(size); }
void* operator new(std::size_t size, std::align_val_t unit) { return allocate(size, unit); }
void operator delete(void* place) noexcept { std::free(place); }
void operator delete[](void* place) noexcept { std::free(place); }
void operator delete(void* place, std::size_t) noexcept { std::free(place); }
void operator delete[](void* place, std::size_t) noexcept { std::free(place); }
void operator delete(void* place, std::align_val_t) noexcept { std::free(place); }
void operator delete(void* place, std::size_t, std::align_val_t) noexcept { std::free(place); }

namespace test {
namespace {

// `call(out)` fails at every request in turn; `bits(out)` is what it computes.
template <class Out, class Call, class Bits>
void every_request(const std::string& name, const Out& blank, Call&& call, Bits&& bits_of_out) {
  Out right = blank;
  call(right);
  const Bytes wanted = bits_of_out(right);
  long failed = 0;
  for (long k = 1;; ++k) {
    Out out = blank;
    requests = 0;
    fatal = k;
    bool completed = false;
    try {
      call(out);
      completed = true;
    } catch (const std::bad_alloc&) {
      ++failed;
    }
    const bool reached = requests >= k;
    fatal = 0;
    // A request that no caller sees fail, such as that of one thread more, changes nothing.
    if (completed && !expect(bits_of_out(out) == wanted, name + " completes with other bits"))
      return;
    if (!completed) {
      Out next = blank;
      call(next);
      if (!expect(bits_of_out(next) == wanted, name + " remembers a failure")) return;
    }
    if (!reached) break;
  }
  expect(failed > 0, name + " requests no memory: nothing was tried");
  std::printf("%s: %ld requests failed\n", name.c_str(), failed);
}

template <class Real>
void every_call(const Case<Real>& c, bool sparse) {
  for (const int threads : {1, 3}) {
    const std::string where =
        (sparse ? " csr " : " dense ") + c.name + " on " + std::to_string(threads);
    const auto bits_of = [](const auto& out) { return bits(out); };
    Solution<Real> at(c);
    every_request(
        "solve" + where, at, [&](auto& out) { solve(c, sparse, 0, threads, out); }, bits_of);
    solve(c, sparse, 0, threads, at);
    every_request(
        "vjp" + where, Cotangents<Real>(c, sparse),
        [&](auto& out) { solve_vjp(c, sparse, at, threads, out); }, bits_of);
    every_request(
        "sweep" + where, Solution<Real>(c),
        [&](auto& out) { sweep(c, sparse, at.value, threads, out); }, bits_of);
    for (const bool transpose : {false, true})
      every_request(
          "policy_solve" + where, systems_of(c, at),
          [&](auto& out) { policy_solve(c, sparse, transpose, threads, out); },
          [](const auto& out) { return bytes_of(out.x, out.residual); });
  }
}

}  // namespace
}  // namespace test

int main() {
  test::Traits small, slow, one;
  small.N = 4;
  small.G = 10;
  slow.discount = 0.9999;  // Newton's method
  slow.N = 9;
  one.discount = 0.95;
  test::every_call(test::make_case<float>(17, 3, small, 1), false);
  test::every_call(test::make_case<double>(20, 2, slow, 2), false);
  test::every_call(test::make_case<float>(160, 4, one, 3), false);
  test::every_call(test::make_case<double>(160, 4, one, 4), true);
  return test::summary("test_allocations");
}
