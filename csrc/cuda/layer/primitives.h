// The operations a GPU has instructions for and the host imitates.
#pragma once

#include "cuda/layer/layer.h"

namespace birl::device {

struct Pair {
  double first, second;
};

// Two neighbouring doubles in one load; p is aligned to both.
BIRL_DEVICE Pair load_pair(const double* p) {
#if defined(__CUDACC__)
  const double2 pair = *reinterpret_cast<const double2*>(p);
  return {pair.x, pair.y};
#else
  return {p[0], p[1]};
#endif
}

// x in double, converted at each use. A plain conversion of a number that stays in a register is
// moved out of the loop around it, and then takes two registers for good.
BIRL_DEVICE double widen(double x) { return x; }
BIRL_DEVICE double widen(float x) {
#if defined(__CUDACC__)
  double wide;
  asm volatile("cvt.f64.f32 %0, %1;" : "=d"(wide) : "f"(x));
  return wide;
#else
  return static_cast<double>(x);
#endif
}

#if defined(__CUDACC__)
constexpr int kWarp = 32;

// x of the lane whose number differs from this lane's by the bits of `distance`.
template <class T>
BIRL_DEVICE T shuffle_xor(const T& x, int distance) {
  static_assert(sizeof(T) % sizeof(unsigned) == 0, "T must be made of whole words");
  constexpr int kWords = sizeof(T) / sizeof(unsigned);
  unsigned words[kWords];
  __builtin_memcpy(words, &x, sizeof(T));
  BIRL_UNROLL
  for (int i = 0; i < kWords; ++i)
    words[i] = __shfl_xor_sync(0xffffffffu, words[i], distance, kWarp);
  T other;
  __builtin_memcpy(&other, words, sizeof(T));
  return other;
}

// The join over all lanes of a warp, in every lane.
template <class T, class Join>
BIRL_DEVICE T warp_join(T x, const Join& join) {
  BIRL_UNROLL
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = join(x, shuffle_xor(x, distance));
  return x;
}
#endif

}  // namespace birl::device
