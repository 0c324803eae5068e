// What host and device code agree on: index type, status codes, the columns of `info`, inlining.
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

// The same for what no file of cpu/isa calls.
#if defined(__CUDACC__)
#define BIRL_CORE BIRL_HD
#else
#define BIRL_CORE inline
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

// 1/σ of a row of P, zero for a row without continuation.
BIRL_HD double inverse_row_sum(double sigma) { return sigma == 0.0 ? 0.0 : 1.0 / sigma; }

// What solved a problem, in the last column of `info`.
enum class Kernel : Index {
  kTorch = 0,
  kCpuPacked = 1,     // small dense: states on the lanes of a vector
  kCpuRows = 2,       // dense, row by row
  kCpuCsr = 3,        // sparse
  kCudaWarp = 10,     // one warp per problem
  kCudaBlock = 11,    // one block, P in shared memory
  kCudaGrid = 13,     // the whole device on one dense problem
  kCudaCsr = 14,      // one block, sparse
  kCudaGridCsr = 15,  // the whole device on one sparse problem
};

// What is checked of the rows of P: nothing; stochastic, or exactly zero where the process ends;
// stochastic.
enum class Rigour : Index { kOff, kOrEnding, kStochastic };

// Columns of `info`: half-span of δ, bound on ‖V − V*‖∞, passes over P, place and value of an
// invalid input, products of inner solvers, temperature, a constant near the value, and a Kernel;
// behind them, for each state, the bound on |V − V*|.
constexpr Index kInfo = 9;
constexpr Index kOffset = 7;  // the column of that constant

// The first thing wrong with an input, if anything is.
struct Defect {
  Status status = Status::kConverged;
  Index place = 0;     // flat index inside the problem; what it counts depends on the status
  double value = 0.0;  // the offending number
};

// How a solution of one problem ended.
struct Outcome {
  Status status;
  double residual, error_bound;
  Index passes, products;
  double offset;
  const double* bounds = nullptr;  // (S) of each state; null: all are error_bound
};

BIRL_CORE void write_info(const Outcome& outcome, const Defect& defect, double temperature,
                          Kernel kernel, double* info) {
  info[0] = outcome.residual;
  info[1] = outcome.error_bound;
  info[2] = static_cast<double>(outcome.passes);
  info[3] = static_cast<double>(defect.place);
  info[4] = defect.value;
  info[5] = static_cast<double>(outcome.products);
  info[6] = temperature;
  info[kOffset] = outcome.offset;
  info[8] = static_cast<double>(kernel);
}

// Largest S whose S² matrix is eliminated: beyond it the matrix is the larger evil.
constexpr Index kDirectLimit = 2500;

}  // namespace birl
