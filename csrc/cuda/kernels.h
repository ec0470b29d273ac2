// The CUDA kernels under the schemas of fastcl/ops.py.
#pragma once

#include <torch/library.h>

namespace fastcl::cuda {

// Gives the library's current dispatch key its kernel_rows, kernel_gradients and kernel_total.
void implement(torch::Library& library);

}  // namespace fastcl::cuda
