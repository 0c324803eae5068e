// Rows of P, and of a policy's matrix P_π or its transpose, for the grid: how they are
// read and formed.
//
// A home is copied to the device with its kernel; Home::Reading binds one transition to one block.
//   rows<kProducts, kInspect>(first, last, x, take)
//                                    take(row, sums) with sums = Σ_t P x(t), if kProducts, then
//                                    Σ_t P and the number of negative entries, if kInspect
//   form(first, last, weight, m)     the part of the matrix that comes from states [first, last)
//   product<kRight>(m, x, take)      take(s, y) for the block's own rows, y[c] = Σ_t m(s,t) x(t,c)
// Vectors of kRight columns lie column by column of a state, x[t·kRight + c].
#pragma once

#include "cuda/grid/pattern.h"
#include "cuda/layer/grid_layer.h"
#include "cuda/layer/results.h"

namespace birl::device {

// ---- four neighbours at once -------------------------------------------------------------------

template <class Real>
BIRL_DEVICE void load_four(const Real* p, bool aligned_rows, Real (&v)[4]) {
#if defined(__CUDACC__)
  if (aligned_rows) {
    if constexpr (sizeof(Real) == 4) {
      const float4 four = *reinterpret_cast<const float4*>(p);
      v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    } else {
      const double2 low = *reinterpret_cast<const double2*>(p);
      const double2 high = *reinterpret_cast<const double2*>(p + 2);
      v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
    }
    return;
  }
#else
  (void)aligned_rows;
#endif
  BIRL_UNROLL
  for (int j = 0; j < 4; ++j) v[j] = p[j];
}

// One column of which a constant is taken off as it is read; aligned as every array is.
struct Shifted {
  const double* x;
  double shift;
};

// Whether rows of n numbers start on 16-byte boundaries.
template <class Real>
BIRL_DEVICE bool rows_aligned(const Real* first, Index n) {
  return (reinterpret_cast<std::uintptr_t>(first) | static_cast<std::uintptr_t>(n * sizeof(Real))) %
             16 ==
         0;
}

// A lane's share of Σ_t row(t) (x(t) − shift) for two rows, of Σ_t row(t), and of the number of
// negative entries: lane l takes the states 4l … 4l + 3 of every 128. part[2j + r] is quantity j of
// row r.
template <bool kProducts, bool kInspect, class Real>
BIRL_DEVICE void lane_sums(const Real* const (&row)[2], bool aligned_rows, Index n, int lane,
                           const Shifted& of, double* part) {
  const double lowest = -below_zero(sizeof(Real) == 8, n);
#if defined(__CUDACC__)
#pragma unroll(kInspect || sizeof(Real) == 8 ? 1 : 2)
#endif
  for (Index base = 0; base < n; base += 128) {
    const Index t = base + 4 * lane;
    const bool whole = t + 4 <= n;
    Real p[2][4];
    double w[4];
    BIRL_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (whole) {
        load_four(row[r] + t, aligned_rows, p[r]);
      } else {
        BIRL_UNROLL
        for (int j = 0; j < 4; ++j) p[r][j] = t + j < n ? row[r][t + j] : Real(0);
      }
    }
    if (kProducts && whole) {
      const Pair low = load_pair(of.x + t), high = load_pair(of.x + t + 2);
      w[0] = low.first - of.shift, w[1] = low.second - of.shift;
      w[2] = high.first - of.shift, w[3] = high.second - of.shift;
    } else {
      BIRL_UNROLL
      for (int j = 0; j < 4; ++j) w[j] = kProducts && t + j < n ? of.x[t + j] - of.shift : 0.0;
    }
    BIRL_UNROLL
    for (int r = 0; r < 2; ++r) {
      BIRL_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (kProducts) part[r] += static_cast<double>(p[r][j]) * w[j];
        if (!kInspect) continue;
        part[2 * kProducts + r] += static_cast<double>(p[r][j]);
        part[2 * kProducts + 2 + r] += p[r][j] < lowest ? 1.0 : 0.0;
      }
    }
  }
}

// The same for one row of a formed matrix and kRight columns; rows are padded to multiples of four
// with zeros, and so is x.
template <int kRight>
BIRL_DEVICE void lane_products(const double* row, Index pitch, int lane, const double* x,
                               double (&part)[kRight]) {
#if defined(__CUDACC__)
#pragma unroll(kRight > 1 ? 1 : 2)
#endif
  for (Index t = 4 * lane; t < pitch; t += 128) {
    double p[4], w[4 * kRight];
    load_four(row + t, true, p);
    BIRL_UNROLL
    for (int i = 0; i < 4 * kRight; i += 2) {
      const Pair two = load_pair(x + t * kRight + i);
      w[i] = two.first, w[i + 1] = two.second;
    }
    BIRL_UNROLL
    for (int i = 0; i < 4 * kRight; ++i) part[i % kRight] += p[i / kRight] * w[i];
  }
}

BIRL_HD constexpr Index padded(Index n) { return (n + 3) / 4 * 4; }

// ---- dense -------------------------------------------------------------------------------------

// A warp reads two rows of P at a time, coalesced, 16 bytes a lane. The rows of a tile of states
// are read again while their part of P_π is formed, from L1 or L2, where they still are.
struct GridDenseRows {
  static constexpr Kernel kName = Kernel::kCudaGrid;
  static constexpr int kStateLanes = 32;  // that work on one state's actions

  Stored values;  // (N, S, A, S)
  Index states, actions;
  bool transpose;  // of the matrix formed

  BIRL_HD Index entries() const { return states * actions * states; }
  // States that are worked on together: two rows for each warp.
  BIRL_HD Index tile() const { return actions < 12 ? 12 / actions : 1; }
  BIRL_HD Index matrix_entries() const { return states * padded(states); }
  BIRL_HD Index matrix_row(Index) const { return states; }  // entries
  BIRL_HD Index padded_states() const { return padded(states); }
  // Dependent additions in the sum of a row of so many entries.
  BIRL_HD double additions(Index length) const { return static_cast<double>(length) / 32.0 + 9.0; }

  template <class Block>
  class Reading {
   public:
    BIRL_DEVICE Reading(const GridDenseRows& home, Block& block, Index n)
        : home_(home),
          block_(block),
          own_(share_of(home.states, block.rank, block.count)),
          offset_(n * home.entries()) {}

    BIRL_DEVICE double stored(Index entry) const { return home_.values[offset_ + entry]; }
    BIRL_DEVICE Share entries(Index row) const {
      return {row * home_.states, (row + 1) * home_.states};
    }

    template <bool kProducts, bool kInspect, class Take>
    BIRL_DEVICE void rows(Index first, Index last, const Shifted& x, Take&& take) {
      constexpr int kSums = (kProducts ? 1 : 0) + (kInspect ? 2 : 0);
      const Index row1 = last * home_.actions;
      block_.template groups<32>([&](const auto& g) {
        for (Index row = first * home_.actions + 2 * g.rank; row < row1; row += 2 * g.count) {
          const bool pair = row + 1 < row1;
          double sums[2 * kSums];
          g.sums(sums, [&](int lane, double (&part)[2 * kSums]) {
            if (home_.values.is_double)
              lane_share<kProducts, kInspect, double>(row, pair, lane, x, part);
            else
              lane_share<kProducts, kInspect, float>(row, pair, lane, x, part);
          });
          g.each([&](int lane) {
            if (lane >= (pair ? 2 : 1)) return;
            double own[kSums];
            BIRL_UNROLL
            for (int i = 0; i < kSums; ++i) own[i] = lane == 0 ? sums[2 * i] : sums[2 * i + 1];
            take(row + lane, own);
          });
        }
      });
    }

    BIRL_DEVICE void form(Index first, Index last, const double* weight, double* matrix) {
      const Index S = home_.states, A = home_.actions, pitch = padded(S);
      const Index across = home_.transpose ? 1 : pitch, along = home_.transpose ? pitch : 1;
      block_.phase([&](Thread t) {
        for (Index s = first; s < last; ++s)
          for (Index next = t.rank; next < pitch; next += t.count) {
            double sum = 0.0;
            if (next < S)
              for (Index a = 0; a < A; ++a)
                sum += weight[s * A + a] * stored((s * A + a) * S + next);
            if (next < S || !home_.transpose) matrix[s * across + next * along] = sum;
          }
        if (!home_.transpose) return;
        // The padding of the transpose's rows is nobody's state.
        for (Index s = first + t.rank; s < last; s += t.count)
          for (Index i = S; i < pitch; ++i) matrix[s * pitch + i] = 0.0;
      });
    }

    template <int kRight, class Take>
    BIRL_DEVICE void product(const double* matrix, const double* x, Take&& take) {
      const Index pitch = padded(home_.states);
      block_.template groups<32>([&](const auto& g) {
        for (Index s = own_.begin + g.rank; s < own_.end; s += g.count) {
          double sums[kRight];
          g.sums(sums, [&](int lane, double (&part)[kRight]) {
            lane_products<kRight>(matrix + s * pitch, pitch, lane, x, part);
          });
          g.each([&](int lane) {
            if (lane == 0) take(s, sums);
          });
        }
      });
    }

   private:
    template <bool kProducts, bool kInspect, class Real>
    BIRL_DEVICE void lane_share(Index row, bool pair, int lane, const Shifted& x,
                                double* part) const {
      const Index S = home_.states;
      const Real* const values = static_cast<const Real*>(home_.values.first) + offset_;
      const Real* const both[2] = {values + row * S, values + (row + (pair ? 1 : 0)) * S};
      lane_sums<kProducts, kInspect, Real>(both, rows_aligned(values, S), S, lane, x, part);
    }

    const GridDenseRows& home_;
    Block& block_;
    Share own_;
    Index offset_;
  };
};

// ---- CSR ---------------------------------------------------------------------------------------

// A few lanes read one row. A product reads the merged values of P_π, 12 bytes an entry.
struct GridCsrRows {
  static constexpr Kernel kName = Kernel::kCudaGridCsr;
  static constexpr int kLanes = 8;  // rows of 5 to 50 entries keep most of them busy
  static constexpr int kStateLanes = 1;

  Stored values;  // (N, nnz)
  Index states, actions;
  const Index* crow;  // (S·A + 1)
  const Index* col;   // (nnz)
  Index nnz;
  GridPattern pattern;  // of P_π, or of its transpose

  BIRL_HD Index tile() const { return actions < 512 ? 512 / actions : 1; }
  BIRL_HD Index matrix_entries() const { return pattern.count; }
  BIRL_HD Index matrix_row(Index s) const { return pattern.crow[s + 1] - pattern.crow[s]; }
  BIRL_HD Index padded_states() const { return states; }
  BIRL_HD double additions(Index length) const {
    return static_cast<double>(length / kLanes) + 8.0;
  }

  template <class Block>
  class Reading {
   public:
    BIRL_DEVICE Reading(const GridCsrRows& home, Block& block, Index n)
        : home_(home),
          block_(block),
          own_(share_of(home.states, block.rank, block.count)),
          offset_(n * home.nnz) {}

    BIRL_DEVICE double stored(Index entry) const { return home_.values[offset_ + entry]; }
    BIRL_DEVICE Share entries(Index row) const { return {home_.crow[row], home_.crow[row + 1]}; }

    template <bool kProducts, bool kInspect, class Take>
    BIRL_DEVICE void rows(Index first, Index last, const Shifted& x, Take&& take) {
      constexpr int kSums = (kProducts ? 1 : 0) + (kInspect ? 2 : 0);
      const Index row1 = last * home_.actions;
      const double lowest = -below_zero(home_.values.is_double, home_.states);
      block_.template groups<kLanes>([&](const auto& g) {
        for (Index row = first * home_.actions + g.rank; row < row1; row += g.count) {
          double sums[kSums];
          g.sums(sums, [&](int lane, double (&part)[kSums]) {
            const Share mine = entries(row);
            for (Index k = mine.begin + lane; k < mine.end; k += kLanes) {
              const double p = stored(k);
              if (kProducts) part[0] += p * (x.x[home_.col[k]] - x.shift);
              if (!kInspect) continue;
              part[kSums - 2] += p;
              part[kSums - 1] += p < lowest ? 1.0 : 0.0;
            }
          });
          g.each([&](int lane) {
            if (lane == 0) take(row, sums);
          });
        }
      });
    }

    // A thread owns a state, and so every entry to which that adds.
    BIRL_DEVICE void form(Index first, Index last, const double* weight, double* matrix) {
      const Index A = home_.actions;
      const Index* const slot = home_.pattern.slot;
      block_.phase([&](Thread t) {
        for (Index s = first + t.rank; s < last; s += t.count) {
          const Index begin = home_.crow[s * A], end = home_.crow[(s + 1) * A];
          for (Index k = begin; k < end; ++k) matrix[slot[k]] = 0.0;
          for (Index row = s * A; row < (s + 1) * A; ++row)
            for (Index k = home_.crow[row]; k < home_.crow[row + 1]; ++k)
              matrix[slot[k]] += weight[row] * stored(k);
        }
      });
    }

    template <int kRight, class Take>
    BIRL_DEVICE void product(const double* matrix, const double* x, Take&& take) {
      const GridPattern& pattern = home_.pattern;
      block_.template groups<kLanes>([&](const auto& g) {
        for (Index s = own_.begin + g.rank; s < own_.end; s += g.count) {
          double sums[kRight];
          g.sums(sums, [&](int lane, double (&part)[kRight]) {
            for (Index e = pattern.crow[s] + lane; e < pattern.crow[s + 1]; e += kLanes) {
              const double p = matrix[e];
              const double* const at = x + static_cast<Index>(pattern.col[e]) * kRight;
              BIRL_UNROLL
              for (int c = 0; c < kRight; ++c) part[c] += p * at[c];
            }
          });
          g.each([&](int lane) {
            if (lane == 0) take(s, sums);
          });
        }
      });
    }

   private:
    const GridCsrRows& home_;
    Block& block_;
    Share own_;
    Index offset_;
  };
};

}  // namespace birl::device
