// Launches of the forward sweep for sums of each pair function.
#include "fused_launch.cuh"

namespace fastcl::cuda {

template <class T>
static int rows_sum(const FusedRows& p, void* stream) {
  using C = RowsLayout<T>;
  using Kernel = void (*)(FusedRows);
#define FASTCL_KERNEL(name, F, constants) fused_rows_kernel<C, Sum<C, F>>,
  static constexpr Kernel kernels[] = {FASTCL_FOR_EACH_PAIR(FASTCL_KERNEL)};
#undef FASTCL_KERNEL
  return launch_rows<C>(kernels[p.equation.pair], p, false, stream);
}

int launch_rows_sum(const FusedRows& p, void* stream) {
  switch (p.sides.dtype) {
    case Dtype::bfloat16: return rows_sum<bf16>(p, stream);
    case Dtype::float16: return rows_sum<f16>(p, stream);
    case Dtype::float32: return rows_sum<float>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace fastcl::cuda
