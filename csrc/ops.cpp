// The Python module fastcl._C: the facts of the build. Opening it also registers the kernels of csrc/cpu and csrc/cuda
// under the schemas that fastcl/ops.py defines.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_facts.h"
#include "isa.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled kernels of fastcl; fastcl.backends.extension opens this module.";
  m.def("build_facts", [] { return fastcl::build_facts; }, "What was built, as JSON.");
  m.def("usable_isas", &fastcl::usable_isas, "The instruction sets built that this processor has; narrowest first.");
  m.def("chosen_isa", &fastcl::chosen_isa, "The one that the CPU kernels run with.");
}
