// What needs CUDA's own headers beside ATen's, and the registration: all that the emulated tests do without.
#include <c10/cuda/CUDAStream.h>

#include "kernels.h"
#include "problem.h"

// c10::Stream has a native handle too, but only from torch 2.11 on.
void* fastcl::cuda::current_stream(const Tensor& t) { return c10::cuda::getCurrentCUDAStream(t.device().index()).stream(); }

TORCH_LIBRARY_IMPL(fastcl, CUDA, library) { fastcl::cuda::implement(library); }
