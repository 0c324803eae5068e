// The rows P(·|s,a) of one transition, in four homes. row = s·A + a; thread t of a team owns rows
// t.rank, t.rank + t.count, … and computes their products whole, in the order of
// cuda/layer/chained_sum.h, so that the three dense homes agree to the last bit.
//
// A home H is copied to the device with the kernel and offers
//   kName                            what `info` calls the kernel
//   lay_out(chip, spill)             its memory
//   padded()                         length of the vectors it multiplies, zero beyond S
//   H::Local<Team>(home, team, …)    one transition, bound to a team, with
//     load()                         phases that fetch P
//     each(t, f)                     f(row, entries) for the rows of thread t; entries offer
//                                      count()   how many there are, zeros of dense rows included
//                                      start     place of the first in the stored array
//                                      scan(g)   g(i, value) for all of them
//                                      sum(), dot(w)
//     form(weight, matrix)           N(s,t) = Σ_a weight(s,a) P(t|s,a)
#pragma once

#include "cuda/layer/chained_sum.h"

namespace birl::device {

// Elements of a matrix N(s, t) stored by rows or by columns.
struct MatrixView {
  double* data;
  int n;
  bool transposed;

  BIRL_DEVICE double& at(int s, int t) const {
    return data[transposed ? static_cast<Index>(t) * n + s : static_cast<Index>(s) * n + t];
  }
};

// What most homes share: P stays where it is, and the team is a block.
template <class Real_>
struct StoredRows {
  using Real = Real_;
  static constexpr bool kOnChip = false, kOneWarp = false;
  static constexpr int kTeamsPerProcessor = 2;

  const Real* values;  // (N, S, A, S), or (N, nnz)
  int states, actions;

  BIRL_HD int padded() const { return states; }

  struct Memory {};

  template <class Chip, class Spill>
  BIRL_HD Memory lay_out(Chip&, Spill&) const {
    return {};
  }
};

template <class Real>
struct DenseRows : StoredRows<Real> {
  BIRL_DEVICE const Real* stored(Index n) const {
    return this->values + n * this->states * this->actions * static_cast<Index>(this->states);
  }
};

// A row whose numbers lie one after another.
template <class Real>
struct Neighbours {
  const Real* p;
  Index start;
  int length;

  BIRL_DEVICE int count() const { return length; }
  BIRL_DEVICE double operator()(int i) const { return static_cast<double>(p[i]); }
  BIRL_DEVICE double sum() const { return chained_sum(length, *this); }
  template <class Visit>
  BIRL_DEVICE void scan(Visit&& visit) const {
    for (int i = 0; i < length; ++i) visit(i, p[i]);
  }
};

// ---- registers ---------------------------------------------------------------------------------
// A lane of a warp keeps kRows rows of up to kStates entries. Bytes: P is read once, coalesced,
// through a tile on chip; a sweep then reads only V.
template <class Real, int kStates, int kRows>
struct RegisterRows : DenseRows<Real> {
  static constexpr Kernel kName = Kernel::kCudaWarp;
  static constexpr bool kOnChip = true;
  static constexpr int kTile = kStates + 1;  // row pitch: lanes fall on different banks
  // What the compiler is told to make room for; P and some ninety others have to fit.
  static constexpr int kRegistersOfP = kStates * kRows * static_cast<int>(sizeof(Real) / 4);
  static constexpr bool kOneWarp = true;  // the team is a warp
  static constexpr int kTeamsPerProcessor = kRegistersOfP <= 32 ? 12 : 8;

  BIRL_HD int padded() const { return kStates; }

  struct Memory {
    Real* tile;  // the rows of one round, one per thread
  };
  struct Held {
    Real value[kRows][kStates];
  };

  template <class Chip, class Spill>
  BIRL_HD Memory lay_out(Chip& chip, Spill&) const {
    return {chip.template take<Real>(32 * kTile)};
  }

  template <class Team>
  class Local {
   public:
    BIRL_DEVICE Local(const RegisterRows& home, Team& team, const Memory& memory, Index n)
        : home_(home), team_(team), tile_(memory.tile), source_(home.stored(n)), held_(team) {}

    struct Entries {
      const Real (&value)[kStates];
      Index start;
      int states;
      BIRL_DEVICE int count() const { return states; }
      BIRL_DEVICE double operator()(int i) const { return widen(value[i]); }
      BIRL_DEVICE double sum() const { return unrolled_sum<kStates>(*this); }
      BIRL_DEVICE double dot(const double* w) const { return unrolled_dot<kStates>(*this, w); }
      template <class Visit>
      BIRL_DEVICE void scan(Visit&& visit) const {
        BIRL_UNROLL
        for (int i = 0; i < kStates; ++i) visit(i, value[i]);
      }
    };

    BIRL_DEVICE void load() {
      const int S = home_.states, rows = S * home_.actions;
      BIRL_UNROLL
      for (int j = 0; j < kRows; ++j) {
        team_.phase([&](Thread t) {
          const int first = j * t.count, count = (rows - first < t.count ? rows - first : t.count);
          for (int e = t.rank; e < count * S; e += t.count)
            tile_[e / S * kTile + e % S] = source_[first * S + e];
        });
        team_.phase([&](Thread t) {
          Held& held = held_(t);
          const bool owned = j * t.count + t.rank < rows;
          BIRL_UNROLL
          for (int i = 0; i < kStates; ++i)
            held.value[j][i] = owned && i < S ? tile_[t.rank * kTile + i] : Real(0);
        });
      }
    }

    template <class Body>
    BIRL_DEVICE void each(Thread t, Body&& body) {
      const int S = home_.states, rows = S * home_.actions;
      Held& held = held_(t);
      BIRL_UNROLL
      for (int j = 0; j < kRows; ++j) {
        const int row = j * t.count + t.rank;
        if (row < rows) body(row, Entries{held.value[j], static_cast<Index>(row) * S, S});
      }
    }

    // One action at a time: its rows belong to different states, so nothing is written twice.
    BIRL_DEVICE void form(const double* weight, const MatrixView& matrix) {
      const int S = home_.states, A = home_.actions;
      for (int a = 0; a < A; ++a) {
        team_.phase([&](Thread t) {
          each(t, [&](int row, const Entries& entries) {
            if (row % A != a) return;
            BIRL_UNROLL
            for (int i = 0; i < kStates; ++i) {
              if (i >= S) break;
              double& target = matrix.at(row / A, i);
              target = (a == 0 ? 0.0 : target) + weight[row] * entries(i);
            }
          });
        });
      }
    }

   private:
    const RegisterRows& home_;
    Team& team_;
    Real* tile_;
    const Real* source_;
    typename Team::template Private<Held> held_;
  };
};

// ---- shared memory -----------------------------------------------------------------------------
// P lies on chip with the next state as the slow axis, p[t·pitch + row]: at each step of a product
// the threads read neighbouring rows, free of bank conflicts, and one V(t) for all. Bytes: P is
// read once, coalesced; a sweep then reads S·A·S entries on chip.
template <class Real>
struct SharedRows : DenseRows<Real> {
  static constexpr Kernel kName = Kernel::kCudaBlock;
  static constexpr bool kOnChip = true;

  struct Memory {
    Real* p;
  };

  BIRL_HD int pitch() const {
    return this->states * this->actions | 1;
  }  // odd, so that storing is free too

  template <class Chip, class Spill>
  BIRL_HD Memory lay_out(Chip& chip, Spill&) const {
    return {chip.template take<Real>(static_cast<Index>(this->states) * pitch())};
  }

  template <class Team>
  class Local {
   public:
    BIRL_DEVICE Local(const SharedRows& home, Team& team, const Memory& memory, Index n)
        : home_(home), team_(team), p_(memory.p), source_(home.stored(n)) {}

    struct Entries {
      const Real* p;
      int pitch, states;
      Index start;
      BIRL_DEVICE int count() const { return states; }
      BIRL_DEVICE double operator()(int i) const { return static_cast<double>(p[i * pitch]); }
      BIRL_DEVICE double sum() const { return chained_sum(states, *this); }
      BIRL_DEVICE double dot(const double* w) const { return chained_dot(states, *this, w); }
      template <class Visit>
      BIRL_DEVICE void scan(Visit&& visit) const {
        for (int i = 0; i < states; ++i) visit(i, p[i * pitch]);
      }
    };

    BIRL_DEVICE void load() {
      const int S = home_.states, entries = S * home_.actions * S, pitch = home_.pitch();
      team_.phase([&](Thread t) {
        for (int e = t.rank; e < entries; e += t.count) p_[e % S * pitch + e / S] = source_[e];
      });
    }

    template <class Body>
    BIRL_DEVICE void each(Thread t, Body&& body) {
      const int S = home_.states, rows = S * home_.actions;
      for (int row = t.rank; row < rows; row += t.count)
        body(row, Entries{p_ + row, home_.pitch(), S, static_cast<Index>(row) * S});
    }

    BIRL_DEVICE void form(const double* weight, const MatrixView& matrix) {
      const int S = home_.states, A = home_.actions, pitch = home_.pitch();
      team_.phase([&](Thread t) {
        for (int e = t.rank; e < S * S; e += t.count) {
          const int s = e / S, next = e % S;
          const Real* const p = p_ + next * pitch + s * A;
          double sum = 0.0;
          for (int a = 0; a < A; ++a) sum += weight[s * A + a] * static_cast<double>(p[a]);
          matrix.at(s, next) = sum;
        }
      });
    }

   private:
    const SharedRows& home_;
    Team& team_;
    Real* p_;
    const Real* source_;
  };
};

// ---- global memory, dense ----------------------------------------------------------------------
// P stays where it is. Bytes: a sweep reads it all, from L2 if it fits there. A thread reads its
// row alone, so a warp's loads touch 32 rows at once and rely on L1 for the rest of each sector:
// the home of shapes that nothing better holds.
template <class Real>
struct GlobalRows : DenseRows<Real> {
  static constexpr Kernel kName = Kernel::kCudaBlock;

  template <class Team>
  class Local {
   public:
    BIRL_DEVICE Local(const GlobalRows& home, Team& team, const typename GlobalRows::Memory&,
                      Index n)
        : home_(home), team_(team), source_(home.stored(n)) {}

    struct Entries : Neighbours<Real> {
      BIRL_DEVICE double dot(const double* w) const { return chained_dot(this->length, *this, w); }
    };

    BIRL_DEVICE void load() {}

    template <class Body>
    BIRL_DEVICE void each(Thread t, Body&& body) {
      const int S = home_.states, rows = S * home_.actions;
      for (int row = t.rank; row < rows; row += t.count) {
        const Index start = static_cast<Index>(row) * S;
        body(row, Entries{{source_ + start, start, S}});
      }
    }

    BIRL_DEVICE void form(const double* weight, const MatrixView& matrix) {
      const int S = home_.states, A = home_.actions;
      team_.phase([&](Thread t) {
        for (Index e = t.rank; e < static_cast<Index>(S) * S; e += t.count) {
          const int s = static_cast<int>(e / S), next = static_cast<int>(e % S);
          const Real* const p = source_ + static_cast<Index>(s) * A * S + next;
          double sum = 0.0;
          for (int a = 0; a < A; ++a)
            sum += weight[s * A + a] * static_cast<double>(p[static_cast<Index>(a) * S]);
          matrix.at(s, next) = sum;
        }
      });
    }

   private:
    const GlobalRows& home_;
    Team& team_;
    const Real* source_;
  };
};

// ---- global memory, CSR ------------------------------------------------------------------------
// One pattern for all transitions. Bytes: a sweep reads the values and the columns of all entries,
// and V at those columns.
template <class Real>
struct CsrRows : StoredRows<Real> {
  static constexpr Kernel kName = Kernel::kCudaCsr;

  const Index* crow;
  const Index* col;
  Index nnz;

  BIRL_DEVICE const Real* stored(Index n) const { return this->values + n * nnz; }

  template <class Team>
  class Local {
   public:
    BIRL_DEVICE Local(const CsrRows& home, Team& team, const typename CsrRows::Memory&, Index n)
        : home_(home), team_(team), source_(home.stored(n)) {}

    struct Entries : Neighbours<Real> {
      const Index* col;
      BIRL_DEVICE double dot(const double* w) const {
        return chained_sum(this->length, [this, w](int i) { return (*this)(i)*w[col[i]]; });
      }
    };

    BIRL_DEVICE void load() {}

    template <class Body>
    BIRL_DEVICE void each(Thread t, Body&& body) {
      const int rows = home_.states * home_.actions;
      for (int row = t.rank; row < rows; row += t.count) {
        const Index start = home_.crow[row];
        const int length = static_cast<int>(home_.crow[row + 1] - start);
        body(row, Entries{{source_ + start, start, length}, home_.col + start});
      }
    }

    // A thread owns a state, and so everything that is written for it.
    BIRL_DEVICE void form(const double* weight, const MatrixView& matrix) {
      const int S = home_.states, A = home_.actions;
      team_.phase([&](Thread t) {
        for (int s = t.rank; s < S; s += t.count) {
          for (int next = 0; next < S; ++next) matrix.at(s, next) = 0.0;
          for (int row = s * A; row < (s + 1) * A; ++row)
            for (Index k = home_.crow[row]; k < home_.crow[row + 1]; ++k)
              matrix.at(s, static_cast<int>(home_.col[k])) +=
                  weight[row] * static_cast<double>(source_[k]);
        }
      });
    }

   private:
    const CsrRows& home_;
    Team& team_;
    const Real* source_;
  };
};

}  // namespace birl::device
