#include "kernels.h"

#include "../isa.h"

namespace fastcl::cpu {

#define FASTCL_DECLARE(isa)                    \
  namespace isa {                              \
  extern const Kernels<float> kernels_float;   \
  extern const Kernels<double> kernels_double; \
  }
FASTCL_FOR_EACH_ISA(FASTCL_DECLARE)
#undef FASTCL_DECLARE

namespace {

struct Entry {
  const char* isa;
  const Kernels<float>& kernels_float;
  const Kernels<double>& kernels_double;
};

const Entry* chosen() {
#define FASTCL_ENTRY(isa) {#isa, isa::kernels_float, isa::kernels_double},
  static const Entry entries[] = {FASTCL_FOR_EACH_ISA(FASTCL_ENTRY)};
#undef FASTCL_ENTRY
  const Entry* entry = entries;
  while (chosen_isa() != entry->isa) entry++;
  return entry;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  static const Kernels<float>& kernels = chosen()->kernels_float;
  return kernels;
}
template <>
const Kernels<double>& kernels<double>() {
  static const Kernels<double>& kernels = chosen()->kernels_double;
  return kernels;
}

}  // namespace fastcl::cpu
