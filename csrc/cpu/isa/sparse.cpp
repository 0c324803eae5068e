#include "cpu/isa/isa.h"
#include "cpu/isa/simd.h"

namespace birl::BIRL_ISA {
namespace {

constexpr Index kSlice = 8;
typedef Row<8> Group;

// Σ over groups [g0, g1) of value · x[col], entry by entry.
BIRL_INLINE Group products_of(const SlicedMatrix& m, Index g0, Index g1, const double* x) {
  Group acc = Group::zero();
  for (Index g = g0; g < g1; ++g) {
    const auto value = Group::load(m.value + g * kSlice);
    const std::int32_t first = m.first[g];
    const auto at = first >= 0 ? Group::load(x + first) : gather(x, m.col + g * kSlice);
    for (int i = 0; i < Group::kCount; ++i) acc.part[i] += value.part[i] * at.part[i];
  }
  return acc;
}

inline Index row_begin(const SlicedMatrix& m, Index slice, const Index* ends, Index i) {
  return i == 0 ? m.start[slice] : ends[i - 1];
}

void multiply_one(const SlicedMatrix& m, Index slice0, Index slice1, const double* x, double* y) {
  for (Index slice = slice0; slice < slice1; ++slice) {
    const Index row = slice * kSlice, left = m.rows - row < kSlice ? m.rows - row : kSlice;
    double sum[kSlice];
    if (m.ragged[slice] < 0) {
      const Group acc = products_of(m, m.start[slice], m.start[slice + 1], x);
      if (left == kSlice) {
        acc.save(y + row);
        continue;
      }
      acc.save(sum);
    } else {
      const Index* const ends = m.ends + m.ragged[slice] * kSlice;
      for (Index i = 0; i < left; ++i) {
        double part[kSlice];
        products_of(m, row_begin(m, slice, ends, i), ends[i], x).save(part);
        sum[i] = ((part[0] + part[4]) + (part[2] + part[6])) +
                 ((part[1] + part[5]) + (part[3] + part[7]));
      }
    }
    for (Index i = 0; i < left; ++i) y[row + i] = sum[i];
  }
}

template <int Columns>
void multiply(const SlicedMatrix& m, Index slice0, Index slice1, const double* x, double* y) {
  for (Index slice = slice0; slice < slice1; ++slice) {
    const Index row = slice * kSlice, left = m.rows - row < kSlice ? m.rows - row : kSlice;
    if (m.ragged[slice] < 0) {
      Row<Columns> acc[kSlice];
      for (auto& each : acc) each = Row<Columns>::zero();
      for (Index k = m.start[slice] * kSlice; k < m.start[slice + 1] * kSlice; k += kSlice)
#pragma GCC unroll 8
        for (int i = 0; i < kSlice; ++i)
          acc[i].add(m.value[k + i], Row<Columns>::load(x + Index{m.col[k + i]} * Columns));
      for (Index i = 0; i < left; ++i) acc[i].save(y + (row + i) * Columns);
    } else {
      const Index* const ends = m.ends + m.ragged[slice] * kSlice;
      for (Index i = 0; i < left; ++i) {
        Row<Columns> acc[2] = {Row<Columns>::zero(), Row<Columns>::zero()};
        const Index end = ends[i] * kSlice;
        for (Index k = row_begin(m, slice, ends, i) * kSlice; k < end; k += 2)
          for (int odd = 0; odd < 2; ++odd)
            acc[odd].add(m.value[k + odd], Row<Columns>::load(x + Index{m.col[k + odd]} * Columns));
        acc[0].add(1.0, acc[1]);
        acc[0].save(y + (row + i) * Columns);
      }
    }
  }
}

// ---- rows of P ----------------------------------------------------------------------------------

constexpr Index kRoom = 256;  // entries of a row of P_π that are kept aside
constexpr Index kInOrder = 8;

// Σ_k value[k] x[k] with x[k] = at(k): in order if there are few, else in four interleaved sums.
template <class Real, class At>
BIRL_INLINE double row_product(const Real* value, Index count, At&& at) {
  double total = 0.0;
  Index k = 0;
  if (count > kInOrder) {
    double part[4] = {0.0, 0.0, 0.0, 0.0};
    for (; k + 4 <= count; k += 4)
      for (int i = 0; i < 4; ++i) part[i] += static_cast<double>(value[k + i]) * at(k + i);
    total = (part[0] + part[1]) + (part[2] + part[3]);
  }
  for (; k < count; ++k) total += static_cast<double>(value[k]) * at(k);
  return total;
}

// A state whose actions are alike: `Width` entries each, or `width` where that is not known before.
// `near` is x at the successors.
template <int Width, class Real>
BIRL_INLINE void alike_products(const Real* p, Index actions, Index width, const std::int32_t* col,
                                const std::uint32_t* slot, const double* x, double* y) {
  const Index count = Width > 0 ? Width : width;
  double near[Width > 0 ? Width : kRoom];
#pragma GCC unroll 8
  for (Index k = 0; k < count; ++k) near[k] = x[col[slot[k]]];
  for (Index a = 0; a < actions; ++a, p += count)
    y[a] = row_product(p, count, [&](Index k) { return near[k]; });
}

template <int Width, class Real>
BIRL_INLINE void alike_row(const Real* p, Index actions, Index width, const std::uint32_t* slot,
                           Index merged, const double* weight, const Index* place, double* out) {
  const Index count = Width > 0 ? Width : width;
  double sum[Width > 0 ? Width : kRoom];
#pragma GCC unroll 8
  for (Index k = 0; k < count; ++k) sum[k] = 0.0;
  for (Index a = 0; a < actions; ++a, p += count)
#pragma GCC unroll 8
    for (Index k = 0; k < count; ++k) sum[k] += weight[a] * static_cast<double>(p[k]);
  if (merged == count) {  // every successor once
    for (Index k = 0; k < count; ++k) out[place[slot[k]]] = sum[k];
    return;
  }
  for (Index i = 0; i < merged; ++i) out[place[i]] = 0.0;
  for (Index k = 0; k < count; ++k) out[place[slot[k]]] += sum[k];
}

template <class Real>
void products(const PolicyRows& rows, const Real* value, Index s0, Index s1, const double* x,
              double* y) {
  const Index A = rows.actions;
  for (Index s = s0; s < s1; ++s, y += A) {
    const Index* const crow = rows.crow + s * A;
    const std::int32_t* const col = rows.col + rows.merged_crow[s];
    const std::uint32_t* const slot = rows.slot + crow[0];
    const Index width = crow[1] - crow[0];
    if (rows.alike[s] && width <= kRoom) {
      with_constant<8>(width, [&](auto known) {
        alike_products<decltype(known)::value>(value + crow[0], A, width, col, slot, x, y);
      });
      continue;
    }
    for (Index a = 0; a < A; ++a) {
      const std::uint32_t* const own = slot + (rows.alike[s] ? 0 : crow[a] - crow[0]);
      y[a] = row_product(value + crow[a], crow[a + 1] - crow[a],
                         [&](Index k) { return x[col[own[k]]]; });
    }
  }
}

template <class Real>
void form(const PolicyRows& rows, const Real* value, Index s0, Index s1, const double* weight,
          double* out) {
  const Index A = rows.actions;
  for (Index s = s0; s < s1; ++s) {
    const Index* const crow = rows.crow + s * A;
    const Index* const place = rows.place + rows.merged_crow[s];
    const Index merged = rows.merged_crow[s + 1] - rows.merged_crow[s];
    const std::uint32_t* const slot = rows.slot + crow[0];
    const Index width = crow[1] - crow[0];
    const double* const w = weight + s * A;
    if (rows.alike[s] && width <= kRoom) {
      with_constant<8>(width, [&](auto known) {
        alike_row<decltype(known)::value>(value + crow[0], A, width, slot, merged, w, place, out);
      });
      continue;
    }
    for (Index i = 0; i < merged; ++i) out[place[i]] = 0.0;
    for (Index a = 0; a < A; ++a) {
      const std::uint32_t* const own = slot + (rows.alike[s] ? 0 : crow[a] - crow[0]);
      const Real* const p = value + crow[a];
      for (Index k = 0; k < crow[a + 1] - crow[a]; ++k)
        out[place[own[k]]] += w[a] * static_cast<double>(p[k]);
    }
  }
}

}  // namespace

const SparseRoutines kSparse = {{{products<float>, form<float>}, {products<double>, form<double>}},
                                multiply_one,
                                multiply<4>,
                                multiply<8>};

}  // namespace birl::BIRL_ISA
