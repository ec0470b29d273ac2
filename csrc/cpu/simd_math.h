// exp, log and their kin for one register, within two units in the last place (pow in double: a few).
#pragma once

#include "range.h"
#include "simd.h"

namespace fastcl::cpu::FASTCL_ISA {

template <class T>
struct Constants;
template <>
struct Constants<float> {
  static constexpr float lowest = -3.402823466e38f, smallest_normal = 1.17549435e-38f, infinity = __builtin_inff();
  static constexpr int min_exponent = -126;
  // ln 2 in two parts; the first has trailing zeros, so that n times it is exact.
  static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  static constexpr float exp_lowest = -104.0f, exp_highest = 89.0f;
  static constexpr int exp_degree = 7, log_terms = 6, log1p_terms = 7;
};
template <>
struct Constants<double> {
  static constexpr double lowest = -1.7976931348623157e308, smallest_normal = 2.2250738585072014e-308,
                          infinity = __builtin_inf();
  static constexpr int min_exponent = -1022;
  static constexpr double ln2_hi = 6.93147180369123816490e-1, ln2_lo = 1.90821492927058770002e-10;
  static constexpr double exp_lowest = -746.0, exp_highest = 710.0;
  static constexpr int exp_degree = 13, log_terms = 12, log1p_terms = 16;
};

// e^f for |f| <= ln(2)/2 by its Taylor series: the remainder is 5e-9 for float (degree 7), 4e-18 for double (13).
template <class T>
FASTCL_INLINE Simd<T> exp_fraction(Simd<T> f) {
  constexpr int degree = Constants<T>::exp_degree;
  double factorial = 1;
  for (int k = 2; k <= degree; k++) factorial *= k;
  Simd<T> p = T(1 / factorial);
  FASTCL_UNROLL for (int k = degree - 1; k >= 0; k--) {
    factorial /= k + 1;
    p = p * f + Simd<T>(T(1 / factorial));
  }
  return p;
}

// 2^f for |f| <= 1/2.
FASTCL_INLINE Simd<float> exp2_fraction(Simd<float> f) {
  // Minimax of degree 6, relative error 7.5e-8 with the rounding: one step less than Taylor's series needs.
  Simd<float> p = f * 1.535336e-4f + Simd<float>(1.339887e-3f);
  p = p * f + Simd<float>(9.618437e-3f);
  p = p * f + Simd<float>(5.550332e-2f);
  p = p * f + Simd<float>(2.402264e-1f);
  p = p * f + Simd<float>(6.931472e-1f);
  return p * f + Simd<float>(1.0f);
}
FASTCL_INLINE Simd<double> exp2_fraction(Simd<double> f) { return exp_fraction(f * Simd<double>(ln_2)); }

// 2^(z - M) for an integer M and z <= M + bias; 0 well below the normal numbers.
// M goes into the exponent: subtracting it from z would round z, which cost a factor of ten in accuracy.
template <class T>
FASTCL_INLINE Simd<T> exp2_below(Simd<T> z, Simd<T> M) {
#if defined(__AVX512F__)
  const Simd<T> bounded = larger(M + Simd<T>(T(Constants<T>::min_exponent - 64)), z);
  const Simd<T> n = nearest(bounded);
  return scaled(exp2_fraction(bounded - n), n - M);
#else
  // Both addends end in an integer's bits, and what stands above these is shifted out. One exponent below the normal ones
  // all bits are zero, and so is the product: no comparison.
  constexpr int mantissa = Bits<T>::mantissa;
  const Simd<T> magic = T(1.5) * T(int64_t(1) << mantissa);
  const Simd<T> bounded = larger(M + Simd<T>(T(Constants<T>::min_exponent - 1)), z);
  const Simd<T> rounded = bounded + magic;
  const Simd<T> exponent = (Simd<T>(T(Bits<T>::bias)) - M) + magic;
  using Unsigned = typename Simd<T>::RawUnsigned;
  const Simd<T> power = Simd<T>((typename Simd<T>::Raw)(((Unsigned)rounded.v + (Unsigned)exponent.v) << mantissa));
  return exp2_fraction(bounded - (rounded - magic)) * power;
#endif
}

// 2^(unit (z - reference)) for any reference at or above z, give or take rounding.
template <class T>
FASTCL_INLINE Simd<T> exp2_of_difference(Simd<T> z, Simd<T> reference, Simd<T> unit) {
  return exp2_below((z - reference) * unit, Simd<T>(T(0)));
}

template <class T>
FASTCL_INLINE Simd<T> simd_exp(Simd<T> z) {
  using K = Constants<T>;
  const Simd<T> bounded = smaller(Simd<T>(K::exp_highest), larger(Simd<T>(K::exp_lowest), z));
  const Simd<T> n = nearest(bounded * Simd<T>(T(log2_e)));
  const Simd<T> f = (bounded - n * Simd<T>(K::ln2_hi)) - n * Simd<T>(K::ln2_lo);
  return scaled(exp_fraction(f), n);
}

// e^z - 1 = 2^n ((e^f - 1) + (1 - 2^-n)), and e^f - 1 = f + f^2 (1/2 + f/6 + ...): for n = 0 nothing is added, so that a small z
// keeps its digits. Where z is so low that 2^-n were no number, it is -1 long since.
template <class T>
FASTCL_INLINE Simd<T> simd_expm1(Simd<T> z) {
  using K = Constants<T>;
  const Simd<T> bounded = smaller(Simd<T>(K::exp_highest), larger(Simd<T>(T(-1.5 * Bits<T>::mantissa)), z));
  const Simd<T> n = nearest(bounded * Simd<T>(T(log2_e)));
  const Simd<T> f = (bounded - n * Simd<T>(K::ln2_hi)) - n * Simd<T>(K::ln2_lo);
  constexpr int degree = K::exp_degree;
  double factorial = 1;
  for (int k = 2; k <= degree; k++) factorial *= k;
  Simd<T> p = T(1 / factorial);
  FASTCL_UNROLL for (int k = degree - 1; k >= 2; k--) {
    factorial /= k + 1;
    p = p * f + Simd<T>(T(1 / factorial));
  }
  const Simd<T> above = Simd<T>(T(1)) - scaled(Simd<T>(T(1)), -n);
  const Simd<T> result = scaled((p * (f * f) + f) + above, n);
  return Simd<T>(z.v == typename Simd<T>::Raw{} ? z.v : result.v);  // -0 is -0
}

// log(1 + f) + e ln 2 for f in (sqrt(1/2) - 1, sqrt(2) - 1), as fdlibm's: log(1 + f) = f - (f^2/2 - s (f^2/2 + R)),
// s = f / (2 + f), R = 2/3 s^2 + 2/5 s^4 + ... ; s^2 < 0.0295, so 6 terms serve float and 12 double.
template <class T>
FASTCL_INLINE Simd<T> log_fraction(Simd<T> f, Simd<T> e) {
  using K = Constants<T>;
  const Simd<T> s = f / (Simd<T>(2) + f), square = s * s, half = Simd<T>(T(0.5)) * f * f;
  Simd<T> series = T(2.0 / (2 * K::log_terms + 1));
  FASTCL_UNROLL for (int k = K::log_terms - 1; k >= 1; k--) series = series * square + Simd<T>(T(2.0 / (2 * k + 1)));
  const Simd<T> tail = s * (half + series * square) + e * Simd<T>(K::ln2_lo);
  return e * Simd<T>(K::ln2_hi) - ((half - tail) - f);
}

template <class T>
FASTCL_INLINE Simd<T> simd_log(Simd<T> z) {
  using K = Constants<T>;
  using Raw = typename Simd<T>::Raw;
  constexpr int mantissa = Bits<T>::mantissa;
  // Subnormals are brought up by 2^mantissa first.
  const auto subnormal = z.v < Simd<T>(K::smallest_normal).v;
  const Simd<T> up = Simd<T>(T(int64_t(1) << mantissa));
  const auto bits = Simd<T>(subnormal ? (z * up).v : z.v).bits();
  const auto half_root = (Simd<T>(T(0.70710678118654752440)).bits());
  const auto exponent = (bits - half_root) >> mantissa;
  const Simd<T> f = Simd<T>::of_bits(bits - (exponent << mantissa)) - Simd<T>(1);
  Simd<T> e = Simd<T>(__builtin_convertvector(exponent, Raw));
  e = e - Simd<T>(subnormal ? Simd<T>(T(mantissa)).v : Raw{});
  Raw result = log_fraction(f, e).v;
  result = z.v == Raw{} ? Simd<T>(-K::infinity).v : result;
  result = z.v < Raw{} ? Simd<T>(T(__builtin_nan(""))).v : result;
  return Simd<T>(z.v < Simd<T>(K::infinity).v || z.v < Raw{} ? result : z.v);  // infinity and NaN: themselves
}

template <class T>
FASTCL_INLINE Simd<T> simd_log1p(Simd<T> z) {
  // 1 + z rounds; what was lost, relative to the sum, is the correction.
  const Simd<T> sum = Simd<T>(1) + z;
  const Simd<T> lost = z - (sum - Simd<T>(1));
  const Simd<T> corrected = simd_log(sum) + lost / sum;
  return Simd<T>(z.v < Simd<T>(Constants<T>::infinity).v && sum.v > typename Simd<T>::Raw{} ? corrected.v : simd_log(sum).v);
}

// e^-|z|, of which both a sigmoid and a softplus are made: where an epilogue takes both, the compiler computes it once.
template <class T>
FASTCL_INLINE Simd<T> exp_of_minus_magnitude(Simd<T> z) {
  return simd_exp(Simd<T>(z.v > typename Simd<T>::Raw{} ? (-z).v : z.v));
}

template <class T>
FASTCL_INLINE Simd<T> simd_sigmoid(Simd<T> z) {
  const Simd<T> e = exp_of_minus_magnitude(z), one = T(1);
  return Simd<T>(z.v > typename Simd<T>::Raw{} ? one.v : e.v) / (one + e);
}

// log(1 + e) for e in [0, 1] without simd_log1p's cases: with s = e / (2 + e) it is 2 (s + s^3/3 + ...) = e - s (e - R), R being
// 2/3 s^2 + 2/5 s^4 + ... and s^2 at most 1/9.
template <class T>
FASTCL_INLINE Simd<T> log1p_fraction(Simd<T> e) {
  constexpr int terms = Constants<T>::log1p_terms;
  const Simd<T> s = e / (Simd<T>(2) + e), square = s * s;
  Simd<T> series = T(2.0 / (2 * terms + 1));
  FASTCL_UNROLL for (int k = terms - 1; k >= 1; k--) series = series * square + Simd<T>(T(2.0 / (2 * k + 1)));
  return e - s * (e - square * series);
}

template <class T>
FASTCL_INLINE Simd<T> simd_softplus(Simd<T> z) {
  return larger(Simd<T>(T(0)), z) + log1p_fraction(exp_of_minus_magnitude(z));
}

template <class T>
FASTCL_INLINE Simd<T> simd_rsqrt(Simd<T> z) {
  return Simd<T>(1) / square_root(z);
}

FASTCL_INLINE Simd<double> simd_pow(Simd<double> z, Simd<double> exponent) {
  const Simd<double> result = simd_exp(exponent * simd_log(z));
  return Simd<double>(exponent.v == Simd<double>::Raw{} ? Simd<double>(1).v : result.v);
}

// In double: e^(p log z) in float would lose |p log z| units in the last place.
FASTCL_INLINE Simd<float> simd_pow(Simd<float> z, Simd<float> exponent) {
  constexpr int half = Simd<float>::lanes / 2;
  Simd<float> result;
  for (int part = 0; part < 2; part++) {
    Simd<double> base, power;
    FASTCL_UNROLL for (int l = 0; l < half; l++) base.v[l] = z.v[part * half + l];
    FASTCL_UNROLL for (int l = 0; l < half; l++) power.v[l] = exponent.v[part * half + l];
    const Simd<double> wide = simd_pow(base, power);
    FASTCL_UNROLL for (int l = 0; l < half; l++) result.v[part * half + l] = float(wide.v[l]);
  }
  return result;
}

}  // namespace fastcl::cpu::FASTCL_ISA
