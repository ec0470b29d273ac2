// The Python module fastcl._C. It holds the facts of the build; loading it also registers the kernels, which
// csrc/cpu and csrc/cuda give to torch under the schemas of fastcl/ops.py.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "build_facts.h"

namespace fastcl {
namespace {

bool processor_runs(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == "baseline";
}

// Of the instruction sets that were built, those that this processor has; the widest comes last.
std::vector<std::string> usable_isas() {
  std::vector<std::string> usable;
#define FASTCL_PUSH(isa) \
  if (processor_runs(#isa)) usable.push_back(#isa);
  FASTCL_FOR_EACH_ISA(FASTCL_PUSH)
#undef FASTCL_PUSH
  return usable;
}

}  // namespace
}  // namespace fastcl

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "fastcl's compiled kernels; see fastcl.extension.";
  m.def("build_facts", [] { return std::string(fastcl::build_facts); }, "What was built, as JSON.");
  m.def("usable_isas", [] {
    pybind11::list names;
    for (const auto& name : fastcl::usable_isas()) names.append(name);
    return names;
  }, "The instruction sets that were built and that this processor has, the widest last.");
}
