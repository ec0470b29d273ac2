// The kernels of one instruction set: this file is compiled once for each, with FASTCL_ISA its name.
#include "../strip.h"

namespace fastcl::cpu::FASTCL_ISA {

// AMX flushes what is below 2^-126 to zero, parts of parts among it; the other sets take any row.
inline constexpr double least_norm = has_amx ? 0x1p-40 : 0, most_norm = has_amx ? 0x1p40 : __builtin_inf();

extern const Kernels<float> kernels_float{least_norm, most_norm, sweep<float>, strip<float>, squared_norms<float>, fma_flops<float>};
extern const Kernels<double> kernels_double{0, __builtin_inf(), sweep<double>, strip<double>, squared_norms<double>, fma_flops<double>};

}  // namespace fastcl::cpu::FASTCL_ISA
