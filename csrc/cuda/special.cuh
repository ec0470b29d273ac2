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

__device__ __forceinline__ Fast simd_log1p(Fast z) { return Fast::of(log1pf(z.v)); }

__device__ __forceinline__ Fast simd_sigmoid(Fast z) {
  const float e = ex2(-fabsf(z.v) * log2_e), inverse = reciprocal(1.f + e);
  return Fast::of(z.v < 0.f ? e * inverse : inverse);
}
__device__ __forceinline__ Fast simd_softplus(Fast z) {
  return Fast::of(larger(z.v, 0.f) + log1p_unit(ex2(-fabsf(z.v) * log2_e)));
}

}  // namespace fastcl::cuda
