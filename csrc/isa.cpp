#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace fastcl {
namespace {

bool processor_has(const std::string& isa) {
  if (isa == "baseline") return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return false;
}

std::string choose() {
  const auto& usable = usable_isas();
  const char* named = std::getenv("FASTCL_CPU_ISA");
  if (named == nullptr || *named == '\0') return usable.back();
  if (std::find(usable.begin(), usable.end(), named) != usable.end()) return named;
  std::string expected;
  for (const auto& isa : usable) expected += (expected.empty() ? "" : ", ") + isa;
  throw std::invalid_argument("FASTCL_CPU_ISA: expected one of " + expected +
                              " (what was built and this processor has), got '" + named + "'");
}

}  // namespace

const std::vector<std::string>& usable_isas() {
  static const std::vector<std::string> usable = [] {
    std::vector<std::string> isas;
#define FASTCL_PUSH_IF_USABLE(isa) \
  if (processor_has(#isa)) isas.push_back(#isa);
    FASTCL_FOR_EACH_ISA(FASTCL_PUSH_IF_USABLE)
#undef FASTCL_PUSH_IF_USABLE
    return isas;
  }();
  return usable;
}

const std::string& chosen_isa() {
  static const std::string chosen = choose();
  return chosen;
}

}  // namespace fastcl
