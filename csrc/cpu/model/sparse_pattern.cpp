#include "cpu/model/sparse_pattern.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace birl {
namespace {

constexpr Index kStates = 4096;  // of one task
constexpr double kCost = 8.0;    // operations per entry, roughly

// What one thread needs to merge rows: where a column was last seen.
struct Merger {
  std::vector<Index> seen;
  std::vector<std::int32_t> merged;
  Index base = 0;

  explicit Merger(Index states) : seen(states, -1) {}

  // The different columns among [begin, end), ascending, in `merged`.
  void merge(const Index* begin, const Index* end) {
    base += static_cast<Index>(merged.size());
    merged.clear();
    for (const Index* col = begin; col < end; ++col)
      if (seen[*col] < base) {
        seen[*col] = base;
        merged.push_back(static_cast<std::int32_t>(*col));
      }
    std::sort(merged.begin(), merged.end());
    for (std::size_t i = 0; i < merged.size(); ++i) seen[merged[i]] = base + static_cast<Index>(i);
  }
  std::uint32_t slot(Index col) const { return static_cast<std::uint32_t>(seen[col] - base); }
};

bool actions_alike(const Index* crow, const Index* col, Index actions) {
  const Index width = crow[1] - crow[0];
  for (Index a = 1; a < actions; ++a)
    if (crow[a + 1] - crow[a] != width || !std::equal(col + crow[0], col + crow[1], col + crow[a]))
      return false;
  return true;
}

}  // namespace

Index longest_row(const Index* crow, Index rows) {
  Index longest = 0;
  for (Index row = 0; row < rows; ++row) longest = std::max(longest, crow[row + 1] - crow[row]);
  return longest;
}

const char* csr_defect(const Index* crow, const Index* col, Index nnz, Index rows, Index cols) {
  if (crow[0] != 0) return "crow does not start at 0";
  for (Index row = 0; row < rows; ++row)
    if (crow[row + 1] < crow[row]) return "crow decreases";
  if (crow[rows] != nnz) return "crow does not end at the number of entries";
  for (Index k = 0; k < nnz; ++k)
    if (col[k] < 0 || col[k] >= cols) return "a column lies outside [0, S)";
  return nullptr;
}

// ---- SlicedLayout -------------------------------------------------------------------------------

SlicedLayout::SlicedLayout(Index rows, const Index* crow, const std::int32_t* col, Team& team)
    : rows_(rows), start_((rows + kSlice - 1) / kSlice + 1), ragged_(start_.size() - 1) {
  Index groups = 0;
  for (Index slice = 0; slice < slices(); ++slice) {
    const Index row0 = slice * kSlice, row1 = std::min(rows, row0 + kSlice);
    Index abreast = 0, apart = 0;  // groups if the rows stand side by side, or one by one
    for (Index row = row0; row < row1; ++row) {
      const Index length = crow[row + 1] - crow[row];
      abreast = std::max(abreast, length);
      apart += (length + kSlice - 1) / kSlice;
    }
    start_[slice] = groups;
    ragged_[slice] = -1;
    if (4 * abreast <= 5 * apart) {
      groups += abreast;
      continue;
    }
    ragged_[slice] = static_cast<std::int32_t>(ends_.size() / kSlice);
    for (Index row = row0; row < row0 + kSlice; ++row) {
      if (row < row1) groups += (crow[row + 1] - crow[row] + kSlice - 1) / kSlice;
      ends_.push_back(groups);
    }
  }
  start_[slices()] = groups;
  first_.reset(new std::int32_t[groups]);
  col_.reset(new std::int32_t[groups * kSlice]);
  constexpr Index kSlices = kStates / kSlice;
  team.run((slices() + kSlices - 1) / kSlices, kCost * static_cast<double>(entries()),
           [&](Index task, int) {
             for (Index i = task * kSlices; i < std::min(slices(), (task + 1) * kSlices); ++i)
               fill(i, crow, col);
           });
}

void SlicedLayout::fill(Index slice, const Index* crow, const std::int32_t* col) {
  std::fill(col_.get() + start_[slice] * kSlice, col_.get() + start_[slice + 1] * kSlice, -1);
  for (Index row = slice * kSlice; row < std::min(rows_, (slice + 1) * kSlice); ++row)
    for (Index k = crow[row]; k < crow[row + 1]; ++k) col_[place(row, k - crow[row])] = col[k];
  // A filling entry takes the column that completes the run, where there is one.
  for (Index group = start_[slice]; group < start_[slice + 1]; ++group) {
    std::int32_t* const own = col_.get() + group * kSlice;
    const Index known =
        std::find_if(own, own + kSlice, [](std::int32_t c) { return c >= 0; }) - own;
    const Index first = known < kSlice ? own[known] - known : 0;
    bool run = first >= 0 && first + kSlice <= rows_;
    for (Index i = 0; i < kSlice; ++i) run = run && (own[i] < 0 || own[i] == first + i);
    first_[group] = run ? static_cast<std::int32_t>(first) : -1;
    for (Index i = 0; i < kSlice; ++i)
      if (own[i] < 0) own[i] = run ? static_cast<std::int32_t>(first + i) : 0;
  }
}

Index SlicedLayout::place(Index row, Index index) const {
  const Index slice = row / kSlice, at = row % kSlice;
  if (ragged_[slice] < 0) return (start_[slice] + index) * kSlice + at;
  return (at == 0 ? start_[slice] : ends_[ragged_[slice] * kSlice + at - 1]) * kSlice + index;
}

// ---- PolicyPattern ------------------------------------------------------------------------------

PolicyPattern::PolicyPattern(const Index* crow, const Index* col, Index states, Index actions,
                             bool transpose, Team& team)
    : states_(states),
      actions_(actions),
      transposed_(transpose),
      crow_(crow),
      merged_crow_(states + 1, 0),
      slot_(new std::uint32_t[crow[states * actions]]),
      alike_(new unsigned char[states]) {
  if (states > std::numeric_limits<std::int32_t>::max())
    throw std::length_error("a sparse transition has at most 2147483647 states");
  merge(col, team);
  lay_out(team);
  rows_ = {actions_,    crow_,        merged_crow_.data(), col_.get(),
           slot_.get(), alike_.get(), place_.get()};
}

void PolicyPattern::merge(const Index* col, Team& team) {
  const Index tasks = (states_ + kStates - 1) / kStates;
  std::vector<std::vector<std::int32_t>> found(tasks);
  std::vector<std::unique_ptr<Merger>> mergers(team.size());
  team.run(tasks, kCost * static_cast<double>(crow_[states_ * actions_]), [&](Index t, int worker) {
    if (!mergers[worker]) mergers[worker] = std::make_unique<Merger>(states_);
    Merger& merger = *mergers[worker];
    for (Index s = t * kStates; s < std::min(states_, (t + 1) * kStates); ++s) {
      const Index* const crow = crow_ + s * actions_;
      alike_[s] = actions_alike(crow, col, actions_);
      const Index begin = crow[0], end = crow[alike_[s] ? 1 : actions_];
      merger.merge(col + begin, col + end);
      for (Index k = begin; k < end; ++k) slot_[k] = merger.slot(col[k]);
      merged_crow_[s + 1] = static_cast<Index>(merger.merged.size());
      found[t].insert(found[t].end(), merger.merged.begin(), merger.merged.end());
    }
  });
  for (Index s = 0; s < states_; ++s) merged_crow_[s + 1] += merged_crow_[s];
  col_.reset(new std::int32_t[count()]);
  for (Index t = 0; t < tasks; ++t)
    std::copy(found[t].begin(), found[t].end(), col_.get() + merged_crow_[t * kStates]);
}

void PolicyPattern::lay_out(Team& team) {
  place_.reset(new Index[count()]);
  if (!transposed_) {
    layout_ = std::make_unique<SlicedLayout>(states_, merged_crow_.data(), col_.get(), team);
    for (Index s = 0; s < states_; ++s)
      for (Index k = merged_crow_[s]; k < merged_crow_[s + 1]; ++k)
        place_[k] = layout_->place(s, k - merged_crow_[s]);
    return;
  }
  std::vector<Index> crow(states_ + 1, 0);
  for (Index k = 0; k < count(); ++k) ++crow[col_[k] + 1];
  for (Index t = 0; t < states_; ++t) crow[t + 1] += crow[t];
  std::vector<Index> next(crow.begin(), crow.end() - 1);
  std::unique_ptr<std::int32_t[]> from(new std::int32_t[count()]);
  for (Index s = 0; s < states_; ++s)
    for (Index k = merged_crow_[s]; k < merged_crow_[s + 1]; ++k) {
      place_[k] = next[col_[k]]++ - crow[col_[k]];  // in its row, for the time being
      from[crow[col_[k]] + place_[k]] = static_cast<std::int32_t>(s);
    }
  layout_ = std::make_unique<SlicedLayout>(states_, crow.data(), from.get(), team);
  for (Index k = 0; k < count(); ++k) place_[k] = layout_->place(col_[k], place_[k]);
}

}  // namespace birl
