// Launches of the gradient sweep for sums of each pair function.
#include "fused_launch.cuh"

namespace fastcl::cuda {

template <class C>
static int sum_of(const FusedGradient& p, void* stream) {
  using Kernel = void (*)(FusedGradient);
#define FASTCL_KERNEL(name, F, constants) fused_gradient_kernel<C, SlopeWeights<C, F>>,
  static constexpr Kernel kernels[] = {FASTCL_FOR_EACH_PAIR(FASTCL_KERNEL)};
#undef FASTCL_KERNEL
  return launch_gradient<C>(kernels[p.equation.pair], p, stream);
}

int launch_gradient_sum(const FusedGradient& p, void* stream) {
  const bool narrow = p.sides.d <= 128;
  switch (p.sides.dtype) {
    case Dtype::bfloat16:
      return narrow ? sum_of<GradientLayout<bf16, 2>>(p, stream) : sum_of<GradientLayout<bf16, 4>>(p, stream);
    case Dtype::float32: return sum_of<GradientLayout<float, 4>>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace fastcl::cuda
