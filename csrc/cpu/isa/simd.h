// Vectors of doubles for the files that are compiled once per instruction set (cpu/isa/dense.h).
// Nothing here may be shared between them.
#pragma once

#include "core/common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace birl::BIRL_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 8;
#elif defined(__AVX2__)
constexpr int kWidth = 4;
#else
constexpr int kWidth = 2;
#endif

template <int Width>
struct VectorOf {
  typedef double type __attribute__((vector_size(8 * Width)));
};
typedef VectorOf<kWidth>::type Vec;

constexpr int kLanes = 16;  // of every reduction, on every instruction set
constexpr int kParts = kLanes / kWidth;

template <class V>
inline __attribute__((always_inline)) V load_as(const double* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline __attribute__((always_inline)) void store(double* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// `Columns` numbers of one state, in vectors no longer than the processor's.
template <int Columns>
struct Row {
  static constexpr int kLength = Columns < kWidth ? Columns : kWidth;
  static constexpr int kCount = Columns / kLength;
  typedef typename VectorOf<kLength>::type Part;
  Part part[kCount];

  static inline __attribute__((always_inline)) Row zero() {
    Row row;
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) row.part[i] = Part{};
    return row;
  }
  static inline __attribute__((always_inline)) Row load(const double* p) {
    Row row;
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) row.part[i] = load_as<Part>(p + i * kLength);
    return row;
  }
  inline __attribute__((always_inline)) void save(double* p) const {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) store(p + i * kLength, part[i]);
  }
  // += scale · x
  inline __attribute__((always_inline)) void add(double scale, const Row& x) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) part[i] += scale * x.part[i];
  }
};

}  // namespace
}  // namespace birl::BIRL_ISA
