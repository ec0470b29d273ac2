// The kernels of the instruction set that was chosen (csrc/isa.h).
#pragma once

#include "task.h"

namespace fastcl::cpu {

template <class T>
const Kernels<T>& kernels();  // T is float or double

}  // namespace fastcl::cpu
