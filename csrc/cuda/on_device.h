// Where the ops of csrc/cuda are registered, and how each starts a kernel: on the current stream of its tensors' device.
#pragma once

#include <stdexcept>

#include "../tensors.h"
#include "fused.h"

// Under tests the kernels are stood in for, and the ops are those of CPU tensors.
#ifndef FASTCL_LAUNCH_LIBRARY
#define FASTCL_LAUNCH_LIBRARY "fastcl"
#define FASTCL_LAUNCH_KEY "CUDA"
#endif

// As torch/csrc/inductor/aoti_torch/c/shim.h has it for a build with CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fastcl::cuda {

template <class Struct>
void launch_on(int32_t device, int (*kernel)(const Struct*, void*), const Struct& arguments, const char* name) {
  void* stream = nullptr;
  FASTCL_TORCH(aoti_torch_get_current_cuda_stream, device, &stream);
  // The runtime that is linked here has a current device of its own.
  int error = fastcl_cuda_use_device(device);
  if (error == 0) error = kernel(&arguments, stream);
  if (error == 0) return;
  throw std::runtime_error(text_of("fastcl: the CUDA kernel ", name, " could not be launched: ", fastcl_cuda_error_string(error), " (error ", int64_t(error),
                                   "). An error of an earlier kernel can surface here: run with CUDA_LAUNCH_BLOCKING=1 to find it; backend='blocked' does without these kernels"));
}

inline Dtype dtype_of(const Tensor& t) {
  switch (t.kind()) {
    case ScalarKind::float64: return Dtype::float64;
    case ScalarKind::bfloat16: return Dtype::bfloat16;
    case ScalarKind::float16: return Dtype::float16;
    default: return Dtype::float32;
  }
}

}  // namespace fastcl::cuda
