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
