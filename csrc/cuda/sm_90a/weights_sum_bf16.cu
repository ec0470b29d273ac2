#include "sums.cuh"

template int fastcl::cuda::hopper::weights_sum<fastcl::cuda::bf16>(const HopperTiles&, void*);
