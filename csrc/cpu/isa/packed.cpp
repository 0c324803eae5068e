#include "cpu/isa/isa.h"
#include "cpu/isa/simd.h"

namespace birl::BIRL_ISA {
namespace {

template <class Real>
constexpr int kPack = kLength<Real>;

// q' of `Actions` actions of the states on one vector. Partial sums over t, enough of them to keep
// the multipliers busy.
template <int Actions, class Vec, class Real>
BIRL_INLINE void products(const Real* p, Index stride, Index states, const NumberOf<Vec>* w,
                          Vec (&sum)[Actions]) {
  constexpr int kParts = Actions <= 2 ? 4 : 2;
  Vec part[kParts][Actions];
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i)
#pragma GCC unroll 8
    for (int a = 0; a < Actions; ++a) part[i][a] = Vec{};
  Index t = 0;
  for (; t + kParts <= states; t += kParts)
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) {
      const Vec x = broadcast<Vec>(w[t + i]);
#pragma GCC unroll 8
      for (int a = 0; a < Actions; ++a)
        part[i][a] += load<Vec>(p + (t + i) * stride + a * kPack<Real>) * x;
    }
  for (; t < states; ++t) {
    const Vec x = broadcast<Vec>(w[t]);
#pragma GCC unroll 8
    for (int a = 0; a < Actions; ++a) part[0][a] += load<Vec>(p + t * stride + a * kPack<Real>) * x;
  }
#pragma GCC unroll 8
  for (int a = 0; a < Actions; ++a) {
    sum[a] = part[0][a] + part[1][a];
    if constexpr (kParts == 4) sum[a] += part[2][a] + part[3][a];
  }
}

template <int Actions, class Vec, class Real>
inline void q_values(const PackedSweep<NumberOf<Vec>, Real>& m, Index place, Index a0,
                     const Real* p) {
  const Index at = place + a0 * kPack<Real>;
  Vec sum[Actions];
  products<Actions, Vec>(p + a0 * kPack<Real>, m.actions * kPack<Real>, m.states, m.w, sum);
#pragma GCC unroll 8
  for (int a = 0; a < Actions; ++a) {
    const Index i = at + a * kPack<Real>;
    store(m.q + i, load<Vec>(m.reward + i) + load<Vec>(m.scale + i) * sum[a]);
  }
}

template <class Vec, class Real>
inline void all_q_values(const PackedSweep<NumberOf<Vec>, Real>& m, Index place, const Real* p) {
  Index a = 0;
  for (; a + 8 <= m.actions; a += 8) q_values<8, Vec>(m, place, a, p);
  with_constant<7>(m.actions - a, [&](auto left) {
    constexpr int kLeft = decltype(left)::value;
    if constexpr (kLeft > 0) q_values<kLeft, Vec>(m, place, a, p);
  });
}

// 2^z for z <= 0 in single precision, a sweep's innermost loop: 2^-126 from there on, NaN stays
// NaN. Relative error below 2e-7. Interpolation of 2^t at the Chebyshev nodes of [−1/2, 1/2].
BIRL_INLINE Single exp2_nonpositive(Single z) {
  const Single least = broadcast<Single>(-126.0f);
  const Single y = least > z ? least : z;
  constexpr float kShift = 0x1.8p23f;  // rounds to an integer, and leaves it in the low bits
  const Single shifted = y + kShift;
  const Single t = y - (shifted - kShift);
  Single p = t * 0.000154614447f + 0.00134004282f;
  p = p * t + 0.00961805668f;
  p = p * t + 0.0555032723f;
  p = p * t + 0.240226509f;
  p = p * t + 0.693147207f;
  p = p * t + 1.0f;
  using Bits = Format<Single>::Bits;
  const Bits one = bit_cast<Bits>(broadcast<Single>(1.0f));
  return p * bit_cast<Single>((bit_cast<Bits>(shifted) << 23) + one);
}

// The exponential in which a sweep weighs actions, and 1/τ and log μ in its units.
template <class Vec>
struct Exponent;
template <>
struct Exponent<Single> {
  static constexpr float kUnit = 0x1.62e43p-1f;  // log 2
  static Single of(Single x) { return exp2_nonpositive(x); }
};
template <>
struct Exponent<Double> {
  static constexpr double kUnit = 1.0;
  static Double of(Double x) { return exp_nonpositive(x); }
};

template <class Vec, int Count>
struct SoftMaximum {
  Vec top[Count], total[Count];  // value = top + τ log total
};

// Over `actions` entries of q, kPack apart, for vectors of states at `place`: several at a time,
// because each is one long chain of dependent operations.
template <class Real, class Vec, int Count>
BIRL_INLINE SoftMaximum<Vec, Count> soft_maximum(const NumberOf<Vec>* q,
                                                 const NumberOf<Vec>* reference,
                                                 const Index (&place)[Count], Index actions,
                                                 Vec temperature, Vec inverse) {
  constexpr Index W = kPack<Real>;
  SoftMaximum<Vec, Count> m;
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) {
    m.top[i] = nothing<Vec>();
    m.total[i] = Vec{};
  }
  if (!reference) {
    for (Index a = 0; a < actions; ++a)
#pragma GCC unroll 4
      for (int i = 0; i < Count; ++i) m.top[i] = larger(load<Vec>(q + place[i] + a * W), m.top[i]);
    for (Index a = 0; a < actions; ++a)
#pragma GCC unroll 4
      for (int i = 0; i < Count; ++i)
        m.total[i] += Exponent<Vec>::of((load<Vec>(q + place[i] + a * W) - m.top[i]) * inverse);
    return m;
  }
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) {
    const auto log_mu = [&](Index a) { return load<Vec>(reference + place[i] + a * W); };
    const auto exponent = [&](Index a) {
      return log_weight(load<Vec>(q + place[i] + a * W), m.top[i], inverse, log_mu(a));
    };
    for (Index a = 0; a < actions; ++a)
      m.top[i] = larger(available(load<Vec>(q + place[i] + a * W), log_mu(a)), m.top[i]);
    Vec peak = nothing<Vec>();
    for (Index a = 0; a < actions; ++a) peak = larger(exponent(a), peak);
    for (Index a = 0; a < actions; ++a) m.total[i] += Exponent<Vec>::of(exponent(a) - peak);
    m.top[i] += (temperature * Exponent<Vec>::kUnit) * peak;
  }
  return m;
}

// Running ranges of δ and of the image.
template <class Vec>
struct Ranges {
  Vec low, high, least, most, rest;
};

template <int Count, class Vec, class Real>
BIRL_INLINE void sweep_states(const PackedSweep<NumberOf<Vec>, Real>& m, Index s, Vec temperature,
                              Vec inverse, Vec constant, Ranges<Vec>& ranges) {
  constexpr Index L = kCount<Vec>, W = kPack<Real>;
  const Index A = m.actions;
  Index place[Count];
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) {
    const Index pack = (s + i * L) / W, lane = (s + i * L) % W;
    place[i] = pack * A * W + lane;
    const Real* p = m.transition + pack * m.states * A * W + lane;
    if (!m.value) {
      for (Index a = 0; a < A; ++a)
        store(m.q + place[i] + a * W, load<Vec>(m.reward + place[i] + a * W));
    } else {
      all_q_values<Vec>(m, place[i], p);
    }
  }
  const SoftMaximum<Vec, Count> maximum =
      soft_maximum<Real, Vec, Count>(m.q, m.log_reference, place, A, temperature, inverse);
#pragma GCC unroll 4
  for (int i = 0; i < Count; ++i) {
    const Vec image = maximum.top[i] + temperature * log_from_one(maximum.total[i]);
    const Vec before = m.value ? load<Vec>(m.w + s + i * L) : Vec{};
    const Vec delta = (image - before) - constant;
    store(m.image + s + i * L, image);
    ranges.low = smaller(delta, ranges.low);
    ranges.high = larger(delta, ranges.high);
    ranges.least = smaller(image, ranges.least);
    ranges.most = larger(image, ranges.most);
    ranges.rest += delta - delta;  // zero unless something is NaN or infinite
  }
}

template <class Vec, class Real>
SweepRange sweep(const PackedSweep<NumberOf<Vec>, Real>& m) {
  using Number = NumberOf<Vec>;
  constexpr Index L = kCount<Vec>;
  const Index S = m.states;
  const Vec temperature = broadcast<Vec>(m.temperature);
  const Vec inverse = broadcast<Vec>(inverse_temperature(m.temperature * Exponent<Vec>::kUnit));
  const Vec constant = broadcast<Vec>(m.constant), centre = broadcast<Vec>(m.centre);
  if (m.value)
    for (Index s = 0; s < S; s += L) store(m.w + s, load<Vec>(m.value + s) - centre);
  const Vec infinite = broadcast<Vec>(static_cast<Number>(kInf));
  Ranges<Vec> ranges{infinite, -infinite, infinite, -infinite, Vec{}};
  Index s = 0;
  for (; s + L < S; s += 2 * L) sweep_states<2, Vec>(m, s, temperature, inverse, constant, ranges);
  if (s < S) sweep_states<1, Vec>(m, s, temperature, inverse, constant, ranges);
  return {extreme<false>(ranges.low), extreme<true>(ranges.high), extreme<false>(ranges.least),
          extreme<true>(ranges.most),
          extreme<true>(ranges.rest == Vec{} ? Vec{} : broadcast<Vec>(1)) == 0.0};
}

// ---- packing ------------------------------------------------------------------------------------

// to[t·stride + i] = row[i][t] for i < rows and t < cols, kPack of each at most.
template <class Real>
inline void transpose_tile(const Real* const (&row)[kPack<Real>], Index rows, Index cols, Real* to,
                           Index stride) {
  constexpr int W = kPack<Real>;
  const bool whole = rows >= W && cols >= W;
  if (!kMasks && !whole) {
    for (Index t = 0; t < cols && t < W; ++t)
      for (Index i = 0; i < rows; ++i) to[t * stride + i] = row[i][t];
    return;
  }
  Vector<Real> tile[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) tile[i] = load_first<Vector<Real>>(row[i], cols);
  transpose(tile);
  if (whole) {
#pragma GCC unroll 16
    for (int t = 0; t < W; ++t) store(to + t * stride, tile[t]);
  } else {
    for (int t = 0; t < cols && t < W; ++t) store_first(to + t * stride, tile[t], rows);
  }
}

// (S,A,C) to [pack][c][a][lane].
template <class Real>
inline void pack_rows(const Real* from, Index S, Index A, Index C, Real* packed) {
  constexpr Index W = kPack<Real>;
  for (Index s = 0; s < S; s += W, packed += C * A * W)
    for (Index a = 0; a < A; ++a) {
      const Real* row[W];
      for (Index lane = 0; lane < W; ++lane)
        row[lane] = from + ((s + lane < S ? s + lane : S - 1) * A + a) * C;
      for (Index c = 0; c < C; c += W) {
        transpose_tile(row, W, C - c, packed + (c * A + a) * W, A * W);
        for (Index lane = 0; lane < W; ++lane) row[lane] += W;
      }
    }
}

template <class Real>
void pack_transition(const Real* p, Index S, Index A, Real* packed) {
  pack_rows(p, S, A, S, packed);
}

template <class Real>
bool inverse_row_sums(const Real* packed, Index S, Index A, double tolerance, bool ending,
                      double* inverse) {
  constexpr Index W = kPack<Real>, L = kWidth;
  const Double bound = broadcast<Double>(tolerance);
  bool sound = true;
  for (Index s = 0; s < S; s += L) {
    const Index pack = s / W, lane = s % W;
    const Real* p = packed + pack * S * A * W + lane;
    for (Index a = 0; a < A; ++a) {
      Double total[2] = {Double{}, Double{}}, least{};
      Index t = 0;
      for (; t + 2 <= S; t += 2)
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const Double x = load<Double>(p + ((t + i) * A + a) * W);
          total[i] += x;
          least = smaller(x, least);
        }
      for (; t < S; ++t) {
        const Double x = load<Double>(p + (t * A + a) * W);
        total[0] += x;
        least = smaller(x, least);
      }
      const Double sigma = total[0] + total[1];
      store(inverse + pack * A * W + a * W + lane, sigma == 0.0 ? Double{} : 1.0 / sigma);
      const Double gap = magnitude(sigma - 1.0);
      // one where the row is sound: a NaN compares false
      const Double whole = gap <= bound ? broadcast<Double>(1.0) : Double{};
      const Double fine = least >= 0.0
                              ? (ending ? (sigma == 0.0 ? broadcast<Double>(1.0) : whole) : whole)
                              : Double{};
      sound = sound && extreme<false>(fine) == 1.0;
    }
  }
  return sound;
}

// Table (S,A) to [pack][a][lane], in packs of W.
inline void pack_table(const double* table, Index S, Index A, Index W, double* packed) {
  for (Index s = 0; s < S; s += W, packed += A * W)
    for (Index lane = 0; lane < W; ++lane) {
      const double* row = table + (s + lane < S ? s + lane : S - 1) * A;
      for (Index a = 0; a < A; ++a) packed[a * W + lane] = row[a];
    }
}

// to (count, A) = the first `count` lanes of from [a][lane].
template <class Real>
inline void unpack_states(const Real* from, Index A, Index count, Real* to) {
  constexpr Index W = kPack<Real>;
  const Real* row[W];
  for (Index a = 0; a < A; a += W) {
    const Index rows = A - a < W ? A - a : W;
    for (Index i = 0; i < W; ++i) row[i] = from + (a + (i < rows ? i : 0)) * W;
    transpose_tile(row, rows, count, to + a, A);
  }
}

template <class Real>
PackedProblem pack_problem(const Real* reward, const double* log_reference, Index S, Index A,
                           const double* inverse_sum, double discount, Real* packed_reward,
                           double* scale, double* packed_reference, float* single_scale,
                           float* single_reference) {
  constexpr Index W = kPack<Real>;
  pack_rows(reward, S, 1, A, packed_reward);
  if (log_reference) pack_table(log_reference, S, A, W, packed_reference);
  const Index entries = (S + W - 1) / W * W * A;
  double largest = 0.0, largest_reference = 0.0, rest = 0.0, ends = 0.0;
  for (Index i = 0; i < entries; i += kWidth) {
    const Double gamma = broadcast<Double>(discount);
    const Double x = gamma * load<Double>(inverse_sum + i);
    store(scale + i, x);
    if (single_scale) store(single_scale + i, x);
    if (single_scale && log_reference)
      store(single_reference + i,
            load<Double>(packed_reference + i) / static_cast<double>(Exponent<Single>::kUnit));
  }
  if (!log_reference) {
    Double most{}, sum{}, least = broadcast<Double>(kInf);
    for (Index i = 0; i < entries; i += kWidth) {
      const Double r = load<Double>(packed_reward + i);
      most = larger(magnitude(r), most);
      sum += r - r;
      least = smaller(load<Double>(inverse_sum + i), least);
    }
    largest = extreme<true>(most);
    rest = extreme<true>(sum == Double{} ? Double{} : broadcast<Double>(1.0));
    ends = extreme<false>(least) == 0.0 ? 1.0 : 0.0;
  } else {
    for (Index i = 0; i < entries; ++i) {
      const double r = static_cast<double>(packed_reward[i]);
      rest = r - r == 0.0 ? rest : 1.0;
      const double mu = packed_reference[i];
      if (masked(mu)) continue;
      const double size = magnitude(r), bias = magnitude(mu);
      largest = size > largest ? size : largest;
      largest_reference = bias > largest_reference ? bias : largest_reference;
      if (inverse_sum[i] == 0.0) ends = 1.0;
    }
  }
  return {largest, largest_reference, rest == 0.0, ends == 0.0};
}

template <class Real>
void unpack(const double* packed, Index S, Index A, double* table) {
  constexpr Index W = kPack<Real>;
  for (Index s = 0; s < S; ++s)
    for (Index a = 0; a < A; ++a) table[s * A + a] = packed[s / W * A * W + a * W + s % W];
}

template <class Real>
void result(const PackedResult<Real>& m) {
  constexpr Index W = kPack<Real>, L = kWidth;
  const Index S = m.states, A = m.actions;
  const Double inverse = broadcast<Double>(inverse_temperature(m.temperature));
  double* const exponent = m.scratch;                           // (A, L)
  double* const share = exponent + A * L;                       // (A, L)
  Real* const tables = reinterpret_cast<Real*>(share + A * L);  // four of (A, W)
  for (Index s = 0; s < S; s += L) {
    const Index place = s / W * A * W + s % W;
    const double* q = m.q_relative + place;
    const double* reference = m.log_reference ? m.log_reference + place : nullptr;
    const auto log_mu = [&](Index a) { return load(reference + a * W); };
    Double best = nothing<Double>();
    for (Index a = 0; a < A; ++a) {
      const Double x = load<Double>(q + a * W);
      best = larger(reference ? available(x, log_mu(a)) : x, best);
    }
    Double peak = reference ? nothing<Double>() : Double{};
    for (Index a = 0; a < A; ++a) {
      Double x = (load<Double>(q + a * W) - best) * inverse;
      if (reference) {
        x = available(x + log_mu(a), log_mu(a));
        peak = larger(x, peak);
      }
      store(exponent + a * L, x);
    }
    Double total{};
    for (Index a = 0; a < A; ++a) {
      const Double x = load<Double>(exponent + a * L) - peak;
      const Double e = exp_nonpositive(x);
      store(exponent + a * L, x);
      store(share + a * L, e);
      total += e;
    }
    const Double logarithm = log_from_one(total);
    const Double image = load<Double>(m.image + s), value = image + m.offset;
    for (Index a = 0; a < A; ++a) {
      Double advantage = load<Double>(q + a * W) - image;
      if (reference) advantage = masked(log_mu(a)) ? Double{} : advantage;
      Real* const to = tables + a * W + s % W;
      store(to, advantage + value);
      store(to + A * W, advantage);
      store(to + 2 * A * W, load<Double>(share + a * L) / total);
      store(to + 3 * A * W, load<Double>(exponent + a * L) - logarithm);
    }
    double values[L];
    store(values, value);
    for (Index lane = 0; lane < L && s + lane < S; ++lane) {
      m.value[s + lane] = values[lane];
      if (m.relative) m.relative[s + lane] = m.image[s + lane];
    }
    if ((s + L) % W != 0 && s + L < S) continue;
    const Index first = s / W * W, count = S - first < W ? S - first : W;
    Real* const out[4] = {m.q, m.advantage, m.policy, m.log_policy};
    for (int k = 0; k < 4; ++k) unpack_states(tables + k * A * W, A, count, out[k] + first * A);
  }
}

}  // namespace

const PackedRoutines<float> kPackedSingle = {
    kPack<float>,         pack_transition<float>, inverse_row_sums<float>, pack_problem<float>,
    sweep<Double, float>, sweep<Single, float>,   unpack<float>,           result<float>};
const PackedRoutines<double> kPackedDouble = {
    kPack<double>,        pack_transition<double>, inverse_row_sums<double>,
    pack_problem<double>, sweep<Double, double>,   nullptr,
    unpack<double>,       result<double>};

}  // namespace birl::BIRL_ISA
