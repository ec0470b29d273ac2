// Launches of the gradient sweep under log-sum-exp, and of what prepares it.
#include "fused_launch.cuh"

namespace fastcl::cuda {

template <class C>
static int logsumexp_of(const FusedGradient& p, void* stream) {
  return launch_gradient<C>(fused_gradient_kernel<C, SoftmaxWeights<C>>, p, stream);
}

int launch_gradient_logsumexp(const FusedGradient& p, void* stream) {
  const bool narrow = p.sides.d <= 128;
  switch (p.sides.dtype) {
    case Dtype::bfloat16:
      return narrow ? logsumexp_of<GradientLayout<bf16, 2>>(p, stream) : logsumexp_of<GradientLayout<bf16, 4>>(p, stream);
    case Dtype::float16:
      return narrow ? logsumexp_of<GradientLayout<f16, 2>>(p, stream) : logsumexp_of<GradientLayout<f16, 4>>(p, stream);
    case Dtype::float32: return logsumexp_of<GradientLayout<float, 4>>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

extern "C" int fastcl_cuda_fused_gradient(const FusedGradient* p, void* stream) {
  if (!plausible(p->equation, p->sides) || p->sides.d > fused_gradient_most(p->sides.dtype)) return cudaErrorInvalidValue;
  return p->equation.reduce == Reduction::logsumexp ? launch_gradient_logsumexp(*p, stream) : launch_gradient_sum(*p, stream);
}

extern "C" int fastcl_cuda_fused_factors(const FusedFactors* p, void* stream) {
  return start(fused_factors_kernel<float2>, over((p->n > p->m ? p->n : p->m) + fused_tile), 256, 0, *p, stream);
}

extern "C" int fastcl_cuda_fused_pack(const FusedPack* p, void* stream) {
  const dim3 grid = over(p->rows * p->to_d);
  switch (p->dtype) {
    case Dtype::bfloat16: return start(fused_pack_kernel<bf16>, grid, 256, 0, *p, stream);
    case Dtype::float16: return start(fused_pack_kernel<f16>, grid, 256, 0, *p, stream);
    case Dtype::float32: return start(fused_pack_kernel<float>, grid, 256, 0, *p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace fastcl::cuda
