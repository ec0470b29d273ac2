#include "sums.cuh"

template int fastcl::cuda::hopper::weights_sum<fastcl::cuda::f16>(const HopperTiles&, void*);
