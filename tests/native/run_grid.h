// Calling the kernels of the grid on the host.
#pragma once

#include <map>

#include "cuda/grid/dispatch.h"
#include "cuda/layer/host_grid_team.h"
#include "run_solve.h"

namespace test {

using birl::GridPattern;

// The pattern of P_π, or of its transpose, as ops/backends/cuda.py sorts it on the device.
struct HostPattern {
  std::vector<Index> crow, slot;
  std::vector<std::int32_t> col;

  template <class Real>
  explicit HostPattern(const Case<Real>& c, bool transpose = false) {
    std::map<std::pair<Index, Index>, Index> entries;
    std::vector<std::pair<Index, Index>> places;
    for (Index row = 0; row < c.table(); ++row)
      for (Index k = c.crow[row]; k < c.crow[row + 1]; ++k) {
        places.emplace_back(row / c.A, c.col[k]);
        if (transpose) std::swap(places.back().first, places.back().second);
        entries[places.back()];
      }
    crow.assign(c.S + 1, 0);
    for (auto& [place, number] : entries) {
      number = static_cast<Index>(col.size());
      col.push_back(static_cast<std::int32_t>(place.second));
      for (Index s = place.first + 1; s <= c.S; ++s) ++crow[s];
    }
    for (const auto& place : places) slot.push_back(entries[place]);
  }

  GridPattern view() const {
    return {crow.data(), col.data(), slot.data(), static_cast<Index>(col.size())};
  }
};

// body(kernel) with the kernel for a dense case, or given a pattern for a sparse one.
template <class Real, class Body>
auto with_kernel(const Case<Real>& c, const HostPattern* pattern, Solution<Real>& out,
                 const SolveOptions& how, const double* initial, Body&& body) {
  return with_grid_solve(device_batch(c, pattern), request_of(out, how, initial),
                         pattern ? pattern->view() : GridPattern{}, body);
}

template <class Real>
Solution<Real> solve_grid(const Case<Real>& c, const HostPattern* pattern = nullptr,
                          const SolveOptions& how = options(), const GridRun& run = {},
                          const double* initial = nullptr) {
  Solution<Real> out(c);
  with_kernel(c, pattern, out, how, initial, [&](const auto& kernel) {
    run_grid_serial(kernel, c.items(), run);
    return 0;
  });
  const birl::Kernel name = pattern ? birl::Kernel::kCudaGridCsr : birl::Kernel::kCudaGrid;
  for (Index item = 0; item < c.items(); ++item)
    expect(out.row(item)[birl::kInfo - 1] == static_cast<double>(name), "a kernel's name");
  return out;
}

}  // namespace test
