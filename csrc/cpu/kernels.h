// The kernels of the instruction set that was chosen (csrc/isa.h).
#pragma once

#include "task.h"

namespace fastcl::cpu {

template <class T>
const Kernels<T>& kernels();  // T is float or double

// Those for rows of any norm: the same, or of the set before it.
template <class T>
const Kernels<T>& kernels_of_any_norm();

}  // namespace fastcl::cpu
