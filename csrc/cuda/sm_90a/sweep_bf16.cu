#include "sweep.cuh"

template int fastcl::cuda::hopper::start_sweep<fastcl::cuda::bf16>(const HopperTiles&, void*);
