// Launches of the gradient sweep for sums of each pair function.
#include "fused_launch.cuh"

namespace fastcl::cuda {

template <class C, template <class, class> class Weights>
static int sum_of(const FusedGradient& p, void* stream) {
  using Kernel = void (*)(FusedGradient);
#define FASTCL_KERNEL(name, F, constants) fused_gradient_kernel<C, Weights<C, F>>,
  static constexpr Kernel kernels[] = {FASTCL_FOR_EACH_PAIR(FASTCL_KERNEL)};
#undef FASTCL_KERNEL
  return launch_gradient<C>(kernels[p.equation.pair], p, stream);
}

template <class C>
static int narrow_of(const FusedGradient& p, void* stream) {
  return p.values != nullptr ? sum_of<C, ValuesAndSlopes>(p, stream) : sum_of<C, SlopeWeights>(p, stream);
}

int launch_gradient_sum(const FusedGradient& p, void* stream) {
  if (p.values != nullptr && p.sides.d > fused_values_most) return cudaErrorInvalidValue;
  switch (p.sides.dtype) {
    case Dtype::bfloat16:
      if (p.sides.d > 128) return sum_of<GradientLayout<bf16, 4>, SlopeWeights>(p, stream);
      return narrow_of<GradientLayout<bf16, 2>>(p, stream);
    case Dtype::float32: return narrow_of<GradientLayout<float, 4>>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace fastcl::cuda
