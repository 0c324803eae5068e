// Which kernel a shape gets on which device, and that it fits there.
#include "check.h"
#include "cuda/block/dispatch.h"

namespace test {
namespace {

using namespace birl::device;
using birl::Batch;
using birl::Index;
using birl::kDirectLimit;

constexpr std::size_t kStatic = 4096;
struct Device {
  const char* name;
  DeviceLimits limits;
};
const Device kDevices[] = {{"7.5", {64 * 1024 - kStatic, 40}},
                           {"8.0", {163 * 1024 - kStatic, 108}},
                           {"8.6", {99 * 1024 - kStatic, 84}},
                           {"9.0", {227 * 1024 - kStatic, 132}}};

Batch batch_of(Index N, Index S, Index A, bool is_double = false, bool sparse = false) {
  static const Index crow[1] = {0};
  Batch batch{};
  batch.is_double = is_double;
  batch.transitions = N;
  batch.problems = 1;
  batch.states = S;
  batch.actions = A;
  batch.crow = sparse ? crow : nullptr;
  return batch;
}

Residence residence(const Batch& batch, const DeviceLimits& limits) {
  return with_solve(batch, {}, limits, [](const auto& kernel, const auto&) {
    const Residence found = kernel.plan.residence;
    const birl::Kernel name = found == Residence::kRegisters ? birl::Kernel::kCudaWarp
                              : found == Residence::kCsr     ? birl::Kernel::kCudaCsr
                                                             : birl::Kernel::kCudaBlock;
    expect(kernel.home.kName == name, "a kernel's name");
    return found;
  });
}

// Largest S with eight actions whose P is held on chip, as docs/gpu.md has it.
Index largest_shared(const DeviceLimits& limits) {
  Index S = 17;
  while (residence(batch_of(1, S + 1, 8), limits) == Residence::kShared) ++S;
  return S;
}

void table() {
  const Index largest[] = {36, 60, 46, 72};
  for (int i = 0; i < 4; ++i) {
    const auto& [name, limits] = kDevices[i];
    const std::string where = std::string(" on ") + name;
    const auto is = [&](Index S, Index A, Residence wanted) {
      expect(residence(batch_of(1, S, A), limits) == wanted,
             std::to_string(S) + "x" + std::to_string(A) + where);
    };
    is(1, 1, Residence::kRegisters);
    is(8, 16, Residence::kRegisters);
    is(8, 17, Residence::kShared);
    is(16, 4, Residence::kRegisters);
    is(16, 6, Residence::kRegisters);
    is(16, 7, Residence::kShared);
    is(17, 1, Residence::kShared);
    is(32, 8, Residence::kShared);
    is(500, 8, Residence::kGlobal);
    is(100000, 1000, Residence::kGlobal);
    expect(residence(batch_of(1, 5, 2, false, true), limits) == Residence::kCsr, "csr" + where);
    expect(largest_shared(limits) == largest[i],
           "largest S" + where + " is " + std::to_string(largest_shared(limits)));
  }
}

void everything_fits() {
  for (const auto& [name, limits] : kDevices)
    for (const Index S : {1, 16, 17, 40, 64, 100, 128, 129, 500, 2500, 2501, 5000, 100000})
      for (const Index A : {1, 8, 64})
        for (const int kind : {0, 1, 2, 3}) {
          const Batch batch = batch_of(1000000, S, A, kind & 1, kind & 2);
          const std::string what =
              std::to_string(S) + "x" + std::to_string(A) + " on " + std::string(name);
          const auto fits = [&](const auto&, const auto& config) {
            expect(config.bytes.chip <= limits.chip, what + ": chip");
            expect(config.blocks == 1 || config.workspace() <= kWorkspaceLimit,
                   what + ": workspace");
            expect(config.threads % 32 == 0 && config.threads <= kBlockThreads, what + ": threads");
            return 0;
          };
          with_solve(batch, {}, limits, fits);
          birl::PolicySolve request{};
          request.right_sides = 64;
          if (S <= kDirectLimit) with_policy_solve(batch, request, limits, fits);
        }
}

void worth() {
  expect(worthwhile(batch_of(1, 512, 8)), "one problem on one block");
  expect(!worthwhile(batch_of(1, 513, 8)) && !worthwhile(batch_of(31, 513, 8)), "a few large");
  expect(worthwhile(batch_of(32, 2500, 8)), "many large");
  expect(!worthwhile(batch_of(1000, 2501, 8)), "no room for an elimination");
}

void sizes() {
  expect(indexable(batch_of(1, 1 << 20, 2047)), "the most rows");
  expect(!indexable(batch_of(1, 1 << 20, 2048)), "one state too many");
  expect(block_count(Index{1} << 40, {0, 0}, {}) == 1u << 30, "more items than blocks");
}

}  // namespace
}  // namespace test

int main() {
  using namespace test;
  table();
  everything_fits();
  worth();
  sizes();
  return summary("selection");
}
