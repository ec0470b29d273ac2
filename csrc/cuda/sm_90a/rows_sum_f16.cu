#include "sums.cuh"

template int fastcl::cuda::hopper::rows_sum<fastcl::cuda::f16>(const HopperTiles&, void*);
