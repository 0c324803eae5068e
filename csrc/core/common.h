// What host and device code agree on: index type, status codes, inlining.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BIRL_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always inlined: a shared out-of-line copy could be the one built for a newer instruction set.
#define BIRL_HD inline __attribute__((always_inline))
#else
#define BIRL_HD inline
#endif

namespace birl {

using Index = std::int64_t;

enum class Status : Index {
  kConverged = 0,
  kMaxIterations = 1,
  kStagnated = 2,  // rounding floor above the tolerance asked for
  kNonFinite = 3,
  kRowSum = 10,
  kNegativeProbability = 11,
  kNonFiniteProbability = 12,
  kNonFiniteReward = 13,
  kDiscount = 14,
  kTemperature = 15,
  kNoAction = 16,
  kReference = 17,
};

}  // namespace birl
