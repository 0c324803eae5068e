#include "cpu/isa/isa.h"
#include "cpu/isa/simd.h"

namespace birl::BIRL_ISA {
namespace {

// Rows read side by side: as many as registers hold, and fewer in single precision, where fetching
// ahead by hand is faster than what the processor fetches (measured; in double it is slower).
template <class Real>
constexpr int kTogether = sizeof(Real) == 4 || kWidth < 8 ? 2 : 4;

// Asks for the sixteen numbers four rows below p.
inline void fetch_below(const float* p, Index cols) { __builtin_prefetch(p + 4 * cols, 0, 3); }
inline void fetch_below(const double*, Index) {}

// low := min(low, p) over sixteen numbers in their own precision; NaN is passed over.
template <class Real>
BIRL_INLINE void take_least(const Real* p, Vector<Real>& low) {
#pragma GCC unroll 8
  for (int k = 0; k < kLanes; k += kLength<Real>) low = smaller(load<Vector<Real>>(p + k), low);
}

// out[i] = sum of the lanes of v[i]
template <int Rows>
BIRL_INLINE void lane_sums(const Double (&v)[Rows], double* out) {
#pragma GCC unroll 2
  for (int i = 0; i + 2 <= Rows; i += 2) store(out + i, lane_sums(v[i], v[i + 1]));
  if (Rows % 2) out[Rows - 1] = lane_sums(v[Rows - 1], v[Rows - 1])[0];
}

// Σ_{t >= t0} p w, rounded the same wherever it is inlined.
template <class Real>
inline double tail_product(const Real* p, Index t0, Index cols, const double* w) {
  double tail = 0.0;
  for (Index t = t0; t < cols; ++t) tail = __builtin_fma(static_cast<double>(p[t]), w[t], tail);
  return tail;
}

template <int Rows, class Real>
BIRL_INLINE void row_products(const Real* p, Index cols, const double* w, double* y) {
  Double acc[Rows][kParts];
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) acc[i][part] = Double{};
  Index t = 0;
  for (; t + 16 <= cols; t += 16) {
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) fetch_below(p + i * cols + t, cols);
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      const Double x = load(w + t + part * kWidth);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) acc[i][part] += load(p + i * cols + t + part * kWidth) * x;
    }
  }
  Double total[Rows];
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int half = kParts / 2; half > 0; half /= 2)
#pragma GCC unroll 4
      for (int part = 0; part < half; ++part) acc[i][part] += acc[i][part + half];
    total[i] = acc[i][0];
  }
  lane_sums(total, y);
  if (t < cols)
    for (int i = 0; i < Rows; ++i) y[i] += tail_product(p + i * cols, t, cols, w);
}

template <class Real>
void products(const Real* p, Index rows, Index cols, const double* w, double* y) {
  Index i = 0;
  constexpr int kRows = kTogether<Real>;
  for (; i + kRows <= rows; i += kRows) row_products<kRows>(p + i * cols, cols, w, y + i);
  for (; i < rows; ++i) row_products<1>(p + i * cols, cols, w, y + i);
}

// Σ_t p, min(0, min_t p), and with `Multiply` Σ_t p w, of each of `Rows` rows.
template <bool Multiply, int Rows, class Real>
BIRL_INLINE void row_reductions(const Real* p, Index cols, const double* w, double* y, double* sum,
                                double* least) {
  Double acc[Rows][kParts], product[Rows][kParts];
  Vector<Real> low[Rows];
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
    low[i] = Vector<Real>{};
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) acc[i][part] = product[i][part] = Double{};
  }
  Index t = 0;
  for (; t + 16 <= cols; t += 16) {
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      take_least(p + i * cols + t, low[i]);
      fetch_below(p + i * cols + t, cols);
    }
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      Double weight{};
      if constexpr (Multiply) weight = load(w + t + part * kWidth);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) {
        const Double x = load(p + i * cols + t + part * kWidth);
        acc[i][part] += x;
        if constexpr (Multiply) product[i][part] += x * weight;
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
    const Real* const row = p + i * cols;
    Double total[1], total_product[1];
#pragma GCC unroll 4
    for (int half = kParts / 2; half > 0; half /= 2)
#pragma GCC unroll 4
      for (int part = 0; part < half; ++part) {
        acc[i][part] += acc[i][part + half];
        if constexpr (Multiply) product[i][part] += product[i][part + half];
      }
    total[0] = acc[i][0];
    lane_sums(total, sum + i);
    if constexpr (Multiply) {
      total_product[0] = product[i][0];
      lane_sums(total_product, y + i);
      y[i] += tail_product(row, t, cols, w);
    }
    double smallest = extreme<false>(low[i]), tail = 0.0;
    for (Index k = t; k < cols; ++k) {
      const double x = static_cast<double>(row[k]);
      tail += x;
      smallest = x < smallest ? x : smallest;
    }
    sum[i] += tail;
    least[i] = smallest;
  }
}

template <bool Multiply, class Real>
inline void reductions(const Real* p, Index rows, Index cols, const double* w, double* y,
                       double* sum, double* least) {
  constexpr int kRows = kTogether<Real>;
  Index i = 0;
  for (; i + kRows <= rows; i += kRows)
    row_reductions<Multiply, kRows>(p + i * cols, cols, w, y + i, sum + i, least + i);
  for (; i < rows; ++i)
    row_reductions<Multiply, 1>(p + i * cols, cols, w, y + i, sum + i, least + i);
}

template <class Real>
void sums(const Real* p, Index rows, Index cols, double* sum, double* least) {
  reductions<false>(p, rows, cols, nullptr, nullptr, sum, least);
}

template <class Real>
void products_and_sums(const Real* p, Index rows, Index cols, const double* w, double* y,
                       double* sum, double* least) {
  reductions<true>(p, rows, cols, w, y, sum, least);
}

// Columns [0, Vectors · kWidth) of weighted_sum.
template <bool Add, bool Both, int Vectors, class Real, class Out>
BIRL_INLINE void weighted_tile(const Real* p, Index stride, Index rows, const double* weight,
                               const double* second, const Real* ahead, Out* out, double* more) {
  Double acc[Vectors], beside[Vectors];
#pragma GCC unroll 4
  for (int i = 0; i < Vectors; ++i) {
    acc[i] = beside[i] = Double{};
    if constexpr (Add) acc[i] = load(out + i * kWidth);
    if constexpr (Both) beside[i] = load(more + i * kWidth);
  }
  for (Index k = 0; k < rows; ++k) {
    if (ahead) {  // two lines of a row to come for the two that are read (one if float)
      __builtin_prefetch(ahead + k * stride, 0, 2);
      __builtin_prefetch(ahead + k * stride + Vectors * kWidth / 2, 0, 2);
    }
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) {
      const Double x = load(p + k * stride + i * kWidth);
      acc[i] += weight[k] * x;
      if constexpr (Both) beside[i] += second[k] * x;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Vectors; ++i) {
    store(out + i * kWidth, acc[i]);
    if constexpr (Both) store(more + i * kWidth, beside[i]);
  }
}

// out[t] = Σ_k weight[k] p[k,t], on top of what is there if `Add`, and with `Both`
// more[t] += Σ_k second[k] p[k,t]. `Fused` beyond whole tiles: rounded once wherever it is inlined.
template <bool Add, bool Both, bool Fused, class Real, class Out>
inline void weighted_sum(const Real* p, Index stride, Index rows, Index cols, const double* weight,
                         const double* second, const Real* ahead, Out* out, double* more) {
  constexpr Index kTile = 4 * kWidth;
  Index t = 0;
  for (; t + kTile <= cols; t += kTile)
    weighted_tile<Add, Both, 4>(p + t, stride, rows, weight, second, ahead ? ahead + t : nullptr,
                                out + t, more + t);
  for (; !Fused && t + kWidth <= cols; t += kWidth)
    weighted_tile<Add, Both, 1>(p + t, stride, rows, weight, second, ahead, out + t, more + t);
  for (; t < cols; ++t) {
    double acc = Add ? static_cast<double>(out[t]) : 0.0, beside = Both ? more[t] : 0.0;
    for (Index k = 0; k < rows; ++k) {
      const double x = static_cast<double>(p[k * stride + t]);
      acc = Fused ? __builtin_fma(weight[k], x, acc) : acc + weight[k] * x;
      if constexpr (Both) beside += second[k] * x;
    }
    out[t] = static_cast<Out>(acc);
    if constexpr (Both) more[t] = beside;
  }
}

template <class Real>
void combine(const Real* p, Index stride, Index rows, Index cols, const double* weight,
             double* out) {
  const Real* const nothing = nullptr;
  weighted_sum<true, false, false>(p, stride, rows, cols, weight, weight, nothing, out, out);
}

template <class Real>
void policy_row(const Real* p, Index rows, Index cols, const double* weight, const Real* ahead,
                Real* out) {
  double* const nothing = nullptr;
  weighted_sum<false, false, true>(p, cols, rows, cols, weight, weight, ahead, out, nothing);
}

template <class Real>
void two_policy_rows(const Real* p, Index rows, Index cols, const double* weight,
                     const double* second, double* out, double* more) {
  const Real* const nothing = nullptr;
  if (second)
    weighted_sum<false, true, false>(p, cols, rows, cols, weight, second, nothing, out, more);
  else
    weighted_sum<false, false, false>(p, cols, rows, cols, weight, weight, nothing, out, out);
}

template <class Real>
void q_values(Index rows, const Real* reward, const double* product, const double* inverse_sum,
              double discount, double* q) {
  for (Index i = 0; i < rows; ++i)
    q[i] = static_cast<double>(reward[i]) + discount * (product[i] * inverse_sum[i]);
}

// y[0..n) += m x[0..n), in whole vectors: may touch up to kWidth − 1 entries more.
inline void add_multiple(const double* x, Index n, double m, double* y) {
  for (Index j = 0; j < n; j += kWidth) store(y + j, load(y + j) + m * load(x + j));
}

// row := row + (row[k]/pivot) · pivot row, columns (k, n); the multiplier replaces row[k].
inline void eliminate_entry(const double* a, Index n, Index stride, Index k, double* row,
                            double* defect, double pivot_defect, double inverse_pivot) {
  const double multiplier = row[k] * inverse_pivot;
  row[k] = multiplier;
  if (multiplier == 0.0) return;
  *defect += multiplier * pivot_defect;
  add_multiple(a + k * stride + k + 1, n - k - 1, multiplier, row + k + 1);
}

// Pivot by pivot: the rows below one are independent of each other, so their updates overlap.
void eliminate_panel(double* a, Index n, Index stride, Index k0, Index k1, double* defect,
                     double* inverse_pivot) {
  for (Index k = k0; k < k1; ++k) {
    const double* row = a + k * stride;
    Double acc[1] = {Double{}};
    for (Index j = k + 1; j < n; j += kWidth) acc[0] += load(row + j);
    double rest;
    lane_sums(acc, &rest);
    inverse_pivot[k] = 1.0 / (defect[k] + rest);
    for (Index i = k + 1; i < k1; ++i)
      eliminate_entry(a, n, stride, k, a + i * stride, defect + i, defect[k], inverse_pivot[k]);
  }
}

void eliminate_below(double* a, Index n, Index stride, Index k0, Index k1, Index i0, Index i1,
                     double* defect, const double* inverse_pivot) {
  constexpr Index kTogether = 8;  // rows; their chains of dependent multipliers overlap
  constexpr Index kLength = EliminationRoutines::kLargestPanel + EliminationRoutines::kPadding;
  double panel[kTogether][kLength] = {};  // the panel's columns alone: whole vectors must not reach
                                          // into the rest
  const Index width = k1 - k0;
  for (Index first = i0; first < i1; first += kTogether) {
    const Index rows = i1 - first < kTogether ? i1 - first : kTogether;
    for (Index r = 0; r < rows; ++r)
      __builtin_memcpy(panel[r], a + (first + r) * stride + k0, sizeof(double) * width);
    for (Index k = k0; k < k1; ++k)
      for (Index r = 0; r < rows; ++r)
        eliminate_entry(a + k0 * stride + k0, width, stride, k - k0, panel[r], defect + first + r,
                        defect[k], inverse_pivot[k]);
    for (Index r = 0; r < rows; ++r) {
      double* row = a + (first + r) * stride;
      __builtin_memcpy(row + k0, panel[r], sizeof(double) * width);
      combine(a + k0 * stride + k1, stride, width, n - k1, panel[r], row + k1);
    }
  }
}

void eliminated_solve(const double* a, Index n, Index stride, const double* inverse_pivot,
                      double* x) {
  double product;
  for (Index i = 1; i < n; ++i) {
    row_products<1>(a + i * stride, i, x, &product);
    x[i] += product;
  }
  for (Index i = n - 1; i >= 0; --i) {
    row_products<1>(a + i * stride + i + 1, n - i - 1, x + i + 1, &product);
    x[i] = (x[i] + product) * inverse_pivot[i];
  }
}

void eliminated_solve_transpose(const double* a, Index n, Index stride, const double* inverse_pivot,
                                double* x) {
  for (Index i = 0; i < n; ++i) {
    x[i] *= inverse_pivot[i];
    combine(a + i * stride + i + 1, stride, 1, n - i - 1, x + i, x + i + 1);
  }
  for (Index i = n - 1; i > 0; --i) combine(a + i * stride, stride, 1, i, x + i, x);
}

// A chunk of states at a time, so that the exponentials form one long flat loop.
void soft_maximum(const SoftMaximum& m) {
  const Index A = m.actions;
  const double inverse = inverse_temperature(m.temperature);
  const bool tiny = !has_inverse(m.temperature);
  double* const top = m.scratch;                  // max_a q over available actions
  double* const total = top + kSoftMaximumChunk;  // Σ_a e, then its logarithm
  double* const x = total + kSoftMaximumChunk;
  const Index chunk = A < kSoftMaximumChunk ? kSoftMaximumChunk / A : 1;
  for (Index s0 = 0; s0 < m.states; s0 += chunk) {
    const Index states = m.states - s0 < chunk ? m.states - s0 : chunk;
    const Index entries = states * A;
    const double* q = m.q + s0 * A;
    const double* reference = m.log_reference ? m.log_reference + s0 * A : nullptr;
    for (Index s = 0; s < states; ++s) {
      double best = nothing<double>();
      for (Index a = s * A; a < s * A + A; ++a) {
        best = higher(best, reference ? available(q[a], reference[a]) : q[a]);
      }
      if (tiny)
        for (Index a = s * A; a < s * A + A; ++a) x[a] = (q[a] - best) / m.temperature;
      else
        for (Index a = s * A; a < s * A + A; ++a) x[a] = (q[a] - best) * inverse;
      if (reference) {
        double peak = nothing<double>();
        for (Index a = s * A; a < s * A + A; ++a) {
          x[a] = available(x[a] + reference[a], reference[a]);
          peak = x[a] > peak ? x[a] : peak;
        }
        for (Index a = s * A; a < s * A + A; ++a) x[a] -= peak;
        best += m.temperature * peak;
      }
      top[s] = best;
    }
    if (m.log_policy) __builtin_memcpy(m.log_policy + s0 * A, x, sizeof(double) * entries);
    for (Index i = 0; i < entries; ++i) x[i] = exp_nonpositive(x[i]);
    for (Index s = 0; s < states; ++s) {
      double sum = 0.0;
      for (Index a = s * A; a < s * A + A; ++a) sum += x[a];
      total[s] = sum;
    }
    if (m.policy)
      for (Index s = 0; s < states; ++s)
        for (Index a = s * A; a < s * A + A; ++a) m.policy[s0 * A + a] = x[a] / total[s];
    for (Index s = 0; s < states; ++s) {
      total[s] = log_from_one(total[s]);
      m.value[s0 + s] = top[s] + m.temperature * total[s];
    }
    if (m.log_policy)
      for (Index s = 0; s < states; ++s)
        for (Index a = s * A; a < s * A + A; ++a) m.log_policy[s0 * A + a] -= total[s];
    if (m.advantage)
      for (Index s = 0; s < states; ++s)
        for (Index a = s * A; a < s * A + A; ++a)
          m.advantage[s0 * A + a] = masked(reference, a) ? 0.0 : q[a] - m.value[s0 + s];
  }
}

double dot(Index n, const double* x, const double* y) {
  double result;
  row_products<1>(x, n, y, &result);
  return result;
}

SweepRange difference(Index n, const double* a, const double* b, double shift, double* d) {
  double low = __builtin_huge_val(), high = -__builtin_huge_val(), sum = 0.0;
  double least = low, most = high;
  for (Index i = 0; i < n; ++i) {
    const double x = (a[i] - b[i]) - shift;
    d[i] = x;
    low = x < low ? x : low;
    high = x > high ? x : high;
    least = a[i] < least ? a[i] : least;
    most = a[i] > most ? a[i] : most;
    sum += x - x;  // zero unless something is NaN or infinite
  }
  return {low, high, least, most, sum == 0.0};
}

template <class Real>
constexpr RowRoutines<Real> kRows = {products<Real>, sums<Real>,       products_and_sums<Real>,
                                     combine<Real>,  policy_row<Real>, two_policy_rows<Real>,
                                     q_values<Real>};

}  // namespace

const DenseRoutines kDense = {
    {kRows<float>, kRows<double>},
    soft_maximum,
    {eliminate_panel, eliminate_below, eliminated_solve, eliminated_solve_transpose},
    dot,
    difference,
};

}  // namespace birl::BIRL_ISA
