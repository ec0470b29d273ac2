#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastcl {
namespace {

// AMX for bfloat16, the conversions to it, and the system's leave to use the tile registers, which it gives a process once.
bool amx_is_there() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, avx512_bf16 = 1u << 5;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & amx_bf16) == 0 || (d & amx_tile) == 0) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & avx512_bf16) == 0) return false;
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

bool processor_has(const std::string& isa) {
  if (isa == "baseline") return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == "avx2" || isa == "avx512_model" || isa == "amx_model") return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == "avx512") return avx512;
  if (isa == "amx") return avx512 && amx_is_there();
#endif
  return false;
}

bool is_usable(const std::string& isa) {
  const auto& usable = usable_isas();
  return std::find(usable.begin(), usable.end(), isa) != usable.end();
}

std::mutex mutex;
std::string preferred;  // empty: none
bool made = false;      // the choice

std::string choose() {
  const std::lock_guard lock(mutex);
  const auto& usable = usable_isas();
  const char* named = std::getenv("FASTCL_CPU_ISA");
  if (named == nullptr || *named == '\0') return made = true, preferred.empty() ? usable.back() : preferred;
  if (is_usable(named)) return made = true, named;
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

bool prefer_isa(const std::string& isa) {
  const std::lock_guard lock(mutex);
  if (made || !is_usable(isa)) return false;
  preferred = isa;
  return true;
}

const std::string& chosen_isa() {
  static const std::string chosen = choose();
  return chosen;
}

}  // namespace fastcl
