// The CPU kernels under the schemas of fastcl/ops.py, the instruction sets, and the machine's limit for the benchmark.
#include <chrono>

#include "../isa.h"
#include "reduce.h"

namespace fastcl::cpu {
namespace {

// Flops a second of fused multiply-adds in registers, on all of torch's threads at once.
double fma_peak(double seconds) {
  using clock = std::chrono::steady_clock;
  TorchHost memory;
  const Host host = memory.host();
  std::vector<double> flops(host.threads);
  auto body = [&](int thread) {
    const auto end = clock::now() + std::chrono::duration<double>(seconds);
    while (clock::now() < end) flops[thread] += kernels<float>().fma_flops(1 << 16);
  };
  const auto begin = clock::now();
  host.parallel(host.self, host.threads, [](void* argument, int t) { (*static_cast<decltype(body)*>(argument))(t); }, &body);
  double sum = 0;
  for (double f : flops) sum += f;
  return sum / std::chrono::duration<double>(clock::now() - begin).count();
}

template <void (*kernel)(Stack)>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  kernel(Stack(stack));
}

void boxed_fma_peak(StableIValue* stack, uint64_t, uint64_t) {
  const double seconds = Stack(stack).number();
  Stack(stack).put(fma_peak(seconds));
}

void boxed_usable_isas(StableIValue* stack, uint64_t, uint64_t) {
  std::string names;
  for (const std::string& isa : usable_isas()) names += (names.empty() ? "" : " ") + isa;
  Stack(stack).put_text(names);
}

void boxed_chosen_isa(StableIValue* stack, uint64_t, uint64_t) { Stack(stack).put_text(chosen_isa()); }

void boxed_prefer_isa(StableIValue* stack, uint64_t, uint64_t) {
  const std::string isa = Stack(stack).text();
  Stack(stack).put(prefer_isa(isa));
}

const Registration kernel_ops("fastcl", "CPU", {{"kernel_rows", boxed<kernel_rows>}, {"kernel_gradients", boxed<kernel_gradients>}, {"kernel_total", boxed<kernel_total>}});
// Without a tensor there is no device to dispatch on.
const Registration facts("fastcl", "CompositeExplicitAutograd",
                         {{"cpu_fma_peak", boxed_fma_peak, "cpu_fma_peak(float seconds) -> float"},
                          {"cpu_usable_isas", boxed_usable_isas, "cpu_usable_isas() -> str"},
                          {"cpu_prefer_isa", boxed_prefer_isa, "cpu_prefer_isa(str isa) -> bool"},
                          {"cpu_chosen_isa", boxed_chosen_isa, "cpu_chosen_isa() -> str"}});

}  // namespace
}  // namespace fastcl::cpu
