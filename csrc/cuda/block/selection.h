// Which kernel solves which shape, and with what memory: decided here and nowhere else. docs/gpu.md
// shows the table with its bytes and floors.
#pragma once

#include "core/request.h"
#include "cuda/layer/layer.h"

namespace birl::device {

// What a choice depends on besides the shape.
struct DeviceLimits {
  std::size_t chip;  // bytes of shared memory a block can have
  int processors;
};

// Where the rows of P live while their problem is solved.
enum class Residence { kRegisters, kShared, kGlobal, kCsr };

// Lanes of a warp hold kRows rows of up to kStates entries: the sizes that are compiled.
struct RegisterTile {
  int states, rows;
};
constexpr int kRegisterTileCount = 4;
constexpr RegisterTile kRegisterTiles[kRegisterTileCount] = {{8, 2}, {8, 4}, {16, 2}, {16, 3}};

struct Plan {
  Residence residence = Residence::kGlobal;
  int tile = 0;                                      // of kRegisterTiles
  bool direct = false;                               // room for an S² elimination
  bool spill_matrix = false, spill_vectors = false;  // in the workspace instead of on chip
};

// A block has so many threads for n rows or states: whole warps.
inline unsigned block_threads(Index n, unsigned most) {
  const Index whole = (n + 31) / 32 * 32;
  return whole < static_cast<Index>(most) ? static_cast<unsigned>(whole) : most;
}

// Blocks in flight: one per item where nothing spills, else as many as fill the device and find
// room in kWorkspaceLimit bytes.
constexpr std::size_t kWorkspaceLimit = std::size_t{1} << 29;
inline unsigned block_count(Index items, const Bytes& bytes, const DeviceLimits& limits) {
  Index most = Index{1} << 30;
  if (bytes.spill > 0) {
    const Index room = static_cast<Index>(kWorkspaceLimit / bytes.spill);
    most = 4 * static_cast<Index>(limits.processors);
    most = room < most ? room : most;
    most = most < 1 ? 1 : most;
  }
  return static_cast<unsigned>(items < most ? items : most);
}

// Rows of P, right-hand sides: what the kernels count with int. Offsets are 64 bits wide.
constexpr Index kMostRows = 0x7fffffff;

inline bool indexable(const Batch& batch) {
  return batch.states >= 1 && batch.actions >= 1 && batch.states <= kMostRows / batch.actions;
}

// Whether a team of at most one block per problem is a good way to solve a batch. A lone large
// problem keeps one multiprocessor busy and leaves the others idle: cuda/grid/dispatch.h.
constexpr Index kLargestAlone = 512, kManyProblems = 32;
inline bool worthwhile(const Batch& batch) {
  return batch.states <= kLargestAlone ||
         (batch.states <= kDirectLimit && batch.total() >= kManyProblems);
}

// Blocks: P on chip if all of the kernel's memory fits there, else as much as fits without P.
// `footprint_of(plan)` says what the kernel would need.
template <class FootprintOf>
Plan choose_block_plan(const Batch& batch, const DeviceLimits& limits, FootprintOf&& footprint_of) {
  const auto fits = [&](const Plan& plan) { return footprint_of(plan).chip <= limits.chip; };
  const Plan shared{Residence::kShared, 0, true, false, false};
  const bool small = batch.states * batch.actions <= static_cast<Index>(limits.chip);
  if (!batch.sparse() && small && fits(shared)) return shared;
  Plan plan{batch.sparse() ? Residence::kCsr : Residence::kGlobal, 0, batch.states <= kDirectLimit,
            false, false};
  if (!fits(plan)) plan.spill_matrix = true;
  if (!fits(plan)) plan.spill_vectors = true;
  return plan;
}

// The same with warps where the rows of P fit in their registers.
template <class FootprintOf>
Plan choose_plan(const Batch& batch, const DeviceLimits& limits, FootprintOf&& footprint_of) {
  if (!batch.sparse())
    for (int tile = 0; tile < kRegisterTileCount; ++tile)
      if (batch.states <= kRegisterTiles[tile].states &&
          batch.states * batch.actions <= 32 * kRegisterTiles[tile].rows)
        return {Residence::kRegisters, tile, true, false, false};
  return choose_block_plan(batch, limits, footprint_of);
}

}  // namespace birl::device
