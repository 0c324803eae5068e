// exp and log on the half lines a soft maximum needs. Branch free, so that loops over them
// vectorise without a vector mathematics library, and the same bits come out in every lane.
// Measured against long double: exp within 1 ulp, log within 1 ulp (FMA or not).
#pragma once

#include "core/common.h"

namespace birl {

BIRL_HD double from_bits(std::uint64_t bits) {
  double value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

BIRL_HD std::uint64_t to_bits(double value) {
  std::uint64_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

constexpr double kLog2High = 0x1.62e42feep-1;  // 32 leading bits of log 2: k·kLog2High is exact
constexpr double kLog2Low = 0x1.a39ef35793c76p-33;  // the rest

// exp(x) for x <= 0; zero below -708, NaN stays NaN.
BIRL_HD double exp_nonpositive(double x) {
  const double y = x < -708.0 ? -708.0 : x;
  // Adding 1.5·2^52 rounds y/log 2 to an integer k and leaves k in the low bits of the sum.
  constexpr double kShift = 0x1.8p52;
  const double shifted = y * 0x1.71547652b82fep0 + kShift;
  const double k = shifted - kShift;
  const double r = (y - k * kLog2High) - k * kLog2Low;  // |r| <= log(2)/2
  // Taylor to degree 13: remainder below 5e-18.
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + r;
  const double scale = from_bits((to_bits(shifted) << 52) + to_bits(1.0));  // 2^k
  const double value = p * scale + scale;
  return x < -708.0 ? 0.0 : value;
}

// log(z) for finite z >= 1; NaN stays NaN.
BIRL_HD double log_from_one(double z) {
  const std::uint64_t bits = to_bits(z);
  // Exponent so that the mantissa m lies in [sqrt(1/2), sqrt(2)): near z = 1 nothing cancels.
  const std::uint64_t biased = (bits - to_bits(0x1.6a09e667f3bcdp-1)) >> 52;
  const double m = from_bits(bits - (biased << 52));
  const double k = from_bits(biased | to_bits(0x1p52)) - 0x1p52;
  const double f = m - 1.0;
  const double s = f / (2.0 + f);  // log m = 2 atanh s, |s| < 0.1716
  const double t = s * s;
  double p = 2.0 / 23.0;
  p = p * t + 2.0 / 21.0;
  p = p * t + 2.0 / 19.0;
  p = p * t + 2.0 / 17.0;
  p = p * t + 2.0 / 15.0;
  p = p * t + 2.0 / 13.0;
  p = p * t + 2.0 / 11.0;
  p = p * t + 2.0 / 9.0;
  p = p * t + 2.0 / 7.0;
  p = p * t + 2.0 / 5.0;
  p = p * t + 2.0 / 3.0;
  const double value = k * kLog2High + (2.0 * s + (s * t * p + k * kLog2Low));
  return z >= 1.0 ? value : z;  // also hands NaN through
}

}  // namespace birl
