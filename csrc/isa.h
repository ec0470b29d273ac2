// Which instruction set the CPU kernels run with: of those that were built, the widest that this processor has, unless told.
// csrc/cpu/isa/*.cpp is compiled once for each, with FASTCL_ISA defined as its name; what those files define has to
// lie in a namespace of that name, or the linker would keep one copy for all.
#pragma once

#include <string>
#include <vector>

#include "isas.h"  // FASTCL_FOR_EACH_ISA(X): X(baseline) X(avx2) ..., those that were built, narrowest first

namespace fastcl {

// Of the instruction sets that were built, those that this processor has; narrowest first, never empty.
const std::vector<std::string>& usable_isas();

// Takes this one in place of the widest. False, and nothing is changed, where it is not usable or chosen_isa() has chosen: a
// process runs with one set, so that the same call gives the same bits.
bool prefer_isa(const std::string& isa);

// The one that the environment variable FASTCL_CPU_ISA named when this was first called, else the one preferred, else the widest.
// Throws std::invalid_argument when that one is not usable.
const std::string& chosen_isa();

}  // namespace fastcl
