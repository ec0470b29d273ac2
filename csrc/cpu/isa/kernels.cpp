// The kernels of one instruction set: this file is compiled once for each, with FASTCL_ISA its name.
#include "../strip.h"

namespace fastcl::cpu::FASTCL_ISA {

extern const Kernels<float> kernels_float{sweep<float>, strip<float>, squared_norms<float>, fma_flops<float>};
extern const Kernels<double> kernels_double{sweep<double>, strip<double>, squared_norms<double>, fma_flops<double>};

}  // namespace fastcl::cpu::FASTCL_ISA
