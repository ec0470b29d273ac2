// The functions that pair functions may call, for float and double (CPU and CUDA) and for SIMD vectors.
//
// csrc/generated/pairs.h calls them as intrinsics::name. A SIMD type brings its own simd_name functions, found by
// argument-dependent lookup (csrc/cpu/simd_math.h), so that this file knows no instruction set.
// maximum, minimum and select_less hand NaN on as torch does: NaN in z gives NaN.
#pragma once

#include <cmath>
#include <type_traits>

#if defined(__CUDACC__)
#define FASTCL_INLINE __host__ __device__ __forceinline__
#else
#define FASTCL_INLINE inline __attribute__((always_inline))
#endif

namespace fastcl::intrinsics {

template <class T>
inline constexpr bool is_scalar = std::is_floating_point_v<T>;

#define FASTCL_UNARY_INTRINSIC(name, scalar)   \
  template <class T>                           \
  FASTCL_INLINE T name(T z) {                  \
    if constexpr (is_scalar<T>) return scalar; \
    else return simd_##name(z);                \
  }

FASTCL_UNARY_INTRINSIC(exp, std::exp(z))
FASTCL_UNARY_INTRINSIC(expm1, std::expm1(z))
FASTCL_UNARY_INTRINSIC(log, std::log(z))
FASTCL_UNARY_INTRINSIC(log1p, std::log1p(z))
FASTCL_UNARY_INTRINSIC(sigmoid, T(1) / (T(1) + std::exp(-z)))
FASTCL_UNARY_INTRINSIC(softplus, (z < T(0) ? T(0) : z) + std::log1p(std::exp(z < T(0) ? z : -z)))
#if defined(__CUDA_ARCH__)
FASTCL_UNARY_INTRINSIC(rsqrt, ::rsqrt(z))
#else
FASTCL_UNARY_INTRINSIC(rsqrt, T(1) / std::sqrt(z))
#endif
#undef FASTCL_UNARY_INTRINSIC

template <class T>
FASTCL_INLINE T pow(T z, T exponent) {
#if defined(__CUDA_ARCH__)
  // nvcc makes a call of pow(double), with a stack for it. In line, and exact to |exponent log z| units in the last place.
  if constexpr (is_scalar<T>) {
    const T l = std::log(z), t = exponent * l, rest = std::fma(exponent, l, -t);
    return std::exp(t) * (rest == rest ? T(1) + rest : T(1));
  } else return simd_pow(z, exponent);
#endif
  if constexpr (is_scalar<T>) return std::pow(z, exponent);
  else return simd_pow(z, exponent);
}

// when_less where a < b, otherwise elsewhere (and where a is NaN).
template <class T>
FASTCL_INLINE T select_less(T a, T b, T when_less, T otherwise) {
  if constexpr (is_scalar<T>) return a < b ? when_less : otherwise;
  else return simd_select_less(a, b, when_less, otherwise);
}

template <class T>
FASTCL_INLINE T maximum(T z, T bound) {
  return select_less(z, bound, bound, z);
}

template <class T>
FASTCL_INLINE T minimum(T z, T bound) {
  return select_less(bound, z, bound, z);
}

}  // namespace fastcl::intrinsics
