// Sums in one fixed order: eight interleaved chains, then a tree. Eight independent additions hide
// the latency of one, and a chain of n/8 rounds less than one of n.
#pragma once

#include "cuda/layer/primitives.h"

namespace birl::device {

constexpr int kChains = 8;

// Dependent additions in a sum of n terms, for rounding bounds.
BIRL_HD constexpr double chained_additions(double n) { return n / kChains + 4.0; }

BIRL_DEVICE double join_chains(const double (&part)[kChains]) {
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

// Σ_{i<n} term(i)
template <class Term>
BIRL_DEVICE double chained_sum(int n, Term&& term) {
  double part[kChains] = {};
  int i = 0;
  for (; i + kChains <= n; i += kChains) {
    BIRL_UNROLL
    for (int j = 0; j < kChains; ++j) part[j] += term(i + j);
  }
  BIRL_UNROLL
  for (int j = 0; j < kChains; ++j)
    if (i + j < n) part[j] += term(i + j);
  return join_chains(part);
}

// Adds factor(i + j)·x[i + j] to each chain j.
template <class Factor>
BIRL_DEVICE void add_products(double (&part)[kChains], int i, Factor&& factor, const double* x) {
  BIRL_UNROLL
  for (int j = 0; j < kChains; j += 2) {
    const Pair pair = load_pair(x + i + j);
    part[j] += factor(i + j) * pair.first;
    part[j + 1] += factor(i + j + 1) * pair.second;
  }
}

// Σ_{i<n} factor(i)·x[i], x aligned as every array is.
template <class Factor>
BIRL_DEVICE double chained_dot(int n, Factor&& factor, const double* x) {
  double part[kChains] = {};
  int i = 0;
  for (; i + kChains <= n; i += kChains) add_products(part, i, factor, x);
  BIRL_UNROLL
  for (int j = 0; j < kChains; ++j)
    if (i + j < n) part[j] += factor(i + j) * x[i + j];
  return join_chains(part);
}

// The same two for factors that lie in registers, where every index must be a constant.
template <int kCount, class Term>
BIRL_DEVICE double unrolled_sum(Term&& term) {
  static_assert(kCount % kChains == 0, "whole rounds only: pad with zeros, which change no bit");
  double part[kChains] = {};
  BIRL_UNROLL
  for (int i = 0; i < kCount; ++i) part[i % kChains] += term(i);
  return join_chains(part);
}

template <int kCount, class Factor>
BIRL_DEVICE double unrolled_dot(Factor&& factor, const double* x) {
  static_assert(kCount % kChains == 0, "whole rounds only: pad with zeros, which change no bit");
  double part[kChains] = {};
  BIRL_UNROLL
  for (int i = 0; i < kCount; i += kChains) add_products(part, i, factor, x);
  return join_chains(part);
}

}  // namespace birl::device
