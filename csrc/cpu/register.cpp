// The CPU kernels under the schemas of fastcl/ops.py, and the machine's limit for the benchmark.
#include <torch/library.h>

#include <chrono>

#include "reduce.h"

namespace fastcl::cpu {
namespace {

std::tuple<Tensor, Tensor> rows(FASTCL_PROBLEM) { return kernel_rows(FASTCL_ARGUMENTS); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gradients(FASTCL_PROBLEM, const Tensor& r, const Tensor& c, const Tensor& g,
                                                                     const Tensor& h, std::array<bool, 6> wanted) {
  return std::tuple_cat(kernel_gradients(FASTCL_ARGUMENTS, r, c, g, h, Wanted(wanted)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> total(FASTCL_PROBLEM, const OptionalTensor& positive,
                                                                                 c10::string_view outer, std::array<bool, 6> wanted) {
  return std::tuple_cat(kernel_total(FASTCL_ARGUMENTS, positive, outer, Wanted(wanted)));
}

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

}  // namespace

TORCH_LIBRARY_IMPL(fastcl, CPU, m) {
  m.impl("kernel_rows", rows);
  m.impl("kernel_gradients", gradients);
  m.impl("kernel_total", total);
}

TORCH_LIBRARY_FRAGMENT(fastcl, m) {
  m.def("cpu_fma_peak(float seconds) -> float", fma_peak);
}

}  // namespace fastcl::cpu
