#include "kernels.h"

TORCH_LIBRARY_IMPL(fastcl, CUDA, library) { fastcl::cuda::implement(library); }
