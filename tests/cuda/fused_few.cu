// A few of the fused kernels behind the launches' own names: quick to compile, and so to compile again with a mistake in it.
#include "fused_launch.cuh"

namespace fastcl::cuda {

extern "C" int fastcl_cuda_fused_rows(const FusedRows* p, void* stream) {
  using C = RowsLayout<bf16>;
  if (!plausible(p->equation, p->sides)) return cudaErrorInvalidValue;
  return launch_rows<C>(fused_rows_kernel<C, LogSumExp<C, true>>, *p, true, stream);
}

extern "C" int fastcl_cuda_fused_merge(const FusedMerge* p, void* stream) {
  return start(fused_merge_kernel<float2>, over(p->size), 256, 0, *p, stream);
}

extern "C" int fastcl_cuda_fused_factors(const FusedFactors* p, void* stream) {
  return start(fused_factors_kernel<float2>, over((p->n > p->m ? p->n : p->m) + fused_tile), 256, 0, *p, stream);
}

extern "C" int fastcl_cuda_fused_gradient(const FusedGradient* p, void* stream) {
  using C = GradientLayout<bf16, 2>;
  using F = pairs::Softplus;
  if (p->equation.reduce == Reduction::sum)
    return launch_gradient<C>(p->values != nullptr ? fused_gradient_kernel<C, ValuesAndSlopes<C, F>> : fused_gradient_kernel<C, SlopeWeights<C, F>>, *p, stream);
  return launch_gradient<C>(fused_gradient_kernel<C, SoftmaxWeights<C>>, *p, stream);
}

}  // namespace fastcl::cuda
