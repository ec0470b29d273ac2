// Pair functions on the special function units: a scalar type whose intrinsics are a handful of instructions each.
//
// csrc/intrinsics.h finds simd_name by argument-dependent lookup, as for the CPU's vectors. Errors are a few roundings of
// float32; the formulas are those of triton_kernels/intrinsics.py.
#pragma once

#include "tile.cuh"

namespace fastcl::cuda {

inline constexpr float log2_e = 1.4426950408889634f, log_2 = 0.6931471805599453f;

struct Fast {
  float v;

  Fast() = default;
  __device__ __forceinline__ explicit constexpr Fast(double c) : v(static_cast<float>(c)) {}
  static __device__ __forceinline__ Fast of(float v) {
    Fast f;
    f.v = v;
    return f;
  }
  friend __device__ __forceinline__ Fast operator+(Fast a, Fast b) { return of(a.v + b.v); }
  friend __device__ __forceinline__ Fast operator-(Fast a, Fast b) { return of(a.v - b.v); }
  friend __device__ __forceinline__ Fast operator*(Fast a, Fast b) { return of(a.v * b.v); }
  friend __device__ __forceinline__ Fast operator/(Fast a, Fast b) { return of(a.v * reciprocal(b.v)); }
  friend __device__ __forceinline__ Fast operator-(Fast a) { return of(-a.v); }
};

__device__ __forceinline__ Fast simd_exp(Fast z) { return Fast::of(ex2(z.v * log2_e)); }
__device__ __forceinline__ Fast simd_log(Fast z) { return Fast::of(lg2(z.v) * log_2); }
__device__ __forceinline__ Fast simd_rsqrt(Fast z) { return Fast::of(rsqrtf(z.v)); }
__device__ __forceinline__ Fast simd_pow(Fast z, Fast exponent) { return Fast::of(ex2(exponent.v * lg2(z.v))); }
__device__ __forceinline__ Fast simd_select_less(Fast a, Fast b, Fast when_less, Fast otherwise) {
  return a.v < b.v ? when_less : otherwise;
}

// log(1 + e) for 0 <= e <= 1, right to 1.5e-7 of itself: a Chebyshev fit to log(1 + e) / e, where lg2 would be off by 1e-7
// absolutely.
__device__ __forceinline__ float log1p_unit(float e) {
  float p = -0.00317605701f;
  p = fmaf(p, e, 0.0195425272f);
  p = fmaf(p, e, -0.0563736128f);
  p = fmaf(p, e, 0.105436238f);
  p = fmaf(p, e, -0.152696671f);
  p = fmaf(p, e, 0.196632743f);
  p = fmaf(p, e, -0.249516163f);
  p = fmaf(p, e, 0.333297105f);
  p = fmaf(p, e, -0.499998926f);
  p = fmaf(p, e, 0.999999995f);
  return p * e;
}

// log(1 + z). From -1/2 to 1, where lg2 would be off by 1e-7 absolutely, 2 atanh(z / (2 + z)) = z - s (z - R),
// R = 2/3 s^2 + 2/5 s^4 + ..., of which a Chebyshev fit is right to 4e-7, a hundredth of which is in the result.
__device__ __forceinline__ Fast simd_log1p(Fast z) {
  const float s = z.v * reciprocal(2.f + z.v), square = s * s;
  float p = fmaf(0.26851498f, square, 0.282366198f);
  p = fmaf(p, square, 0.400075606f);
  p = fmaf(p, square, 0.666666403f);
  return Fast::of(fabsf(z.v - 0.25f) <= 0.75f ? z.v - s * (z.v - square * p) : lg2(1.f + z.v) * log_2);
}

// e^z - 1; between -1/2 and 1/2, where the difference loses digits, z + z^2 p(z), p right to 3e-8. Elsewhere 2 e^z / 2 - 1: an
// exponential that a slope has too would be kept for it, for which registers of sm_100 did not suffice.
__device__ __forceinline__ Fast simd_expm1(Fast z) {
  float p = fmaf(1.99448744e-4f, z.v, 1.3982186e-3f);
  p = fmaf(p, z.v, 8.33323614e-3f);
  p = fmaf(p, z.v, 0.0416657912f);
  p = fmaf(p, z.v, 0.166666668f);
  p = fmaf(p, z.v, 0.500000012f);
  return Fast::of(fabsf(z.v) < 0.5f ? fmaf(z.v * z.v, p, z.v) : fmaf(2.f, ex2(fmaf(z.v, log2_e, -1.f)), -1.f));
}

__device__ __forceinline__ Fast simd_sigmoid(Fast z) {
  const float e = ex2(-fabsf(z.v) * log2_e), inverse = reciprocal(1.f + e);
  return Fast::of(z.v < 0.f ? e * inverse : inverse);
}
__device__ __forceinline__ Fast simd_softplus(Fast z) {
  return Fast::of(larger(z.v, 0.f) + log1p_unit(ex2(-fabsf(z.v) * log2_e)));
}

}  // namespace fastcl::cuda
