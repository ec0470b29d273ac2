#include "product.cuh"

template int fastcl::cuda::hopper::start_product<fastcl::cuda::f16>(const HopperProduct&, void*);
