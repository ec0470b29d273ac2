// The kernels of one instruction set: this file is compiled once for each, with FASTCL_ISA its name.
#include "../strip.h"

namespace fastcl::cpu::FASTCL_ISA {

#if !defined(__AMX_BF16__)
inline constexpr std::nullptr_t rows_beyond = nullptr;
#endif

extern const Kernels<float> kernels_float{sweep<float>, strip<float>, squared_norms<float>, fma_flops<float>, rows_beyond};
extern const Kernels<double> kernels_double{sweep<double>, strip<double>, squared_norms<double>, fma_flops<double>, nullptr};

}  // namespace fastcl::cpu::FASTCL_ISA
