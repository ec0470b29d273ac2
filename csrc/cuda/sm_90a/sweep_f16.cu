#include "sweep.cuh"

template int fastcl::cuda::hopper::start_sweep<fastcl::cuda::f16>(const HopperTiles&, void*);
