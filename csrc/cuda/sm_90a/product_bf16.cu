#include "product.cuh"

template int fastcl::cuda::hopper::start_product<fastcl::cuda::bf16>(const HopperProduct&, void*);
