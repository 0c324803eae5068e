// Rows of P, and of a policy's matrix P_π, for a team of several blocks: how they are read.
//
// A home is copied to the device with its kernel; Home::Reading binds one transition to one block.
//   rows<kInspect>(first, last, x, take)  take(row, sums) with sums = Σ_t P x(t) and, with
//                                    kInspect, Σ_t P and the number of negative entries
//   form(first, last, weight, m)     rows of P_π for states [first, last) of the rows just read
//   product(m, x, K, take)           take(s, k, Σ_t P_π(s,t) x(t,k)) for the block's own states
// m is home.matrix<Stored>(…); vectors of K columns lie column by column of a state, x[t·K + k].
#pragma once

#include "device/wide_layer.h"
#include "device/wide_pattern.h"

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

// What rows are multiplied with: at(t, c) is column c at next state t, four(t, …) four states.
// One column of its own, on chip or off, aligned as every array is; t is a multiple of four.
struct Column {
  const double* x;
  BIRL_DEVICE double at(Index t, int) const { return x[t]; }
  BIRL_DEVICE void four(Index t, double (&w)[4][1]) const {
    const Pair low = load_pair(x + t), high = load_pair(x + t + 2);
    w[0][0] = low.first, w[1][0] = low.second, w[2][0] = high.first, w[3][0] = high.second;
  }
};

// `valid` of `right` columns, x[t·right + c].
struct Columns {
  const double* x;
  Index right;
  int valid;
  BIRL_DEVICE double at(Index t, int c) const { return c < valid ? x[t * right + c] : 0.0; }
  template <int kRight>
  BIRL_DEVICE void four(Index t, double (&w)[4][kRight]) const {
    BIRL_UNROLL
    for (int j = 0; j < 4; ++j) {
      BIRL_UNROLL
      for (int c = 0; c < kRight; ++c) w[j][c] = at(t + j, c);
    }
  }
};

// Whether rows of n numbers start on 16-byte boundaries.
template <class Real>
BIRL_DEVICE bool rows_aligned(const Real* first, Index n) {
  return (reinterpret_cast<std::uintptr_t>(first) | static_cast<std::uintptr_t>(n * sizeof(Real))) %
             16 ==
         0;
}

// A lane's share of Σ_t row(t) x(t, c) for kRows rows and kRight columns: lane l takes the states
// 4l … 4l + 3 of every 128. visit(r, t, p) sees each entry once.
template <int kRows, int kRight, class Real, class X, class Visit>
BIRL_DEVICE void lane_products(const Real* const (&row)[kRows], bool aligned_rows, Index n,
                               int lane, const X& x, double* part, Visit&& visit) {
  const Index whole = n / 128 * 128;
#if defined(__CUDACC__)
#pragma unroll(kRight > 1 ? 1 : 2)
#endif
  for (Index base = 0; base < whole; base += 128) {
    const Index t = base + 4 * lane;
    Real p[kRows][4];
    double w[4][kRight];
    BIRL_UNROLL
    for (int r = 0; r < kRows; ++r) load_four(row[r] + t, aligned_rows, p[r]);
    x.four(t, w);
    BIRL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      BIRL_UNROLL
      for (int j = 0; j < 4; ++j) {
        BIRL_UNROLL
        for (int c = 0; c < kRight; ++c)
          part[r * kRight + c] += static_cast<double>(p[r][j]) * w[j][c];
        visit(r, t + j, p[r][j]);
      }
    }
  }
  for (Index t = whole + 4 * lane; t < n && t < whole + 4 * lane + 4; ++t) {
    BIRL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Real p = row[r][t];
      BIRL_UNROLL
      for (int c = 0; c < kRight; ++c) part[r * kRight + c] += static_cast<double>(p) * x.at(t, c);
      visit(r, t, p);
    }
  }
}

BIRL_HD constexpr double lane_additions(double n) { return n / 32.0 + 9.0; }

// ---- dense -------------------------------------------------------------------------------------

// P_π by rows: those from `first` on, `pitch` numbers apart.
template <class Stored>
struct DenseMatrix {
  Stored* values;
  Index first, pitch;
  BIRL_DEVICE Stored* row(Index s) const { return values + (s - first) * pitch; }
};

// The states in slices for products with P_πᵀ, a function of their number alone.
struct Slices {
  Index states, length, count;
  BIRL_HD explicit Slices(Index n) : states(n) {
    constexpr Index kMost = 16, kLeast = 64;
    length = (n + kMost - 1) / kMost < kLeast ? kLeast : (n + kMost - 1) / kMost;
    count = (n + length - 1) / length;
  }
  BIRL_HD Index begin(Index slice) const { return slice * length; }
  BIRL_HD Index end(Index slice) const {
    return (slice + 1) * length < states ? (slice + 1) * length : states;
  }
};

// One warp reads two rows at a time, coalesced, 16 bytes a lane. With kOnChip the rows of a block's
// own states, and their rows of P_π, stay in its shared memory; else they are read from global
// memory, kept on chip while their states are worked on if that fits (`staged`), so that forming
// P_π reads nothing again.
template <class Real_, bool kOnChip_>
struct DenseWide {
  using Real = Real_;
  static constexpr bool kOnChip = kOnChip_;
  static constexpr int kStateLanes = 32;  // that work on one state's actions
  static constexpr bool kSparse = false;
  static constexpr bool kShifts = false;  // whether any operand can be shifted as it is read

  const Real* values;  // (N, S, A, S)
  Index states, actions;
  Index tile;       // states worked on together
  Index most;       // states of the largest share
  bool staged;      // !kOnChip: a tile's rows are kept on chip
  bool near;        // the operand of a product is copied to the chip
  bool far_tables;  // so many actions that a tile's tables over them do not fit there

  struct Chip {
    Real* rows;
    Real* matrix;
    double* operand;
  };
  template <class Stored>
  using Matrix = DenseMatrix<Stored>;

  BIRL_HD Index pitch() const { return (states + 3) / 4 * 4; }
  BIRL_HD Index entries() const { return states * actions * states; }
  BIRL_HD bool keeps_weights() const { return far_tables; }
  // Dependent additions in the sum of a row of so many entries.
  BIRL_HD double additions(Index length) const {
    return lane_additions(static_cast<double>(length));
  }

  template <class Memory>
  BIRL_HD Chip lay_out_chip(Memory& own) const {
    Chip chip{};
    if (kOnChip) {
      chip.rows = own.template take<Real>(most * actions * pitch());
      chip.matrix = own.template take<Real>(most * pitch());
    } else if (staged) {
      chip.rows = own.template take<Real>(tile * actions * pitch());
    }
    if (near) chip.operand = own.template take<double>(pitch());
    return chip;
  }

  template <class Stored, class Memory>
  BIRL_HD Stored* lay_out_matrix(Memory& spill) const {
    return kOnChip ? nullptr : spill.template take<Stored>(states * states);
  }
  // What a product with P_πᵀ needs besides.
  template <class Memory>
  BIRL_HD double* lay_out_transposed(Memory& spill, Index right) const {
    return spill.template take<double>(Slices(states).count * states * right);
  }

  template <class Block>
  class Reading {
   public:
    BIRL_DEVICE Reading(const DenseWide& home, Block& block, const Chip& chip, Index n)
        : home_(home),
          block_(block),
          chip_(chip),
          own_(share_of(home.states, block.rank, block.count)),
          source_(home.values + n * home.entries()),
          aligned_(rows_aligned(source_, home.states)) {}

    template <class Stored>
    BIRL_DEVICE DenseMatrix<Stored> matrix(Stored* spilled) const {
      if constexpr (kOnChip)
        return {chip_.matrix, own_.begin, home_.pitch()};
      else
        return {spilled, 0, home_.states};
    }

    BIRL_DEVICE const Real* stored(Index entry) const { return source_ + entry; }
    BIRL_DEVICE Share entries(Index row) const {
      return {row * home_.states, (row + 1) * home_.states};
    }

    // On chip: fetches the rows of the block's own states.
    BIRL_DEVICE void load() {
      if constexpr (kOnChip) {
        const Index S = home_.states, A = home_.actions;
        block_.template groups<32>([&](const auto& g) {
          for (Index row = own_.begin * A + g.rank; row < own_.end * A; row += g.count)
            g.each([&](int lane) {
              Real* const target = kept(row, own_.begin);
              for (Index t = lane; t < S; t += 32) target[t] = source_[row * S + t];
            });
        });
      }
    }

    // Makes x − shift the operand of what follows; far from the chip only shift = 0.
    BIRL_DEVICE void bring(const double* x, double shift) {
      operand_ = x;
      if (!home_.near) return;
      operand_ = chip_.operand;
      block_.phase([&](Thread t) {
        for (Index i = t.rank; i < home_.states; i += t.count) chip_.operand[i] = x[i] - shift;
      });
    }

    // Two rows at a time.
    template <bool kInspect, class Take>
    BIRL_STAGE void rows(Index first, Index last, Take&& take) {
      constexpr int kRows = 2, kSums = kInspect ? 3 : 1;
      const Index S = home_.states, row0 = first * home_.actions, row1 = last * home_.actions;
      const bool stage = !kOnChip && home_.staged, aligned_rows = kOnChip || aligned_;
      const Column x{operand_};
      block_.template groups<32>([&](const auto& g) {
        for (Index row = row0 + kRows * g.rank; row < row1; row += kRows * g.count) {
          const bool pair = row + 1 < row1;
          const Real* source[kRows];
          Real* target[kRows];
          BIRL_UNROLL
          for (int r = 0; r < kRows; ++r) {
            const Index at = row + (pair ? r : 0);
            source[r] = kOnChip ? kept(at, own_.begin) : source_ + at * S;
            target[r] = stage ? kept(at, first) : nullptr;
          }
          double sums[kRows * kSums];
          g.sums(sums, [&](int lane, double (&part)[kRows* kSums]) {
            lane_products<kRows, 1>(source, aligned_rows, S, lane, x, part,
                                    [&](int r, Index t, Real p) {
                                      if (stage) target[r][t] = p;
                                      if (!kInspect) return;
                                      part[kRows + r] += static_cast<double>(p);
                                      part[2 * kRows + r] += p < Real(0) ? 1.0 : 0.0;
                                    });
          });
          g.each([&](int lane) {
            if (lane >= (pair ? 2 : 1)) return;
            double own[kSums];
            BIRL_UNROLL
            for (int i = 0; i < kSums; ++i)
              own[i] = lane == 0 ? sums[i * kRows] : sums[i * kRows + 1];
            take(row + lane, own);
          });
        }
      });
    }

    template <class Stored>
    BIRL_STAGE void form(Index first, Index last, const double* weight,
                         const DenseMatrix<Stored>& m) {
      const Index S = home_.states, A = home_.actions;
      block_.phase([&](Thread t) {
        for (Index s = first; s < last; ++s) {
          Stored* const target = m.row(s);
          const double* const w = weight + (s - first) * A;
          const bool on_chip = kOnChip || home_.staged;
          const Real* const p =
              on_chip ? kept(s * A, kOnChip ? own_.begin : first) : source_ + s * A * S;
          const Index pitch = on_chip ? home_.pitch() : S;
          for (Index next = t.rank; next < S; next += t.count) {
            double sum = 0.0;
            for (Index a = 0; a < A; ++a) sum += w[a] * static_cast<double>(p[a * pitch + next]);
            target[next] = static_cast<Stored>(sum);
          }
        }
      });
    }

    template <class Stored, class Take>
    BIRL_DEVICE void product(const DenseMatrix<Stored>& m, const double* x, Index K, const double*,
                             Take&& take) {
      if (K > 1) {
        for (Index k = 0; k < K; k += 4)
          multiply<4>(m, Columns{x + k, K, static_cast<int>(K - k < 4 ? K - k : 4)}, k, K, take);
        return;
      }
      bring(x, 0.0);
      multiply<1>(m, Column{operand_}, 0, 1, take);
    }

    // part(i, t, k) = Σ_s P_π(s,t) x(s,k) over the i-th slice of the states s: a warp owns a slice
    // and 32 neighbouring t, so that it reads whole lines, and nothing is added by two.
    template <class Stored>
    BIRL_STAGE void transposed_slices(const DenseMatrix<Stored>& m, const double* x, Index K,
                                      double* part) {
      const Index S = home_.states, tiles = (S + 31) / 32;
      const Slices slices(S);
      block_.template groups<32>([&](const auto& g) {
        for (Index task = g.place; task < tiles * slices.count; task += g.places) {
          const Index slice = task / tiles, first = task % tiles * 32;
          for (Index k = 0; k < K; k += 4)
            g.each([&](int lane) {
              const Index t = first + lane;
              if (t >= S) return;
              double sum[4] = {};
              const int valid = static_cast<int>(K - k < 4 ? K - k : 4);
#if defined(__CUDACC__)
#pragma unroll 4
#endif
              for (Index s = slices.begin(slice); s < slices.end(slice); ++s) {
                const double p = static_cast<double>(m.row(s)[t]);
                BIRL_UNROLL
                for (int c = 0; c < 4; ++c) sum[c] += c < valid ? p * x[s * K + k + c] : 0.0;
              }
              for (int c = 0; c < valid; ++c) part[(slice * S + t) * K + k + c] = sum[c];
            });
        }
      });
    }

   private:
    // Row `row` in shared memory, where the rows from state `first` on lie.
    BIRL_DEVICE Real* kept(Index row, Index first) const {
      return chip_.rows + (row - first * home_.actions) * home_.pitch();
    }

    template <int kRight, class Stored, class X, class Take>
    BIRL_STAGE void multiply(const DenseMatrix<Stored>& m, const X& x, Index k, Index K,
                             Take&& take) {
      constexpr int kRows = 2;
      const Index S = home_.states;
      const bool aligned_rows = kOnChip || rows_aligned(m.values, S);
      block_.template groups<32>([&](const auto& g) {
        for (Index s = own_.begin + kRows * g.rank; s < own_.end; s += kRows * g.count) {
          const bool pair = s + 1 < own_.end;
          const Stored* const row[kRows] = {m.row(s), m.row(pair ? s + 1 : s)};
          double sums[kRows * kRight];
          g.sums(sums, [&](int lane, double (&part)[kRows* kRight]) {
            lane_products<kRows, kRight>(row, aligned_rows, S, lane, x, part,
                                         [](int, Index, Stored) {});
          });
          g.each([&](int lane) {
            BIRL_UNROLL
            for (int r = 0; r < kRows; ++r) {
              BIRL_UNROLL
              for (int c = 0; c < kRight; ++c)
                if (lane == r * kRight + c && k + c < K && (r == 0 || pair))
                  take(s + r, k + c, sums[r * kRight + c]);
            }
          });
        }
      });
    }

    const DenseWide& home_;
    Block& block_;
    const Chip& chip_;
    Share own_;
    const Real* source_;
    bool aligned_;
    const double* operand_ = nullptr;
  };
};

// ---- CSR ---------------------------------------------------------------------------------------

// kLanes lanes read one row; the launcher picks them after the mean length of a row. A product with
// P_π reads its merged values, or where merging pays nothing (no pattern) the rows of P themselves.
template <class Real_, int kLanes>
struct CsrWide {
  using Real = Real_;
  static constexpr bool kOnChip = false;
  static constexpr int kStateLanes = 1;
  static constexpr bool kShifts = true, kSparse = true;

  const Real* values;  // (N, nnz)
  Index states, actions;
  Index tile;
  const Index* crow;  // (S·A + 1)
  const Index* col;   // (nnz)
  Index nnz;
  WidePattern pattern;
  bool far_tables;

  struct Chip {
    double* product;  // of a tile's rows, for a product without a pattern
  };
  template <class Stored>
  struct Matrix {
    Stored* values;
  };

  BIRL_HD Index entries() const { return nnz; }
  BIRL_HD bool merged() const { return pattern.crow != nullptr; }
  BIRL_HD bool keeps_weights() const { return far_tables || !merged(); }
  BIRL_HD double additions(Index length) const {
    return static_cast<double>(length / kLanes) + 8.0;
  }

  template <class Memory>
  BIRL_HD Chip lay_out_chip(Memory& own) const {
    return {merged() ? nullptr : own.template take<double>(tile * actions)};
  }
  template <class Stored, class Memory>
  BIRL_HD Stored* lay_out_matrix(Memory& spill) const {
    return merged() ? spill.template take<Stored>(pattern.nnz) : nullptr;
  }
  template <class Memory>
  BIRL_HD double* lay_out_transposed(Memory& spill, Index) const {
    return spill.template take<double>(pattern.nnz);
  }

  template <class Block>
  class Reading {
   public:
    BIRL_DEVICE Reading(const CsrWide& home, Block& block, const Chip& chip, Index n)
        : home_(home),
          block_(block),
          chip_(chip),
          own_(share_of(home.states, block.rank, block.count)),
          source_(home.values + n * home.nnz) {}

    template <class Stored>
    BIRL_DEVICE Matrix<Stored> matrix(Stored* spilled) const {
      return {spilled};
    }

    BIRL_DEVICE const Real* stored(Index entry) const { return source_ + entry; }
    BIRL_DEVICE Share entries(Index row) const { return {home_.crow[row], home_.crow[row + 1]}; }

    BIRL_DEVICE void load() {}
    BIRL_DEVICE void bring(const double* x, double shift) {
      x_ = x;
      shift_ = shift;
    }

    template <bool kInspect, class Take>
    BIRL_STAGE void rows(Index first, Index last, Take&& take) {
      constexpr int kSums = kInspect ? 3 : 1;
      const Index row1 = last * home_.actions;
      block_.template groups<kLanes>([&](const auto& g) {
        for (Index row = first * home_.actions + g.rank; row < row1; row += g.count) {
          double sums[kSums];
          g.sums(sums, [&](int lane, double (&part)[kSums]) {
            for (Index k = home_.crow[row] + lane; k < home_.crow[row + 1]; k += kLanes) {
              const double p = static_cast<double>(source_[k]);
              part[0] += p * (x_[home_.col[k]] - shift_);
              if constexpr (kInspect) {
                part[1] += p;
                part[2] += p < 0.0 ? 1.0 : 0.0;
              }
            }
          });
          g.each([&](int lane) {
            if (lane == 0) take(row, sums);
          });
        }
      });
    }

    // A thread owns a state, and so everything that is written for it.
    template <class Stored>
    BIRL_STAGE void form(Index first, Index last, const double* weight, const Matrix<Stored>& m) {
      if (!home_.merged()) return;
      const Index A = home_.actions;
      block_.phase([&](Thread t) {
        for (Index s = first + t.rank; s < last; s += t.count) {
          for (Index e = home_.pattern.crow[s]; e < home_.pattern.crow[s + 1]; ++e)
            m.values[e] = Stored(0);
          for (Index row = s * A; row < (s + 1) * A; ++row) {
            const double w = weight[row - first * A];
            for (Index k = home_.crow[row]; k < home_.crow[row + 1]; ++k) {
              Stored& target = m.values[home_.pattern.slot[k]];
              target = static_cast<Stored>(static_cast<double>(target) +
                                           w * static_cast<double>(source_[k]));
            }
          }
        }
      });
    }

    // Entries of P_π column by column, so that products with P_πᵀ read them one after another.
    template <class Stored>
    BIRL_DEVICE void transpose(const Matrix<Stored>& m, double* transposed) {
      block_.spread([&](Index first, Index stride) {
        for (Index e = first; e < home_.pattern.nnz; e += stride)
          transposed[e] = static_cast<double>(m.values[home_.pattern.transpose_slot[e]]);
      });
    }

    template <class Take>
    BIRL_DEVICE void transposed_product(const double* transposed, const double* x, Index K,
                                        Take&& take) {
      const WidePattern& pattern = home_.pattern;
      const Lines<double> lines{transposed, pattern.transpose_crow, pattern.transpose_col};
      for (Index k = 0; k < K;) {
        if (K - k >= 4) {
          gather<4>(lines, x, k, K, take);
          k += 4;
        } else {
          gather<1>(lines, x, k, K, take);
          k += 1;
        }
      }
    }

    // `weight` (S, A): π/σ, needed without a pattern.
    template <class Stored, class Take>
    BIRL_DEVICE void product(const Matrix<Stored>& m, const double* x, Index K,
                             const double* weight, Take&& take) {
      for (Index k = 0; k < K;) {
        if (K - k >= 4) {
          multiply<4>(m, x, k, K, weight, take);
          k += 4;
        } else {
          multiply<1>(m, x, k, K, weight, take);
          k += 1;
        }
      }
    }

   private:
    template <int kRight, class Stored, class Take>
    BIRL_DEVICE void multiply(const Matrix<Stored>& m, const double* x, Index k, Index K,
                              const double* weight, Take&& take) {
      if (home_.merged())
        gather<kRight>(Lines<Stored>{m.values, home_.pattern.crow, home_.pattern.col}, x, k, K,
                       take);
      else
        multiply_rows<kRight>(x, k, K, weight, take);
    }

    // Rows of merged values, or columns of the transposed ones.
    template <class Stored>
    struct Lines {
      const Stored* values;
      const Index* begin;
      const std::int32_t* place;
    };

    template <int kRight, class Stored, class Take>
    BIRL_STAGE void gather(const Lines<Stored>& lines, const double* x, Index k, Index K,
                           Take&& take) {
      block_.template groups<kLanes>([&](const auto& g) {
        for (Index s = own_.begin + g.rank; s < own_.end; s += g.count) {
          double sums[kRight];
          g.sums(sums, [&](int lane, double (&part)[kRight]) {
            for (Index e = lines.begin[s] + lane; e < lines.begin[s + 1]; e += kLanes) {
              const double p = static_cast<double>(lines.values[e]);
              const double* const at = x + lines.place[e] * K + k;
              BIRL_UNROLL
              for (int c = 0; c < kRight; ++c) part[c] += p * at[c];
            }
          });
          g.each([&](int lane) {
            BIRL_UNROLL
            for (int c = 0; c < kRight; ++c)
              if (lane == c % kLanes) take(s, k + c, sums[c]);
          });
        }
      });
    }

    template <int kRight, class Take>
    BIRL_STAGE void multiply_rows(const double* x, Index k, Index K, const double* weight,
                                  Take&& take) {
      const Index A = home_.actions;
      for (Index first = own_.begin; first < own_.end; first += home_.tile) {
        const Index last = first + home_.tile < own_.end ? first + home_.tile : own_.end;
        for (int c = 0; c < kRight; ++c) {
          block_.template groups<kLanes>([&](const auto& g) {
            for (Index row = first * A + g.rank; row < last * A; row += g.count) {
              double sum[1];
              g.sums(sum, [&](int lane, double (&part)[1]) {
                for (Index e = home_.crow[row] + lane; e < home_.crow[row + 1]; e += kLanes)
                  part[0] += static_cast<double>(source_[e]) * x[home_.col[e] * K + k + c];
              });
              g.each([&](int lane) {
                if (lane == 0) chip_.product[row - first * A] = weight[row] * sum[0];
              });
            }
          });
          block_.phase([&](Thread t) {
            for (Index s = first + t.rank; s < last; s += t.count) {
              double total = 0.0;
              for (Index row = s * A; row < (s + 1) * A; ++row)
                total += chip_.product[row - first * A];
              take(s, k + c, total);
            }
          });
        }
      }
    }

    const CsrWide& home_;
    Block& block_;
    const Chip& chip_;
    Share own_;
    const Real* source_;
    const double* x_ = nullptr;
    double shift_ = 0.0;
  };
};

}  // namespace birl::device
