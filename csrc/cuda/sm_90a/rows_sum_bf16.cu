#include "sums.cuh"

template int fastcl::cuda::hopper::rows_sum<fastcl::cuda::bf16>(const HopperTiles&, void*);
