// One application of the soft Bellman operator on a GPU, dense or CSR.
//
// NOT YET RUN ON A GPU: it compiles for every architecture of the build and shares its scalar
// mathematics with the CPU kernels, which are tested; the launch itself is not.
//
// Work: one warp owns one (n, g, s). Its lanes stride over the next states of one action at a time,
// so a dense row is read in coalesced 128-byte pieces; then they stride over the actions.
// Memory per warp: reads A rows of P (A·S entries, or the rows' CSR entries with their columns),
// V(n, g, ·) from L2, A rewards; writes 8 bytes of TV and up to 3·8·A of the optional outputs. P
// dominates: it is read once per g.
// Invariant: V enters relative to V(n, g, 0), so rounding is relative to the span of V. A butterfly
// sum gives every lane the same bits; nothing is accumulated across warps, so results do not depend
// on the schedule.
#include "core/log_sum_exp.h"
#include "cuda/entry/sweep.h"

namespace birl {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;  // per block, fewer where A is large
constexpr Index kSharedBytes = 48 * 1024;
constexpr unsigned kAll = 0xffffffffu;

__device__ double warp_sum(double x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(kAll, x, distance);
  return x;
}

struct RowSums {
  double product, total;  // Σ p·(V − V(0)) and Σ p
};

template <class Real>
struct DenseRows {
  const Real* values;
  Index states;

  __device__ RowSums sums(Index n, Index row, Index rows, const double* v, int lane) const {
    const Real* p = values + (n * rows + row) * states;
    RowSums result{0.0, 0.0};
    for (Index t = lane; t < states; t += kWarp) {
      const double x = static_cast<double>(p[t]);
      result.product += x * (v[t] - v[0]);
      result.total += x;
    }
    return result;
  }
};

template <class Real>
struct CsrRows {
  const Real* values;
  const Index* crow;
  const Index* col;
  Index nnz;

  __device__ RowSums sums(Index n, Index row, Index, const double* v, int lane) const {
    const Real* p = values + n * nnz;
    RowSums result{0.0, 0.0};
    for (Index k = crow[row] + lane; k < crow[row + 1]; k += kWarp) {
      const double x = static_cast<double>(p[k]);
      result.product += x * (v[col[k]] - v[0]);
      result.total += x;
    }
    return result;
  }
};

template <class Rows, class Real>
__global__ void __launch_bounds__(kWarp* kWarps) sweep_kernel(Rows model, DeviceSweep m) {
  extern __shared__ double shared[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Index warps = blockDim.x / kWarp, S = m.batch.states, A = m.batch.actions;
  double* q = shared + warp * A;  // q' of this warp's state
  const Index items = m.batch.transitions * m.batch.problems * S;
  const Real* reward = static_cast<const Real*>(m.batch.reward);

  for (Index item = blockIdx.x * warps + warp; item < items; item += gridDim.x * warps) {
    const Index i = item / S, s = item % S, n = i / m.batch.problems;
    const double* v = m.value + i * S;
    const double gamma = m.batch.discount[i], tau = m.batch.temperature[i], constant = gamma * v[0];

    LogSumExp total;  // over actions, the same in every lane
    for (Index a = 0; a < A; ++a) {
      const RowSums part = model.sums(n, s * A + a, S * A, v, lane);
      const double product = warp_sum(part.product), sum = warp_sum(part.total);
      const double r = static_cast<double>(reward[item * A + a]);
      const double x = sum == 0.0 ? r - constant : r + gamma * (product / sum);
      if (lane == 0) q[a] = x;
      total.add(m.batch.log_reference ? x / tau + m.batch.log_reference[item * A + a] : x / tau);
    }
    const double log_total = total.value(), image = tau * log_total;
    if (lane == 0) m.value_out[item] = image + constant;
    __syncwarp();
    for (Index a = lane; a < A; a += kWarp) {
      const Index at = item * A + a;
      const double reference = m.batch.log_reference ? m.batch.log_reference[at] : 0.0;
      const bool masked = reference == -__builtin_huge_val();
      const double x = masked ? reference : (q[a] / tau + reference) - total.maximum;
      if (m.advantage) m.advantage[at] = masked ? 0.0 : q[a] - image;
      if (m.policy) m.policy[at] = exp_nonpositive(x) / total.sum;
      if (m.log_policy) m.log_policy[at] = x - log_from_one(total.sum);
    }
    __syncwarp();  // before the next state overwrites q
  }
}

template <class Real>
cudaError_t launch(const DeviceSweep& m, cudaStream_t stream) {
  const Index fitting = kSharedBytes / (static_cast<Index>(sizeof(double)) * m.batch.actions);
  if (fitting < 1) return cudaErrorInvalidValue;
  const Index warps = fitting < kWarps ? fitting : kWarps;
  const Index items = m.batch.transitions * m.batch.problems * m.batch.states;
  const Index wanted = (items + warps - 1) / warps;
  const unsigned blocks = static_cast<unsigned>(wanted < (1 << 30) ? wanted : (1 << 30));
  const unsigned threads = static_cast<unsigned>(warps * kWarp);
  const std::size_t bytes = sizeof(double) * static_cast<std::size_t>(warps * m.batch.actions);
  const Real* values = static_cast<const Real*>(m.batch.transition);
  if (m.batch.crow)
    sweep_kernel<CsrRows<Real>, Real>
        <<<blocks, threads, bytes, stream>>>({values, m.batch.crow, m.batch.col, m.batch.nnz}, m);
  else
    sweep_kernel<DenseRows<Real>, Real>
        <<<blocks, threads, bytes, stream>>>({values, m.batch.states}, m);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_sweep(const DeviceSweep& request, cudaStream_t stream) {
  if (request.batch.total() == 0) return cudaSuccess;  // a grid cannot be empty
  return request.batch.is_double ? launch<double>(request, stream) : launch<float>(request, stream);
}

}  // namespace birl
