#include "cpu/isa/isa.h"
#include "cpu/isa/simd.h"

namespace birl::BIRL_ISA {
namespace {

// ---- tables -------------------------------------------------------------------------------------

// Bars are cotangents. Since log π = (Q − V)/τ + log μ, (M11) transposed makes of them
//     s = π π̄ + log π bar              at log π, Q and V held
//     Ā' = s/τ + Ā                     at Q − V
//     v̄ = V̄ − Σ_a Ā'                   at V: `source`, before what Q sends back to it
//     Q̄' = Ā' + Q̄                      at Q, in `q`
// and Σ V̄ + Σ Q̄, the inflow, is what the mass of the flow is known from (M20).
template <class Real>
void fold(const VjpTables<Real>& m) {
  const Index A = m.actions, entries = m.states * A;
  double* __restrict pi = m.probability;
  double* __restrict q = m.q;
  double* __restrict score = m.score;
  for (Index i = 0; i < entries; ++i) pi[i] = static_cast<double>(m.policy[i]);
  if (sizeof(Real) == 4)  // a rounded policy misses one, and I − γP_π would take that for a leak
    for (Index s = 0; s < m.states; ++s) {
      double mass = 0.0;
      for (Index i = s * A; i < s * A + A; ++i) mass += pi[i];
      for (Index i = s * A; i < s * A + A; ++i) pi[i] /= mass;
    }
  const double scale = inverse_temperature(m.temperature);
  const bool scored = m.policy_bar || m.log_policy_bar;
  if (m.policy_bar)
    for (Index i = 0; i < entries; ++i) score[i] = pi[i] * static_cast<double>(m.policy_bar[i]);
  if (m.policy_bar && m.log_policy_bar)
    for (Index i = 0; i < entries; ++i) score[i] += static_cast<double>(m.log_policy_bar[i]);
  else if (m.log_policy_bar)
    for (Index i = 0; i < entries; ++i) score[i] = static_cast<double>(m.log_policy_bar[i]);
  if (scored)
    for (Index i = 0; i < entries; ++i) q[i] = score[i] * scale;
  else
    for (Index i = 0; i < entries; ++i) q[i] = 0.0;
  if (m.advantage_bar)
    for (Index i = 0; i < entries; ++i) q[i] += static_cast<double>(m.advantage_bar[i]);
  double inflow = 0.0;
  if (m.value_bar)
    for (Index s = 0; s < m.states; ++s) inflow += m.value_bar[s];
  if (m.q_bar)
    for (Index i = 0; i < entries; ++i) inflow += static_cast<double>(m.q_bar[i]);
  *m.inflow = inflow;
  // What flows into Q − V leaves V; what flows into Q itself does not.
  for (Index s = 0; s < m.states; ++s) {
    double outflow = 0.0;
    if (scored || m.advantage_bar)
      for (Index i = s * A; i < s * A + A; ++i) outflow += q[i];
    m.source[s] = (m.value_bar ? m.value_bar[s] : 0.0) - outflow;
  }
  if (m.q_bar)
    for (Index i = 0; i < entries; ++i) q[i] += static_cast<double>(m.q_bar[i]);
}

// With the flow λ of (I − γP_π)ᵀλ = v̄ + γPᵀQ̄' (M12), and V = c + W:
//     r̄ = w = Q̄' + λπ, and γ w/σ for P̄ = γ (w/σ) ⊗ (W − PW/σ)
//     log μ bar = τ λπ + s
//     τ̄ = −Σ (λπ + s/τ) (Q − V)/τ
//     γ̄ = Σ w PW/σ and what the constant brings, of which all but the leak cancels (M20).
template <class Real>
void finish(const VjpTables<Real>& m, const VjpOutputs<Real>& out) {
  const Index A = m.actions, entries = m.states * A;
  const double* __restrict pi = m.probability;
  const bool scored = m.policy_bar || m.log_policy_bar;
  if (out.log_reference_bar)
    for (Index s = 0; s < m.states; ++s)
      for (Index i = s * A; i < s * A + A; ++i)
        out.log_reference_bar[i] =
            m.temperature * (out.flow[s] * pi[i]) + (scored ? m.score[i] : 0.0);
  if (out.temperature_bar) {
    const double inverse = inverse_temperature(m.temperature);
    double total = 0.0;
    for (Index s = 0; s < m.states; ++s)
      for (Index i = s * A; i < s * A + A; ++i) {
        const double score = scored ? m.score[i] * inverse : 0.0;
        total -= (out.flow[s] * pi[i] + score) * static_cast<double>(m.advantage[i]);
      }
    *out.temperature_bar = total * inverse;
  }
  double* __restrict w = m.q;
  for (Index s = 0; s < m.states; ++s) {
    const double flow = out.flow[s];
    for (Index i = s * A; i < s * A + A; ++i) w[i] += flow * pi[i];
  }
  if (out.reward_bar)
    for (Index i = 0; i < entries; ++i) out.reward_bar[i] = static_cast<Real>(w[i]);
  if (out.weight)
    for (Index i = 0; i < entries; ++i) out.weight[i] = m.discount * w[i] * out.inverse_sum[i];
  if (out.discount_bar) {
    double most = 0.0;  // likely is the end nowhere
    for (Index s = 0; s < m.states; ++s) {
      double stopping = 0.0;
      for (Index i = s * A; i < s * A + A; ++i)
        if (out.inverse_sum[i] == 0.0) stopping += pi[i];
      most = stopping > most ? stopping : most;
    }
    // The constant moves with γ by itself: only what is left of it passes through w (M20).
    const double leaving = (1.0 - m.discount) + m.discount * most;
    const double goes_on = out.offset * (m.discount * most / leaving);
    const double ends = -out.offset / leaving;
    double total = out.inflow * (out.offset / leaving);
    for (Index i = 0; i < entries; ++i)
      total += w[i] * (out.expected[i] + (out.inverse_sum[i] == 0.0 ? ends : goes_on));
    *out.discount_bar = total;
  }
}

// ---- rows of P ----------------------------------------------------------------------------------

// Sums and products with w of kWidth/2 rows, to packed [0, kWidth/2) and [kWidth/2, kWidth).
template <class Real>
inline void two_moments(const Real* p, Index cols, Index step, const double* w, double* out) {
  constexpr int kRows = kWidth / 2;
  Double acc[kWidth];
#pragma GCC unroll 8
  for (int i = 0; i < kWidth; ++i) acc[i] = Double{};
  Index t = 0;
  for (; t + kWidth <= cols; t += kWidth) {
    const Double x = load(w + t);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Double y = load(p + i * step + t);
      acc[i] += y;
      acc[kRows + i] += y * x;
    }
  }
  store(out, lane_sums(acc));
  for (; t < cols; ++t)
    for (int i = 0; i < kRows; ++i) {
      const double y = static_cast<double>(p[i * step + t]);
      out[i] += y;
      out[kRows + i] += y * w[t];
    }
}

template <class Real>
void moments(const Real* p, Index rows, Index cols, const double* w, double* inverse,
             double* expected) {
  constexpr int kRows = kWidth / 2;
  double found[kWidth];
  for (Index i0 = 0; i0 < rows; i0 += kRows) {
    const Index count = rows - i0 < kRows ? rows - i0 : kRows;
    if (count == kRows) {
      two_moments(p + i0 * cols, cols, cols, w, found);
    } else {
      for (Index i = 0; i < count; ++i) {  // the same row several times: the same bits as above
        double alone[kWidth];
        two_moments(p + (i0 + i) * cols, cols, 0, w, alone);
        found[i] = alone[0];
        found[kRows + i] = alone[kRows];
      }
    }
    for (Index i = 0; i < count; ++i) {
      inverse[i0 + i] = inverse_row_sum(found[i]);
      expected[i0 + i] = found[kRows + i] * inverse[i0 + i];
    }
  }
}

template <class Real>
void outer(Index rows, Index cols, Index groups, Index stride, const double* x, const double* e,
           const double* w, Real* out) {
  for (Index i = 0; i < rows; ++i, out += cols) {
    Index t = 0;
    for (; t + kWidth <= cols; t += kWidth) {
      Double total = x[i] * (load(w + t) - e[i]);
      for (Index g = 1; g < groups; ++g)
        total += x[g * stride + i] * (load(w + g * cols + t) - e[g * stride + i]);
      store(out + t, total);
    }
    for (; t < cols; ++t) {
      double total = x[i] * (w[t] - e[i]);
      for (Index g = 1; g < groups; ++g)
        total += x[g * stride + i] * (w[g * cols + t] - e[g * stride + i]);
      out[t] = static_cast<Real>(total);
    }
  }
}

// ---- elimination, a problem per lane ------------------------------------------------------------

using Pack = VectorOf<double, PackedElimination::kAbreast>::type;

void packed_solve_transpose(Index n, double* entries, double* defects, double* inverse_pivots,
                            double* unknowns) {
  Pack* const a = reinterpret_cast<Pack*>(entries);
  Pack* const d = reinterpret_cast<Pack*>(defects);
  Pack* const inverse = reinterpret_cast<Pack*>(inverse_pivots);
  Pack* const x = reinterpret_cast<Pack*>(unknowns);
  for (Index k = 0; k < n; ++k) {
    const Pack* const row = a + k * n;
    Pack pivot = d[k], odd = Pack{};
    Index j = k + 1;
    for (; j + 1 < n; j += 2) {
      pivot += row[j];
      odd += row[j + 1];
    }
    if (j < n) pivot += row[j];
    inverse[k] = 1.0 / (pivot + odd);
    for (Index i = k + 1; i < n; ++i) {
      Pack* const below = a + i * n;
      const Pack multiplier = below[k] * inverse[k];
      below[k] = multiplier;
      d[i] += multiplier * d[k];
      for (j = k + 1; j < n; ++j) below[j] += multiplier * row[j];
    }
  }
  for (Index i = 0; i < n; ++i) {
    const Pack top = x[i] * inverse[i];
    x[i] = top;
    for (Index j = i + 1; j < n; ++j) x[j] += a[i * n + j] * top;
  }
  for (Index i = n - 1; i > 0; --i)
    for (Index j = 0; j < i; ++j) x[j] += a[i * n + j] * x[i];
}

void packed_settle_mass(Index n, const double* entries, const double* defects, const double* mass,
                        double* slow, double* unknowns) {
  const Pack* const a = reinterpret_cast<const Pack*>(entries);
  const Pack* const d = reinterpret_cast<const Pack*>(defects);
  Pack* const z = reinterpret_cast<Pack*>(slow);
  Pack* const x = reinterpret_cast<Pack*>(unknowns);
  for (Index i = 0; i < n - 1; ++i) z[i] = Pack{};
  z[n - 1] = Pack{} + 1.0;
  for (Index i = n - 1; i > 0; --i)
    for (Index j = 0; j < i; ++j) z[j] += a[i * n + j] * z[i];
  Pack left, unit = Pack{};
  __builtin_memcpy(&left, mass, sizeof left);
  for (Index i = 0; i < n; ++i) {
    left -= d[i] * x[i];
    unit += d[i] * z[i];
  }
  const Pack step = left / unit;
  for (Index i = 0; i < n; ++i) x[i] += step * z[i];
}

template <class Real>
constexpr AdjointRowRoutines<Real> kRows = {fold<Real>, finish<Real>, moments<Real>, outer<Real>};

}  // namespace

const AdjointRoutines kAdjoint = {{kRows<float>, kRows<double>},
                                  {packed_solve_transpose, packed_settle_mass}};

}  // namespace birl::BIRL_ISA
