// Which form serves a problem: the one place where that is decided.
#pragma once

#include "problem.h"

namespace fastcl::cuda {

enum class Form { strip, fused, hopper };

// FASTCL_CUDA (read at each call) is strip, fused or hopper (where their kernels hold the problem) or auto: the table in form.cpp.
// ValueError for another value.
Form form(const Problem& p, bool gradients);

// Facts of the device of t.
DeviceFacts device_facts(const Tensor& t);

}  // namespace fastcl::cuda
