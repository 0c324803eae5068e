#include "cpu/isa/isa.h"
#include "cpu/isa/simd.h"

namespace birl::BIRL_ISA {
namespace {

static_assert(kLanes == kColumnLanes);

// body(tag, i, lane) over [0, n): in whole vectors, whose first entry is on `lane`, then one by
// one.
template <class Body>
BIRL_INLINE void each(Index n, Body&& body) {
  Index i = 0;
  for (; i + kLanes <= n; i += kLanes)
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) body(Double{}, i + part * kWidth, part * kWidth);
  for (int lane = 0; i + lane < n; ++lane) body(0.0, i + lane, lane);
}

// The same with `Sums` sums per lane, of what body(tag, i, lane, terms) writes into its terms.
template <int Sums, class Body>
BIRL_INLINE void reduce(Index n, double* out, Body&& body) {
  Double acc[Sums][kParts];
  for (int q = 0; q < Sums; ++q)
    for (int part = 0; part < kParts; ++part) acc[q][part] = Double{};
  Index i = 0;
  for (; i + kLanes <= n; i += kLanes)
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      Double term[Sums];
      body(Double{}, i + part * kWidth, part * kWidth, term);
      for (int q = 0; q < Sums; ++q) acc[q][part] += term[q];
    }
  for (int q = 0; q < Sums; ++q)
    for (int part = 0; part < kParts; ++part) store(out + q * kLanes + part * kWidth, acc[q][part]);
  for (int lane = 0; i + lane < n; ++lane) {
    double term[Sums];
    body(0.0, i + lane, lane, term);
    for (int q = 0; q < Sums; ++q) out[q * kLanes + lane] += term[q];
  }
}

#define BIRL_GET(p) load<decltype(tag)>(p)

void accumulate(Index n, double discount, double* y, double* sum) {
  each(n, [=](auto tag, Index i, int) {
    const auto next = discount * BIRL_GET(y + i);
    store(y + i, next);
    store(sum + i, BIRL_GET(sum + i) + next);
  });
}

// Norms of the vectors that value(tag, i, lane) gives.
template <class Value>
BIRL_INLINE void norms_of(Index n, ColumnNorms* out, Value&& value) {
  Double largest[kParts];
  for (int part = 0; part < kParts; ++part) largest[part] = Double{};
  double tail[kLanes] = {};
  reduce<1>(n, out->sum, [&](auto tag, Index i, int lane, auto* term) {
    const auto size = magnitude(value(tag, i, lane));
    term[0] = size;
    if constexpr (sizeof(tag) == sizeof(double))
      tail[lane] = size;
    else
      largest[lane / kWidth] = size > largest[lane / kWidth] ? size : largest[lane / kWidth];
  });
  for (int part = 0; part < kParts; ++part) store(out->largest + part * kWidth, largest[part]);
  for (int lane = 0; lane < kLanes; ++lane)
    if (tail[lane] > out->largest[lane]) out->largest[lane] = tail[lane];
}

void residual(Index n, const double* b, const double* constant, double discount, const double* x,
              double* r, ColumnNorms* out) {
  norms_of(n, out, [=](auto tag, Index i, int lane) {
    const auto image = BIRL_GET(x + i) - discount * BIRL_GET(r + i);
    const auto rest = (BIRL_GET(b + i) - BIRL_GET(constant + lane)) - image;
    store(r + i, rest);
    return rest;
  });
}

void norms(Index n, const double* x, ColumnNorms* out) {
  norms_of(n, out, [=](auto tag, Index i, int) { return BIRL_GET(x + i); });
}

void defect(Index n, double discount, const double* x, double* y, double* sum) {
  reduce<1>(n, sum, [=](auto tag, Index i, int, auto* term) {
    term[0] = BIRL_GET(x + i) - discount * BIRL_GET(y + i);
    store(y + i, term[0]);
  });
}

void centre(Index n, const double* mean, double* y, const double* u, double* products) {
  reduce<2>(n, products, [=](auto tag, Index i, int lane, auto* term) {
    const auto rest = BIRL_GET(y + i) - BIRL_GET(mean + lane);
    store(y + i, rest);
    term[0] = rest * BIRL_GET(u + i);
    term[1] = rest * rest;
  });
}

void direction(Index n, const double* r, const double* beta, const double* omega, const double* v,
               double* p) {
  each(n, [=](auto tag, Index i, int lane) {
    const auto rest = BIRL_GET(p + i) - BIRL_GET(omega + lane) * BIRL_GET(v + i);
    store(p + i, BIRL_GET(r + i) + BIRL_GET(beta + lane) * rest);
  });
}

void subtract(Index n, const double* r, const double* alpha, const double* v, double* s) {
  each(n, [=](auto tag, Index i, int lane) {
    store(s + i, BIRL_GET(r + i) - BIRL_GET(alpha + lane) * BIRL_GET(v + i));
  });
}

void advance(Index n, const double* alpha, const double* p, const double* omega, const double* s,
             const double* t, double* x, double* r, const double* u, double* products) {
  reduce<2>(n, products, [=](auto tag, Index i, int lane, auto* term) {
    const auto along = BIRL_GET(alpha + lane) * BIRL_GET(p + i);
    store(x + i, BIRL_GET(x + i) + (along + BIRL_GET(omega + lane) * BIRL_GET(s + i)));
    const auto rest = BIRL_GET(s + i) - BIRL_GET(omega + lane) * BIRL_GET(t + i);
    store(r + i, rest);
    term[0] = rest * BIRL_GET(u + i);
    term[1] = rest * rest;
  });
}

void add(Index n, const double* alpha, const double* y, double* x) {
  each(n, [=](auto tag, Index i, int lane) {
    store(x + i, BIRL_GET(x + i) + BIRL_GET(alpha + lane) * BIRL_GET(y + i));
  });
}

void range(Index n, const double* x, double* low, double* high) {
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = __builtin_huge_val();
    high[lane] = -__builtin_huge_val();
  }
  Double least[kParts], most[kParts];
  for (int part = 0; part < kParts; ++part) {
    least[part] = load(low);
    most[part] = load(high);
  }
  each(n, [&](auto tag, Index i, int lane) {
    const auto value = BIRL_GET(x + i);
    if constexpr (sizeof(tag) == sizeof(double)) {
      low[lane] = value;
      high[lane] = value;
    } else {
      Double& a = least[lane / kWidth];
      Double& z = most[lane / kWidth];
      a = value < a ? value : a;
      z = value > z ? value : z;
    }
  });
  for (int lane = 0; lane < kLanes; ++lane) {
    const double a = least[lane / kWidth][lane % kWidth], z = most[lane / kWidth][lane % kWidth];
    if (a < low[lane]) low[lane] = a;
    if (z > high[lane]) high[lane] = z;
  }
}

// ---- dense --------------------------------------------------------------------------------------

template <int Columns, int Rows>
BIRL_INLINE void add_rows(const double* p, Index stride, Index cols, const double* x,
                          Row<Columns> (&acc)[Rows]) {
  for (Index t = 0; t < cols; ++t) {
    const auto column = Row<Columns>::load(x + t * Columns);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) acc[i].add(p[i * stride + t], column);
  }
}

constexpr int kRowsAbreast = 4;

template <int Columns>
void rows(const double* p, Index count, Index cols, const double* x, double* y) {
  Index i = 0;
  for (; i + kRowsAbreast <= count; i += kRowsAbreast) {
    Row<Columns> acc[kRowsAbreast];
    for (auto& row : acc) row = Row<Columns>::zero();
    add_rows<Columns>(p + i * cols, cols, cols, x, acc);
    for (int k = 0; k < kRowsAbreast; ++k) acc[k].save(y + (i + k) * Columns);
  }
  for (; i < count; ++i) {
    Row<Columns> acc[1] = {Row<Columns>::zero()};
    add_rows<Columns>(p + i * cols, cols, cols, x, acc);
    acc[0].save(y + i * Columns);
  }
}

template <int Columns, int Tile>
BIRL_INLINE void tile(const double* p, Index stride, Index count, const double* x, double* y) {
  Row<Columns> acc[Tile];
  for (auto& row : acc) row = Row<Columns>::zero();
  for (Index s = 0; s < count; ++s) {
    const auto row = Row<Columns>::load(x + s * Columns);
#pragma GCC unroll 16
    for (int k = 0; k < Tile; ++k) acc[k].add(p[s * stride + k], row);
  }
  for (int k = 0; k < Tile; ++k) acc[k].save(y + k * Columns);
}

template <int Columns>
void columns(const double* p, Index stride, Index count, Index cols, const double* x, double* y) {
  constexpr int kTile = 8;  // a cache line of each row
  Index t = 0;
  for (; t + kTile <= cols; t += kTile)
    tile<Columns, kTile>(p + t, stride, count, x, y + t * Columns);
  for (; t < cols; ++t) tile<Columns, 1>(p + t, stride, count, x, y + t * Columns);
}

// Rows [i, i + count) of x += L or U times what is known already, then the small triangle.
template <int Columns>
void solve(const double* a, Index n, Index stride, const double* inverse_pivot, double* x) {
  using Numbers = Row<Columns>;
  for (Index i0 = 0; i0 < n; i0 += kRowsAbreast) {
    const Index i1 = i0 + kRowsAbreast < n ? i0 + kRowsAbreast : n;
    if (i1 - i0 == kRowsAbreast) {
      Numbers acc[kRowsAbreast];
      for (int k = 0; k < kRowsAbreast; ++k) acc[k] = Numbers::load(x + (i0 + k) * Columns);
      add_rows<Columns>(a + i0 * stride, stride, i0, x, acc);
      for (int k = 0; k < kRowsAbreast; ++k) acc[k].save(x + (i0 + k) * Columns);
    }
    for (Index i = i0; i < i1; ++i) {
      Numbers acc[1] = {Numbers::load(x + i * Columns)};
      const Index from = i1 - i0 == kRowsAbreast ? i0 : 0;
      add_rows<Columns>(a + i * stride + from, stride, i - from, x + from * Columns, acc);
      acc[0].save(x + i * Columns);
    }
  }
  for (Index i1 = n; i1 > 0; i1 -= i1 < kRowsAbreast ? i1 : kRowsAbreast) {
    const Index i0 = i1 < kRowsAbreast ? 0 : i1 - kRowsAbreast;
    if (i1 - i0 == kRowsAbreast) {
      Numbers acc[kRowsAbreast];
      for (int k = 0; k < kRowsAbreast; ++k) acc[k] = Numbers::load(x + (i0 + k) * Columns);
      add_rows<Columns>(a + i0 * stride + i1, stride, n - i1, x + i1 * Columns, acc);
      for (int k = 0; k < kRowsAbreast; ++k) acc[k].save(x + (i0 + k) * Columns);
    }
    for (Index i = i1 - 1; i >= i0; --i) {
      Numbers acc[1] = {Numbers::load(x + i * Columns)};
      const Index to = i1 - i0 == kRowsAbreast ? i1 : n;
      add_rows<Columns>(a + i * stride + i + 1, stride, to - i - 1, x + (i + 1) * Columns, acc);
      Numbers out = Numbers::zero();
      out.add(inverse_pivot[i], acc[0]);
      out.save(x + i * Columns);
    }
  }
}

// x[t] += Σ_i a[i,t] x[i] for `count` rows i, kept in registers, and columns t in [t0, t1).
template <int Columns, int Rows>
BIRL_INLINE void spread(const double* a, Index stride, Index t0, Index t1, const double* pivots,
                        double* x) {
  Row<Columns> known[Rows];
  for (int k = 0; k < Rows; ++k) known[k] = Row<Columns>::load(pivots + k * Columns);
  for (Index t = t0; t < t1; ++t) {
    auto row = Row<Columns>::load(x + t * Columns);
#pragma GCC unroll 8
    for (int k = 0; k < Rows; ++k) row.add(a[k * stride + t], known[k]);
    row.save(x + t * Columns);
  }
}

template <int Columns>
void solve_transpose(const double* a, Index n, Index stride, const double* inverse_pivot,
                     double* x) {
  using Numbers = Row<Columns>;
  for (Index i0 = 0; i0 < n; i0 += kRowsAbreast) {
    const Index i1 = i0 + kRowsAbreast < n ? i0 + kRowsAbreast : n;
    for (Index i = i0; i < i1; ++i) {
      Numbers scaled = Numbers::zero();
      scaled.add(inverse_pivot[i], Numbers::load(x + i * Columns));
      scaled.save(x + i * Columns);
      spread<Columns, 1>(a + i * stride, stride, i + 1, i1, x + i * Columns, x);
    }
    if (i1 < n) spread<Columns, kRowsAbreast>(a + i0 * stride, stride, i1, n, x + i0 * Columns, x);
  }
  for (Index i1 = n; i1 > 0; i1 -= i1 < kRowsAbreast ? i1 : kRowsAbreast) {
    const Index i0 = i1 < kRowsAbreast ? 0 : i1 - kRowsAbreast;
    for (Index i = i1 - 1; i > i0; --i)
      spread<Columns, 1>(a + i * stride, stride, i0, i, x + i * Columns, x);
    if (i0 > 0) spread<Columns, kRowsAbreast>(a + i0 * stride, stride, 0, i0, x + i0 * Columns, x);
  }
}

}  // namespace

const ColumnRoutines kColumns = {
    {accumulate, residual, norms, defect, centre, direction, subtract, advance, add, range},
    {rows<4>, columns<4>, solve<4>, solve_transpose<4>},
    {rows<8>, columns<8>, solve<8>, solve_transpose<8>},
};

}  // namespace birl::BIRL_ISA
