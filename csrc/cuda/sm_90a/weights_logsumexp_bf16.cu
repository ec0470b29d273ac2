#include "weights_logsumexp.cuh"

template int fastcl::cuda::hopper::weights_logsumexp<fastcl::cuda::bf16>(const HopperTiles&, void*);
