#include "rows_logsumexp.cuh"

template int fastcl::cuda::hopper::rows_logsumexp<fastcl::cuda::f16>(const HopperTiles&, void*);
