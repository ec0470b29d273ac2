// Launches of the forward sweep under log-sum-exp, and of the merge.
#include "fused_launch.cuh"

namespace fastcl::cuda {

template <class T>
static int rows_logsumexp(const FusedRows& p, void* stream) {
  using C = RowsLayout<T>;
  auto kernel = p.col_parts == nullptr ? fused_rows_kernel<C, LogSumExp<C, false>> : fused_rows_kernel<C, LogSumExp<C, true>>;
  return launch_rows<C>(kernel, p, true, stream);
}

int launch_rows_logsumexp(const FusedRows& p, void* stream) {
  switch (p.sides.dtype) {
    case Dtype::bfloat16: return rows_logsumexp<bf16>(p, stream);
    case Dtype::float16: return rows_logsumexp<f16>(p, stream);
    case Dtype::float32: return rows_logsumexp<float>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

extern "C" int fastcl_cuda_fused_rows(const FusedRows* p, void* stream) {
  if (!plausible(p->equation, p->sides) || p->ctas < 1 || p->splits < 1 || p->stages < 2 || p->stages > 4 ||
      p->ctas > ceil_div(p->sides.n, fused_tile) || p->splits > ceil_div(p->sides.m, fused_tile) || p->splits > 65535)
    return cudaErrorInvalidValue;  // a CTA without a block would leave its line of the workspace unwritten
  return p->equation.reduce == Reduction::logsumexp ? launch_rows_logsumexp(*p, stream) : launch_rows_sum(*p, stream);
}

extern "C" int fastcl_cuda_fused_merge(const FusedMerge* p, void* stream) {
  return start(p->logsumexp ? fused_merge_kernel<float2> : fused_merge_kernel<float>, over(p->size), 256, 0, *p, stream);
}

}  // namespace fastcl::cuda
