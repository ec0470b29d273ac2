// One register of T: a thin wrapper over the compiler's vector extensions, so that one source serves every
// instruction set, with the few operations for which the extensions have no operator.
//
// Not at::vec: its headers carry inline functions of c10 and std under one name for all instruction sets, and the
// linker may keep the AVX-512 copy for everyone. Everything here is always_inline or lives in the instruction set's own
// namespace. Measured, at::vec, xsimd, Highway and these extensions run the same microkernel within noise.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../intrinsics.h"

#define FASTCL_UNROLL _Pragma("GCC unroll 64")

namespace fastcl::cpu::FASTCL_ISA {

#if defined(__AVX512F__)
inline constexpr int register_bytes = 64, register_count = 32;
inline constexpr int every = -1;  // all lanes: g++ 12 warns of the unmasked intrinsics' undefined source operand
#elif defined(__AVX2__)
inline constexpr int register_bytes = 32, register_count = 16;
#else
inline constexpr int register_bytes = 16;
#if defined(__aarch64__)
inline constexpr int register_count = 32;
#else
inline constexpr int register_count = 16;
#endif
#endif

#if defined(__AMX_BF16__)
inline constexpr bool has_amx = true;
#else
inline constexpr bool has_amx = false;
#endif

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using type = int32_t;
  static constexpr int mantissa = 23, bias = 127;
};
template <>
struct Bits<double> {
  using type = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
};

template <class T>
struct Simd {
  using Int = typename Bits<T>::type;
  typedef T Raw __attribute__((vector_size(register_bytes)));
  typedef Int RawInt __attribute__((vector_size(register_bytes)));
  typedef std::make_unsigned_t<Int> RawUnsigned __attribute__((vector_size(register_bytes)));  // whose sums may wrap
  typedef T Loose __attribute__((vector_size(register_bytes), aligned(sizeof(T)), may_alias));
  typedef Int LooseInt __attribute__((vector_size(register_bytes), aligned(sizeof(T)), may_alias));
  static constexpr int lanes = register_bytes / sizeof(T);

  Raw v;

  FASTCL_INLINE Simd() = default;
  FASTCL_INLINE Simd(Raw raw) : v(raw) {}
  // Subtracting zero is how the compiler makes one broadcast of it; filling by elements made a memory round trip.
  template <class S>
    requires std::is_arithmetic_v<S>
  FASTCL_INLINE Simd(S s) : v(T(s) - Raw{}) {}

  static FASTCL_INLINE Simd load(const T* p) { return Simd(Raw(*reinterpret_cast<const Loose*>(p))); }
  FASTCL_INLINE void store(T* p) const { *reinterpret_cast<Loose*>(p) = v; }

  FASTCL_INLINE Simd operator-() const { return Simd(-v); }
  friend FASTCL_INLINE Simd operator+(Simd a, Simd b) { return Simd(a.v + b.v); }
  friend FASTCL_INLINE Simd operator-(Simd a, Simd b) { return Simd(a.v - b.v); }
  friend FASTCL_INLINE Simd operator*(Simd a, Simd b) { return Simd(a.v * b.v); }
  friend FASTCL_INLINE Simd operator/(Simd a, Simd b) { return Simd(a.v / b.v); }
  FASTCL_INLINE Simd& operator+=(Simd b) { return v += b.v, *this; }

  FASTCL_INLINE RawInt bits() const { return (RawInt)v; }
  static FASTCL_INLINE Simd of_bits(RawInt bits) { return Simd((Raw)bits); }
};

template <class T>
FASTCL_INLINE Simd<T> simd_select_less(Simd<T> a, Simd<T> b, Simd<T> when_less, Simd<T> otherwise) {
  return Simd<T>(a.v < b.v ? when_less.v : otherwise.v);
}

// Where the lane of keep is all ones; 0 where it is all zeros, whatever z is there (NaN included).
template <class T>
FASTCL_INLINE Simd<T> kept(Simd<T> z, const typename Bits<T>::type* keep) {
  return Simd<T>::of_bits(z.bits() & typename Simd<T>::RawInt(*reinterpret_cast<const typename Simd<T>::LooseInt*>(keep)));
}

// The larger of a bound and z; NaN in z gives NaN.
template <class T>
FASTCL_INLINE Simd<T> larger(Simd<T> bound, Simd<T> z) {
  // The second operand is what the instruction gives for NaN.
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return Simd<T>((typename Simd<T>::Raw)_mm512_maskz_max_ps(every, (__m512)bound.v, (__m512)z.v));
  else return Simd<T>((typename Simd<T>::Raw)_mm512_maskz_max_pd(every, (__m512d)bound.v, (__m512d)z.v));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return Simd<T>((typename Simd<T>::Raw)_mm256_max_ps((__m256)bound.v, (__m256)z.v));
  else return Simd<T>((typename Simd<T>::Raw)_mm256_max_pd((__m256d)bound.v, (__m256d)z.v));
#elif defined(__x86_64__)
  if constexpr (sizeof(T) == 4) return Simd<T>((typename Simd<T>::Raw)_mm_max_ps((__m128)bound.v, (__m128)z.v));
  else return Simd<T>((typename Simd<T>::Raw)_mm_max_pd((__m128d)bound.v, (__m128d)z.v));
#else
  return Simd<T>(bound.v > z.v ? bound.v : z.v);
#endif
}

template <class T>
FASTCL_INLINE Simd<T> smaller(Simd<T> bound, Simd<T> z) {
  return Simd<T>(bound.v < z.v ? bound.v : z.v);
}

template <class T>
FASTCL_INLINE double sum_of_lanes(Simd<T> z) {
  double sum = 0;
  FASTCL_UNROLL for (int l = 0; l < Simd<T>::lanes; l++) sum += z.v[l];
  return sum;
}

// Rounds to the nearest integer; |z| < 2^22 (2^51 for double).
template <class T>
FASTCL_INLINE Simd<T> nearest(Simd<T> z) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return Simd<T>((typename Simd<T>::Raw)_mm512_maskz_roundscale_ps(every, (__m512)z.v, 8));
  else return Simd<T>((typename Simd<T>::Raw)_mm512_maskz_roundscale_pd(every, (__m512d)z.v, 8));
#else
  const Simd<T> magic = T(1.5) * T(int64_t(1) << Bits<T>::mantissa);
  return (z + magic) - magic;
#endif
}

// 2^n for an integer n, |n| <= bias.
template <class T>
FASTCL_INLINE Simd<T> power_of_two(Simd<T> n) {
  const Simd<T> magic = T(1.5) * T(int64_t(1) << Bits<T>::mantissa);
  return Simd<T>::of_bits(((n + magic).bits() + Bits<T>::bias) << Bits<T>::mantissa);
}

// p * 2^n, n an integer: to infinity above, and through the subnormals to 0 below.
template <class T>
FASTCL_INLINE Simd<T> scaled(Simd<T> p, Simd<T> n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return Simd<T>((typename Simd<T>::Raw)_mm512_maskz_scalef_ps(every, (__m512)p.v, (__m512)n.v));
  else return Simd<T>((typename Simd<T>::Raw)_mm512_maskz_scalef_pd(every, (__m512d)p.v, (__m512d)n.v));
#else
  const Simd<T> half = nearest(n * Simd<T>(T(0.5)));
  return p * power_of_two(half) * power_of_two(n - half);
#endif
}

template <class T>
FASTCL_INLINE Simd<T> square_root(Simd<T> z) {
  using Raw = typename Simd<T>::Raw;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return Simd<T>((Raw)_mm512_maskz_sqrt_ps(every, (__m512)z.v));
  else return Simd<T>((Raw)_mm512_maskz_sqrt_pd(every, (__m512d)z.v));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return Simd<T>((Raw)_mm256_sqrt_ps((__m256)z.v));
  else return Simd<T>((Raw)_mm256_sqrt_pd((__m256d)z.v));
#elif defined(__x86_64__)
  if constexpr (sizeof(T) == 4) return Simd<T>((Raw)_mm_sqrt_ps((__m128)z.v));
  else return Simd<T>((Raw)_mm_sqrt_pd((__m128d)z.v));
#else
  Raw r;
  FASTCL_UNROLL for (int l = 0; l < Simd<T>::lanes; l++) r[l] = T(__builtin_sqrt(z.v[l]));
  return Simd<T>(r);
#endif
}

}  // namespace fastcl::cpu::FASTCL_ISA
