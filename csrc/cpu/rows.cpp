// What is O(n d) beside the sweeps, where torch's own operators would pass over memory several times.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastcl::cpu {
namespace {

using at::Tensor;

// Rows in memory, each contiguous.
template <class T>
struct Rows {
  Tensor tensor;
  const T* data;
  int64_t stride, d;
  explicit Rows(const Tensor& t) : tensor(t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous()), data(tensor.const_data_ptr<T>()),
                                   stride(tensor.stride(0)), d(tensor.size(1)) {}
  const T* operator[](int64_t i) const { return data + i * stride; }
};

// <x_i, y_i> in double, where products of floats are exact, and no norm overflows or is lost.
template <class T>
double inner(const T* x, const T* y, int64_t d) {
  constexpr int lanes = 8;
  double sums[lanes] = {};
  int64_t k = 0;
  for (; k + lanes <= d; k += lanes)
    for (int l = 0; l < lanes; l++) sums[l] += double(float(x[k + l])) * double(float(y[k + l]));
  for (; k < d; k++) sums[0] += double(float(x[k])) * double(float(y[k]));
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

template <class Body>
void for_each_row(int64_t n, int64_t d, Body body) {
  at::parallel_for(0, n, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, d)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) body(i);
  });
}

Tensor row_dot(const Tensor& x, const Tensor& y) {
  for (const Tensor* t : {&x, &y}) {
    TORCH_CHECK_TYPE(t->scalar_type() == at::kFloat, "cpu_row_dot: expected float32 rows, got ", t->scalar_type());
    TORCH_CHECK_VALUE(t->dim() == 2, "cpu_row_dot: expected a matrix (n, d), got shape ", t->sizes());
  }
  TORCH_CHECK_VALUE(x.sizes() == y.sizes(), "cpu_row_dot: expected two matrices of one shape, got ", x.sizes(), " and ", y.sizes());
  const int64_t n = x.size(0), d = x.size(1);
  Tensor out = at::empty({n}, x.options());
  const Rows<float> xs(x), ys(y);
  float* o = out.mutable_data_ptr<float>();
  for_each_row(n, d, [&](int64_t i) { o[i] = float(inner(xs[i], ys[i], d)); });
  return out;
}

// float64 is left out: there the definition is torch's alone.
#define FASTCL_DISPATCH(dtype, name, ...)                                                                          \
  AT_DISPATCH_SWITCH(dtype, name, AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__) \
                                      AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__))

constexpr double least_norm = 1e-12;

// 1 / max(|x|, 1e-12); NaN for a row with an infinity, as in F.normalize, so that it is not hidden.
double inverse_of(double norm) { return std::isfinite(norm) ? 1 / std::max(norm, least_norm) : std::numeric_limits<double>::quiet_NaN(); }

// The gradient g of x / max(|x|, 1e-12): (g - <g, u> u) / max(|x|, 1e-12), the radial part in rows longer than 1e-12 alone. Where a g
// is infinite its infinite entries alone count, as equals, and what is left of them is infinite with its sign, or 0, never NaN.
template <class T>
void tangent(const T* g, const T* x, T* out, int64_t d) {
  const double norm = std::sqrt(inner(x, x, d)), inverse = inverse_of(norm);
  bool infinite = false;
  for (int64_t k = 0; k < d; k++) infinite |= std::isinf(float(g[k]));
  auto at = [&](int64_t k) {
    const double value = float(g[k]);
    return !infinite ? value : std::isinf(value) ? std::copysign(1.0, value) : 0 * value;
  };
  double along = infinite ? 0 : inner(g, x, d);
  if (infinite)
    for (int64_t k = 0; k < d; k++) along += at(k) * double(float(x[k]));
  const double by = norm > least_norm ? along * inverse * inverse : 0 * inverse;
  const double factor = infinite ? std::numeric_limits<double>::max() : inverse;
  for (int64_t k = 0; k < d; k++) out[k] = T(float((at(k) - by * double(float(x[k]))) * factor));
}

void check_rows(const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() == 2, name, ": expected a matrix (n, d), got shape ", t.sizes());
}

// x / max(|x|, 1e-12) in the dtype of x, in one pass, where torch's operators take five that no norm overflows in.
Tensor unit_rows(const Tensor& x) {
  check_rows("cpu_unit_rows", x);
  Tensor out = at::empty({x.size(0), x.size(1)}, x.options());
  FASTCL_DISPATCH( x.scalar_type(), "cpu_unit_rows", [&] {
    const Rows<scalar_t> rows(x);
    scalar_t* o = out.mutable_data_ptr<scalar_t>();
    for_each_row(x.size(0), rows.d, [&](int64_t i) {
      const double inverse = inverse_of(std::sqrt(inner(rows[i], rows[i], rows.d)));
      for (int64_t k = 0; k < rows.d; k++) o[i * rows.d + k] = scalar_t(float(double(float(rows[i][k])) * inverse));
    });
  });
  return out;
}

Tensor unit_rows_backward(const Tensor& g, const Tensor& x) {
  check_rows("cpu_unit_rows_backward", x);
  TORCH_CHECK_VALUE(g.sizes() == x.sizes() && g.scalar_type() == x.scalar_type(),
                    "cpu_unit_rows_backward: expected a gradient like x, got ", g.sizes(), " and ", x.sizes());
  Tensor out = at::empty({x.size(0), x.size(1)}, x.options());
  FASTCL_DISPATCH( x.scalar_type(), "cpu_unit_rows_backward", [&] {
    const Rows<scalar_t> gradients(g), rows(x);
    scalar_t* o = out.mutable_data_ptr<scalar_t>();
    for_each_row(x.size(0), rows.d, [&](int64_t i) { tangent(gradients[i], rows[i], o + i * rows.d, rows.d); });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastcl, m) {
  m.def("cpu_row_dot(Tensor x, Tensor y) -> Tensor");
  m.def("cpu_unit_rows(Tensor x) -> Tensor");
  m.def("cpu_unit_rows_backward(Tensor g, Tensor x) -> Tensor");
}
TORCH_LIBRARY_IMPL(fastcl, CPU, m) {
  m.impl("cpu_row_dot", row_dot);
  m.impl("cpu_unit_rows", unit_rows);
  m.impl("cpu_unit_rows_backward", unit_rows_backward);
}

}  // namespace fastcl::cpu
