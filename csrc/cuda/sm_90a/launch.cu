// The launches of the sweeps; kernels are in the files of their kind and dtype, so that they compile side by side.
#include "start.cuh"

using namespace fastcl::cuda;

extern "C" int fastcl_cuda_hopper_rows(const HopperTiles* p, void* stream) {
  const bool half = p->sides.dtype == Dtype::float16;
  if (p->equation.reduce == fastcl::Reduction::logsumexp)
    return half ? hopper::rows_logsumexp<f16>(*p, stream) : hopper::rows_logsumexp<bf16>(*p, stream);
  return half ? hopper::rows_sum<f16>(*p, stream) : hopper::rows_sum<bf16>(*p, stream);
}

extern "C" int fastcl_cuda_hopper_sweep(const HopperTiles* p, void* stream) {
  return p->sides.dtype == Dtype::float16 ? hopper::start_sweep<f16>(*p, stream) : hopper::start_sweep<bf16>(*p, stream);
}

extern "C" int fastcl_cuda_hopper_product(const HopperProduct* p, void* stream) {
  return p->dtype == Dtype::float16 ? hopper::start_product<f16>(*p, stream) : hopper::start_product<bf16>(*p, stream);
}

extern "C" int fastcl_cuda_hopper_weights(const HopperTiles* p, void* stream) {
  const bool half = p->sides.dtype == Dtype::float16;
  if (p->equation.reduce == fastcl::Reduction::logsumexp)
    return half ? hopper::weights_logsumexp<f16>(*p, stream) : hopper::weights_logsumexp<bf16>(*p, stream);
  return half ? hopper::weights_sum<f16>(*p, stream) : hopper::weights_sum<bf16>(*p, stream);
}
