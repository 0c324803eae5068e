// Vectors of numbers for the files that are compiled once per instruction set (cpu/isa/isa.h).
// Nothing here may be shared between them.
#pragma once

#include <type_traits>
#include <utility>

#include "core/soft_maximum.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#define BIRL_X86(name) _mm512_##name
#elif defined(__AVX2__)
#define BIRL_X86(name) _mm256_##name
#endif
#define BIRL_INLINE inline __attribute__((always_inline))

namespace birl {
namespace BIRL_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;  // of a register
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
template <class Number>
constexpr int kLength = kBytes / static_cast<int>(sizeof(Number));
constexpr int kWidth = kLength<double>;
constexpr int kLanes = 16;  // of every reduction, on every instruction set
constexpr int kParts = kLanes / kWidth;

template <class Number_, int Count>
struct VectorOf {
  typedef Number_ type __attribute__((vector_size(Count * sizeof(Number_))));
};
template <class Number>
using Vector = typename VectorOf<Number, kLength<Number>>::type;
typedef VectorOf<float, kLength<float>>::type Single;
typedef VectorOf<double, kWidth>::type Double;
typedef VectorOf<float, kWidth>::type HalfSingle;

// Of a vector of any length.
template <class Vec>
using NumberOf = std::remove_reference_t<decltype(std::declval<Vec&>()[0])>;
template <class Vec>
constexpr int kCount = static_cast<int>(sizeof(Vec) / sizeof(NumberOf<Vec>));

}  // namespace
}  // namespace BIRL_ISA

template <>
struct Format<BIRL_ISA::Single> {
  using Bits = BIRL_ISA::Vector<std::uint32_t>;
  static constexpr bool kSingle = true;
};
template <>
struct Format<BIRL_ISA::Double> {
  using Bits = BIRL_ISA::Vector<std::uint64_t>;
  static constexpr bool kSingle = false;
};

namespace BIRL_ISA {
namespace {

// Compilers lower __builtin_convertvector in pieces.
#if defined(BIRL_X86)
BIRL_INLINE Double widen(HalfSingle x) { return BIRL_X86(cvtps_pd)(x); }
BIRL_INLINE HalfSingle narrow(Double x) { return BIRL_X86(cvtpd_ps)(x); }
#else
BIRL_INLINE Double widen(HalfSingle x) { return Double{x[0], x[1]}; }
BIRL_INLINE HalfSingle narrow(Double x) { return __builtin_convertvector(x, HalfSingle); }
#endif

// Of a vector, or of one number; float becomes double on the way into a vector of those.
template <class Vec = Double, class Real>
BIRL_INLINE Vec load(const Real* from) {
  std::conditional_t<std::is_same_v<Vec, Double> && sizeof(Real) == 4, HalfSingle, Vec> v;
  __builtin_memcpy(&v, from, sizeof v);
  if constexpr (sizeof v == sizeof(Vec))
    return v;
  else
    return widen(v);
}
template <class Real, class Vec>
BIRL_INLINE void store(Real* to, Vec v) {
  if constexpr (std::is_same_v<Vec, Double> && sizeof(Real) == 4) {
    const HalfSingle half = narrow(v);
    __builtin_memcpy(to, &half, sizeof half);
  } else {
    __builtin_memcpy(to, &v, sizeof v);
  }
}
template <class Vec>
BIRL_INLINE Vec broadcast(NumberOf<Vec> x) {
  return x - Vec{};
}

// The first `count` numbers (and zeros), where the processor can: elsewhere all of them.
#if defined(__AVX512F__)
constexpr bool kMasks = true;
#else
constexpr bool kMasks = false;
#endif
template <class Vec>
BIRL_INLINE Vec load_first(const NumberOf<Vec>* from, Index count) {
#if defined(__AVX512F__)
  if (count >= kCount<Vec>) return load<Vec>(from);
  const auto mask = static_cast<__mmask16>((1 << count) - 1);
  if constexpr (std::is_same_v<Vec, Double>)
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from);
  else
    return _mm512_maskz_loadu_ps(mask, from);
#else
  static_cast<void>(count);
  return load<Vec>(from);
#endif
}
template <class Vec>
BIRL_INLINE void store_first(NumberOf<Vec>* to, Vec v, Index count) {
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1 << count) - 1);
  if constexpr (std::is_same_v<Vec, Double>)
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), v);
  else
    _mm512_mask_storeu_ps(to, mask, v);
#else
  static_cast<void>(count);
  store(to, v);
#endif
}

// x where it is less (or larger) than y, else y: one instruction, which compilers do not find.
template <bool Largest, class Vec>
BIRL_INLINE Vec extreme(Vec x, Vec y) {
#if defined(BIRL_X86)
  if constexpr (std::is_same_v<Vec, Double>)
    return Largest ? BIRL_X86(max_pd)(x, y) : BIRL_X86(min_pd)(x, y);
  else if constexpr (std::is_same_v<Vec, Single>)
    return Largest ? BIRL_X86(max_ps)(x, y) : BIRL_X86(min_ps)(x, y);
  else
#endif
    return (Largest ? x > y : x < y) ? x : y;
}
template <class Vec>
BIRL_INLINE Vec smaller(Vec x, Vec y) {
  return extreme<false>(x, y);
}
template <class Vec>
BIRL_INLINE Vec larger(Vec x, Vec y) {
  return extreme<true>(x, y);
}

template <class T>
BIRL_INLINE T magnitude(T x) {
  return x < 0.0 ? -x : x;
}

// ---- across lanes -------------------------------------------------------------------------------

template <class Vec, class At, int... Place>
BIRL_INLINE auto shuffle(Vec a, Vec b, At at, std::integer_sequence<int, Place...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, at(Place)...);
#else
  constexpr int n = kCount<Vec>;
  return typename VectorOf<NumberOf<Vec>, sizeof...(Place)>::type{
      (at(Place) < n ? a[at(Place) % n] : b[at(Place) % n])...};
#endif
}
// Entries at(0), at(1), … of a and b in a row, `Count` of them.
template <int Count, class Vec, class At>
BIRL_INLINE auto shuffle(Vec a, Vec b, At at) {
  return shuffle(a, b, at, std::make_integer_sequence<int, Count>());
}
template <class Vec>
BIRL_INLINE auto low_half(Vec v) {
  return shuffle<kCount<Vec> / 2>(v, v, [](int i) { return i; });
}
template <class Vec>
BIRL_INLINE auto high_half(Vec v) {
  return shuffle<kCount<Vec> / 2>(v, v, [](int i) { return i + kCount<Vec> / 2; });
}

// The smallest (or largest) lane, by halves.
template <bool Largest, class Vec>
BIRL_INLINE double extreme(Vec v) {
  if constexpr (sizeof(Vec) > 16) {
    return extreme<Largest>(extreme<Largest>(low_half(v), high_half(v)));
  } else {
    NumberOf<Vec> best = v[0];
    for (int i = 1; i < kCount<Vec>; ++i)
      best = (Largest ? v[i] > best : v[i] < best) ? v[i] : best;
    return static_cast<double>(best);
  }
}

// Sums of the lanes of u and of v: of neighbours first, then by halves.
BIRL_INLINE VectorOf<double, 2>::type lane_sums(Double u, Double v) {
  const auto fold = [](auto self, auto sum) {
    if constexpr (sizeof sum > 16)
      return self(self, low_half(sum) + high_half(sum));
    else
      return sum;
  };
  const auto first = [](int i) { return i % 2 ? kWidth + i - 1 : i; };
  const auto second = [](int i) { return i % 2 ? kWidth + i : i + 1; };
  return fold(fold, shuffle<kWidth>(u, v, first) + shuffle<kWidth>(u, v, second));
}

// Of kWidth vectors, the sum of each on a lane of its own: neighbours first, at every stage.
inline Double lane_sums(Double (&v)[kWidth]) {
#pragma GCC unroll 4
  for (int count = kWidth; count > 1; count /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i)
      v[i] = shuffle<kWidth>(v[2 * i], v[2 * i + 1], [](int k) { return 2 * k; }) +
             shuffle<kWidth>(v[2 * i], v[2 * i + 1], [](int k) { return 2 * k + 1; });
  return v[0];
}

// Of a square: each stage deals the rows of its two halves into each other.
template <class Vec>
BIRL_INLINE void transpose(Vec (&row)[kCount<Vec>]) {
  constexpr int n = kCount<Vec>;
#pragma GCC unroll 4
  for (int stage = n; stage > 1; stage /= 2) {
    Vec next[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      const auto low = [](int k) { return k / 2 + k % 2 * n; };
      const auto high = [](int k) { return n / 2 + k / 2 + k % 2 * n; };
      next[2 * i] = shuffle<n>(row[i], row[i + n / 2], low);
      next[2 * i + 1] = shuffle<n>(row[i], row[i + n / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) row[i] = next[i];
  }
}

// body(n as a constant), of 1 … Most; body(0) for all others.
template <int Most, class Body>
BIRL_INLINE void with_constant(Index n, Body&& body) {
  if (Most == 0 || n == Most) return body(std::integral_constant<int, Most>());
  if constexpr (Most > 0) with_constant<Most - 1>(n, body);
}

// `Columns` numbers of one state, in vectors no longer than the processor's.
template <int Columns>
struct Row {
  static constexpr int kLength = Columns < kWidth ? Columns : kWidth;
  static constexpr int kCount = Columns / kLength;
  typedef typename VectorOf<double, kLength>::type Part;
  Part part[kCount];

  static BIRL_INLINE Row zero() {
    Row row;
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) row.part[i] = Part{};
    return row;
  }
  static BIRL_INLINE Row load(const double* p) {
    Row row;
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) row.part[i] = BIRL_ISA::load<Part>(p + i * kLength);
    return row;
  }
  BIRL_INLINE void save(double* p) const {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) store(p + i * kLength, part[i]);
  }
  // += scale · x
  BIRL_INLINE void add(double scale, const Row& x) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) part[i] += scale * x.part[i];
  }
};

// x[col] of eight columns.
BIRL_INLINE Row<8> gather(const double* x, const std::int32_t* col) {
  Row<8> out;
#if defined(__AVX512F__)
  const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(col));
  out.part[0] = _mm512_i32gather_pd(index, x, 8);
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    const __m128i index = _mm_loadu_si128(reinterpret_cast<const __m128i*>(col + 4 * i));
    const __m256d all = _mm256_castsi256_pd(_mm256_set1_epi64x(-1));
    out.part[i] = _mm256_mask_i32gather_pd(__m256d{}, x, index, all, 8);
  }
#else
  for (int i = 0; i < 4; ++i) out.part[i] = Double{x[col[2 * i]], x[col[2 * i + 1]]};
#endif
  return out;
}

}  // namespace
}  // namespace BIRL_ISA
}  // namespace birl
