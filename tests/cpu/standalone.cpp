// The kernels of one instruction set without torch: a few reductions against plain loops, for processors that this
// machine is not (tests/cpu/test_other_processors.py runs it under an emulator).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string_view>
#include <vector>

#include "../../csrc/cpu/task.h"

namespace fastcl::cpu::FASTCL_ISA {
extern const Kernels<float> kernels_float;
extern const Kernels<double> kernels_double;
}  // namespace fastcl::cpu::FASTCL_ISA

using namespace fastcl;
using namespace fastcl::cpu;

namespace {

int failures = 0;

void near(const char* what, double got, double want, double tolerance) {
  if (std::abs(got - want) <= tolerance * (1 + std::abs(want))) return;
  std::printf("%s: expected %.9g, got %.9g\n", what, want, got);
  failures++;
}

struct Memory {
  std::vector<void*> blocks;
  ~Memory() {
    for (void* b : blocks) std::free(b);
  }
  Host host() {
    return Host{this, 2,
                [](void*, int tasks, void (*body)(void*, int), void* argument) {
                  for (int t = 0; t < tasks; t++) body(argument, t);
                },
                [](void* self, size_t bytes) {
                  void* block = std::aligned_alloc(64, (bytes + 127) / 64 * 64);
                  static_cast<Memory*>(self)->blocks.push_back(block);
                  return block;
                }};
  }
};

template <class T>
std::vector<T> random_rows(int64_t count, unsigned seed) {
  std::vector<T> v(count);
  for (auto& e : v) {
    seed = seed * 1664525u + 1013904223u;
    e = T(double(seed >> 8) / (1 << 24) - 0.5);
  }
  return v;
}

// z = x . y over off-diagonal pairs; f = softplus, or its log-sum-exp to base 2; values, and W Y with weights of one.
template <class T>
void check(const Kernels<T>& kernels, int64_t n, int64_t m, int64_t d, Reduction reduce, double tolerance) {
  const auto x = random_rows<T>(n * d, 1), y = random_rows<T>(m * d, 2);
  const std::vector<T> zeros(n + m + slack), ones(n + m + slack, T(1));
  std::vector<double> row_values(n), col_values(m), again(n), weight_sums(n);
  std::vector<T> product(n * d), maxima(n + m, std::numeric_limits<T>::lowest());
  Task<T> task;
  task.d = d;
  task.mask = MaskKind::off_diagonal;
  task.reduce = reduce;
  for (int k = 0; k < pair_count; k++)
    if (std::string_view(pair_entries[k].name) == "softplus") task.pair = k;
  auto side = [&](const std::vector<T>& rows, int64_t count) {
    Side<T> s;
    s.rows = s.weighed = rows.data(), s.row_stride = s.weighed_stride = d, s.count = count;
    s.term = zeros.data(), s.norm = zeros.data(), s.weight = ones.data(), s.reference = zeros.data();
    return s;
  };
  task.x = side(x, n), task.y = side(y, m);
  task.y.weight = zeros.data();
  Memory memory;
  task.x.value = row_values.data(), task.y.value = col_values.data();
  kernels.sweep(task, Step::push, memory.host());
  if (reduce == Reduction::logsumexp) {
    task.x.value = again.data(), task.y.value = nullptr, task.x.maximum = maxima.data(), task.y.maximum = maxima.data() + n;
    kernels.sweep(task, Step::push_maxima, memory.host());
  }
  task.x.value = task.y.value = nullptr;
  task.x.product = product.data(), task.x.weight_sum = weight_sums.data();
  kernels.sweep(task, Step::weigh, memory.host());

  std::vector<double> wanted_cols(m);
  for (int64_t i = 0; i < n; i++) {
    double row = 0, weights = 0;
    std::vector<double> wy(d);
    for (int64_t j = 0; j < m; j++) {
      if (i == j) continue;
      double z = 0;
      for (int64_t k = 0; k < d; k++) z += double(x[i * d + k]) * double(y[j * d + k]);
      const bool sum = reduce == Reduction::sum;
      const double f = sum ? std::log1p(std::exp(z)) : std::exp2(z), w = sum ? 1 / (1 + std::exp(-z)) : f;
      row += f, wanted_cols[j] += f, weights += w;
      for (int64_t k = 0; k < d; k++) wy[k] += w * double(y[j * d + k]);
    }
    near("row", row_values[i], row, tolerance);
    near("W 1", weight_sums[i], weights, tolerance);
    if (reduce == Reduction::logsumexp && m > 1) near("running maxima", std::log2(again[i]) + maxima[i], std::log2(row), tolerance);
    for (int64_t k = 0; k < d; k++) near("W Y", product[i * d + k], wy[k], tolerance * m);
  }
  for (int64_t j = 0; j < m; j++) near("column", col_values[j], wanted_cols[j], tolerance);
}

}  // namespace

int main() {
  const int64_t sizes[][3] = {{1, 1, 1}, {9, 50, 3}, {60, 33, 17}, {30, 420, 8}};
  for (const auto& s : sizes)
    for (const Reduction reduce : {Reduction::sum, Reduction::logsumexp}) {
      check(cpu::FASTCL_ISA::kernels_float, s[0], s[1], s[2], reduce, 2e-6);
      check(cpu::FASTCL_ISA::kernels_double, s[0], s[1], s[2], reduce, 1e-13);
    }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
