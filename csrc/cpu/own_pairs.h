// Pair functions that users write, each compiled at run time into a library of its own (own_pair.h).
#pragma once

#include <string_view>

namespace fastcl::cpu {

// What such a library hands over. Its epilogues are those of one instruction set: three for each type, in the order of epilogue.h.
struct OwnPair {
  const char* isa;
  int constants;
  const void *of_float, *of_double;
};

// The one that was added under this name; null where none was.
const OwnPair* own_pair(std::string_view name);

}  // namespace fastcl::cpu
