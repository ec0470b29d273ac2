// What is O(n d) beside the sweeps, where torch's own operators would pass over memory several times.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

namespace fastcl::cpu {
namespace {

using at::Tensor;

// <x_i, y_i>. Products of floats are exact in double, so that the sum is rounded once.
float dot(const float* x, const float* y, int64_t d) {
  constexpr int lanes = 8;
  double sums[lanes] = {};
  int64_t k = 0;
  for (; k + lanes <= d; k += lanes)
    for (int l = 0; l < lanes; l++) sums[l] += double(x[k + l]) * double(y[k + l]);
  for (; k < d; k++) sums[0] += double(x[k]) * double(y[k]);
  return float(((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])));
}

Tensor row_dot(const Tensor& x, const Tensor& y) {
  for (const Tensor* t : {&x, &y}) {
    TORCH_CHECK_TYPE(t->scalar_type() == at::kFloat, "cpu_row_dot: expected float32 rows, got ", t->scalar_type());
    TORCH_CHECK_VALUE(t->dim() == 2 && (t->stride(1) == 1 || t->size(1) <= 1), "cpu_row_dot: expected a matrix of contiguous rows");
  }
  TORCH_CHECK_VALUE(x.sizes() == y.sizes(), "cpu_row_dot: expected two matrices of one shape, got ", x.sizes(), " and ", y.sizes());
  const int64_t n = x.size(0), d = x.size(1);
  Tensor out = at::empty({n}, x.options());
  const float *xs = x.const_data_ptr<float>(), *ys = y.const_data_ptr<float>();
  float* o = out.mutable_data_ptr<float>();
  at::parallel_for(0, n, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, d)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) o[i] = dot(xs + i * x.stride(0), ys + i * y.stride(0), d);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastcl, m) { m.def("cpu_row_dot(Tensor x, Tensor y) -> Tensor"); }
TORCH_LIBRARY_IMPL(fastcl, CPU, m) { m.impl("cpu_row_dot", row_dot); }

}  // namespace fastcl::cpu
