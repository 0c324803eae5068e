// A = I − γP_π or its transpose as an operator on several columns (cpu/isa/columns.h). Vectors
// are swept in chunks whose shape does not depend on the number of threads, and what has to be done
// to a chunk of a product is done while it is in cache.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "cpu/isa/columns.h"
#include "cpu/support/parallel.h"

namespace birl {

using Columns = std::array<double, kMostColumns>;  // a number per column

inline void copy_column(Index w, Index columns, const std::vector<double>& from,
                        std::vector<double>& to) {
  for (std::size_t i = static_cast<std::size_t>(w); i < from.size(); i += columns) to[i] = from[i];
}

// A number per column as the routines want it.
struct PerColumn {
  double repeated[kColumnLanes];
  PerColumn(const Columns& number, Index columns) {
    for (Index i = 0; i < kColumnLanes; ++i) repeated[i] = number[i % columns];
  }
  explicit PerColumn(double number) { std::fill(repeated, repeated + kColumnLanes, number); }
};

// `Count` sums per lane and chunk, added up in an order of their own.
template <int Count>
class ChunkSums {
 public:
  explicit ChunkSums(Index chunks) : sums_(chunks * Count * kColumnLanes) {}

  double* of(Index chunk) { return sums_.data() + chunk * Count * kColumnLanes; }
  Columns total(Index columns, int which = 0) const {
    double lane[kColumnLanes] = {};
    for (std::size_t at = which * kColumnLanes; at < sums_.size(); at += Count * kColumnLanes)
      for (Index i = 0; i < kColumnLanes; ++i) lane[i] += sums_[at + i];
    for (Index half = kColumnLanes / 2; half >= columns; half /= 2)
      for (Index i = 0; i < half; ++i) lane[i] += lane[i + half];
    Columns out{};
    std::copy(lane, lane + columns, out.begin());
    return out;
  }

 private:
  std::vector<double> sums_;
};

// With `deflate`, the compression of A to vectors of mean zero: valid when A maps constants to
// (1 − γ) times themselves, that is when every row continues. The slow mode 1 − γ is then gone; the
// transpose leaves mean zero (total mass zero) invariant and is only kept there.
template <class Matrix>
class PolicyOperator {
 public:
  PolicyOperator(const Matrix& matrix, double discount, bool transpose, bool deflate, Index columns,
                 Team& team, Interrupt& interrupt)
      : matrix_(matrix),
        discount_(discount),
        transpose_(transpose),
        deflate_(deflate),
        columns_(columns),
        team_(team),
        interrupt_(interrupt) {}

  Index columns() const { return columns_; }
  Index numbers() const { return matrix_.size() * columns_; }

  // y = γP_π x and sum += y
  void accumulate(const double* x, double* y, double* sum) const {
    product(x, y, [&](Index, Index at, Index n) {
      vectors().accumulate(n, discount_, y + at, sum + at);
    });
  }

  // y = Ax, and Σ yu, Σ yy
  void apply(const double* x, double* y, const double* u, Columns& along, Columns& square) const {
    ChunkSums<2> products(product_chunks());
    if (deflate_) {
      const PerColumn mean = mean_of(image(x, y));
      sweep([&](Index c, Index at, Index n) {
        vectors().centre(n, mean.repeated, y + at, u + at, products.of(c));
      });
    } else {
      const PerColumn nothing(0.0);
      product(x, y, [&](Index c, Index at, Index n) {
        double sum[kColumnLanes];
        vectors().defect(n, discount_, x + at, y + at, sum);
        vectors().centre(n, nothing.repeated, y + at, u + at, products.of(c));
      });
    }
    along = products.total(columns_, 0);
    square = products.total(columns_, 1);
  }

  void operator()(const std::vector<double>& x, std::vector<double>& y) const {
    Columns along, square;
    apply(x.data(), y.data(), y.data(), along, square);
  }

  // y = Ax without deflation; Σ y
  Columns image(const double* x, double* y) const {
    ChunkSums<1> sums(product_chunks());
    product(x, y, [&](Index c, Index at, Index n) {
      vectors().defect(n, discount_, x + at, y + at, sums.of(c));
    });
    return sums.total(columns_);
  }

  // r = (b − constant) − Ax without deflation, and its norms
  Columns residual(const double* b, const Columns& constant, const double* x, double* r,
                   bool one_norm) const {
    std::vector<ColumnNorms> parts(product_chunks());
    const PerColumn each(constant, columns_);
    product(x, r, [&](Index c, Index at, Index n) {
      vectors().residual(n, b + at, each.repeated, discount_, x + at, r + at, &parts[c]);
    });
    return fold(parts, one_norm);
  }

  Columns norms(const double* x, bool one_norm) const {
    std::vector<ColumnNorms> parts(product_chunks());
    sweep([&](Index c, Index at, Index n) { vectors().norms(n, x + at, &parts[c]); });
    return fold(parts, one_norm);
  }

  Columns dots(const double* x, const double* y) const {
    ChunkSums<1> sums(sweep_chunks());
    sweep([&](Index c, Index at, Index n) {
      double* const sum = sums.of(c);
      for (Index i = 0; i < n; ++i) sum[i % kColumnLanes] += x[at + i] * y[at + i];
    });
    return sums.total(columns_);
  }

  // Takes its mean from x and returns it.
  Columns remove_mean(double* x) const {
    ChunkSums<1> sums(product_chunks());
    sweep([&](Index c, Index at, Index n) {
      double* const sum = sums.of(c);
      for (Index i = 0; i < n; ++i) sum[i % kColumnLanes] += x[at + i];
    });
    const Columns total = sums.total(columns_);
    const PerColumn mean = mean_of(total);
    shift(mean, x);
    Columns out{};
    std::copy(mean.repeated, mean.repeated + columns_, out.begin());
    return out;
  }

  // x −= α
  void shift(const PerColumn& alpha, double* x) const {
    sweep([&](Index, Index at, Index n) {
      double products[2 * kColumnLanes];
      vectors().centre(n, alpha.repeated, x + at, x + at, products);
    });
  }

  // x += α y
  void add(const PerColumn& alpha, const double* y, double* x) const {
    sweep([&](Index, Index at, Index n) { vectors().add(n, alpha.repeated, y + at, x + at); });
  }

  void range(const double* x, Columns& low, Columns& high) const {
    std::vector<std::array<double, 2 * kColumnLanes>> parts(product_chunks());
    sweep([&](Index c, Index at, Index n) {
      vectors().range(n, x + at, parts[c].data(), parts[c].data() + kColumnLanes);
    });
    low.fill(HUGE_VAL);
    high.fill(-HUGE_VAL);
    for (Index c = 0; c < sweep_chunks(); ++c)
      for (Index i = 0; i < kColumnLanes; ++i) {
        low[i % columns_] = std::min(low[i % columns_], parts[c][i]);
        high[i % columns_] = std::max(high[i % columns_], parts[c][kColumnLanes + i]);
      }
  }

  // body(chunk, first number, count of numbers) for all chunks of the columns
  template <class Body>
  void sweep(Body&& body) const {
    const Index length = kStates * columns_;
    team_.run(sweep_chunks(), 2.0 * static_cast<double>(numbers()),
              [&](Index c, int) { body(c, c * length, std::min(numbers() - c * length, length)); });
  }
  Index sweep_chunks() const { return (matrix_.size() + kStates - 1) / kStates; }

  static const ColumnVectors& vectors() { return column_routines().vectors; }

 private:
  static constexpr Index kStates = 2048;  // of one chunk; a product's are smaller

  // y = P_π x; what comes after(chunk, first number, count) on each chunk of y
  template <class After>
  void product(const double* x, double* y, After&& after) const {
    interrupt_.check();
    const Index n = matrix_.size(), chunk = matrix_.chunk(transpose_);
    team_.run((n + chunk - 1) / chunk, 2.0 * matrix_.work() * static_cast<double>(columns_),
              [&](Index c, int) {
                const Index s0 = c * chunk, s1 = std::min(n, s0 + chunk);
                matrix_.apply(s0, s1, columns_, transpose_, x, y);
                after(c, s0 * columns_, (s1 - s0) * columns_);
              });
  }
  Index product_chunks() const {
    const Index chunk = matrix_.chunk(transpose_);
    return (matrix_.size() + chunk - 1) / chunk;
  }

  PerColumn mean_of(Columns sum) const {
    for (double& e : sum) e /= static_cast<double>(matrix_.size());
    return PerColumn(sum, columns_);
  }

  Columns fold(const std::vector<ColumnNorms>& parts, bool one_norm) const {
    ChunkSums<1> sums(static_cast<Index>(parts.size()));
    Columns largest{};
    for (std::size_t c = 0; c < parts.size(); ++c)
      for (Index i = 0; i < kColumnLanes; ++i) {
        sums.of(static_cast<Index>(c))[i] = parts[c].sum[i];
        largest[i % columns_] = std::max(largest[i % columns_], parts[c].largest[i]);
      }
    Columns out = sums.total(columns_);
    if (!one_norm)
      for (Index w = 0; w < columns_; ++w)
        if (!std::isnan(out[w])) out[w] = largest[w];
    return out;
  }

  const Matrix& matrix_;
  double discount_;
  bool transpose_, deflate_;
  Index columns_;
  Team& team_;
  Interrupt& interrupt_;
};

}  // namespace birl
