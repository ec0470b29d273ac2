// What a library of one pair function of a user's own is made of, compiled at run time for the instruction set in use:
//
//     #include "cpu/own_pair.h"
//     namespace fastcl::pairs { struct Own { value and slope, as in generated/pairs.h }; }
//     FASTCL_OWN_PAIR(Own, constants)
//
// Only the epilogues are compiled: the sweeps of libfastcl_cpu.so call them by pointers, as they call those of fastcl's own.
#pragma once

#include "epilogue.h"
#include "own_pairs.h"

namespace fastcl::cpu::FASTCL_ISA {

// Of a negative z where the exponent is whole, with its sign where that is odd.
template <class T>
FASTCL_INLINE Simd<T> simd_own_pow(Simd<T> z, Simd<T> exponent) {
  const auto negative = z.v < typename Simd<T>::Raw{};
  const Simd<T> power = simd_pow(Simd<T>(negative ? (-z).v : z.v), exponent), half = exponent * Simd<T>(T(0.5));
  const auto whole = nearest(exponent).v == exponent.v, odd = nearest(half).v != half.v;
  const Simd<T> of_negative = Simd<T>(odd ? (-power).v : power.v), none = T(__builtin_nan(""));
  return Simd<T>(negative ? (whole ? of_negative.v : none.v) : power.v);
}

}  // namespace fastcl::cpu::FASTCL_ISA

namespace fastcl::intrinsics {

// As PyTorch's: the pow of fastcl's own pair functions is for z >= 0, which is all that they take.
template <class T>
FASTCL_INLINE T own_pow(T z, T exponent) {
  return simd_own_pow(z, exponent);
}

}  // namespace fastcl::intrinsics

#define FASTCL_TEXT_OF(word) #word
#define FASTCL_TEXT(macro) FASTCL_TEXT_OF(macro)

#define FASTCL_OWN_PAIR(P, constants)                                                                              \
  namespace fastcl::cpu::FASTCL_ISA {                                                                              \
  static_assert(constants <= most_constants);                                                                      \
  static constexpr Epilogue<float> of_float[] = {FASTCL_EPILOGUES(float, pairs::P)};                               \
  static constexpr Epilogue<double> of_double[] = {FASTCL_EPILOGUES(double, pairs::P)};                            \
  extern "C" __attribute__((visibility("default"))) const OwnPair fastcl_own_pair{FASTCL_TEXT(FASTCL_ISA), constants, \
                                                                                  of_float, of_double};            \
  }
