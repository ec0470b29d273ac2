// A few of the Hopper kernels behind the launches' own names, log-sum-exps and softplus in bfloat16: quick to compile, and so to
// compile again with a mistake in it.
#include "fused_launch.cuh"
#include "sm_90a/product.cuh"
#include "sm_90a/sweep.cuh"
#include "sm_90a/weights.cuh"

using namespace fastcl::cuda;
using namespace fastcl::cuda::hopper;

extern "C" int fastcl_cuda_hopper_rows(const HopperTiles* p, void* stream) {
  const bool general = hopper_general(p->equation, false);
  if (p->equation.reduce == fastcl::Reduction::sum) return start_tiles<bf16, 128, Rows<128, PairFunction<fastcl::pairs::Softplus>, true>>(*p, stream);
  switch (hopper_resident(p->equation, p->sides.d, false, false)) {
    case 256: return start_tiles<bf16, 256, Rows<256, Exponential, false>>(*p, stream);
    case 192: return start_tiles<bf16, 192, Rows<192, Exponential, false>>(*p, stream);
    case 128: return general ? start_tiles<bf16, 128, Rows<128, Exponential, true>>(*p, stream) : start_tiles<bf16, 128, Rows<128, Exponential, false>>(*p, stream);
    default: return start_streamed<bf16, 256, Rows<256, Exponential, false>>(*p, stream);
  }
}

extern "C" int fastcl_cuda_hopper_weights(const HopperTiles* p, void* stream) {
  const bool sums = p->row_parts != nullptr;
  if (p->equation.reduce == fastcl::Reduction::sum) return start_tiles<bf16, 128, Weights<bf16, 128, fastcl::pairs::Softplus, true, 1>>(*p, stream);
  if (hopper_general(p->equation, sums)) return start_tiles<bf16, 128, Weights<bf16, 128, Softmax, true, 1>>(*p, stream);
  if (p->sides.d > 768) return start_streamed<bf16, 256, Weights<bf16, 256, Softmax, false, 1>>(*p, stream);
  if (p->sides.d > 256) return start_tiles<bf16, 128, Weights<bf16, 128, Softmax, false, 1>>(*p, stream);
  return start_tiles<bf16, 256, Weights<bf16, 256, Softmax, false, 4>>(*p, stream);
}

extern "C" int fastcl_cuda_hopper_sweep(const HopperTiles* p, void* stream) { return start_sweep<bf16>(*p, stream); }

extern "C" int fastcl_cuda_hopper_product(const HopperProduct* p, void* stream) { return start_product<bf16>(*p, stream); }

#include "sm_90a/merge.cu"

extern "C" int fastcl_cuda_fused_factors(const FusedFactors* p, void* stream) {
  return start(fused_factors_kernel<float2>, over((p->n > p->m ? p->n : p->m) + fused_tile), 256, 0, *p, stream);
}
