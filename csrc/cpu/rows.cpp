// What is O(n d) beside the sweeps, where torch's own operators would pass over memory several times.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../tensors.h"

namespace fastcl::cpu {
namespace {

// Rows in memory, each contiguous: copied where they are not.
template <class T>
struct Matrix {
  std::vector<T> copy;
  const T* data;
  int64_t stride, d;

  explicit Matrix(const Tensor& t) : data(t.data_as<T>()), stride(t.stride(0)), d(t.size(1)) {
    const int64_t step = t.stride(1);
    if (step == 1 || d <= 1) return;
    copy.resize(t.count());
    for_each_row(t.size(0), d, [&](int64_t i) {
      for (int64_t k = 0; k < d; k++) copy[i * d + k] = data[i * stride + k * step];
    });
    data = copy.data(), stride = d;
  }
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

void row_dot(StableIValue* arguments, uint64_t, uint64_t) {
  Stack stack(arguments), results = stack;
  const Tensor x = stack.tensor(), y = stack.tensor();
  for (const Tensor* t : {&x, &y}) {
    FASTCL_CHECK_TYPE(t->kind() == ScalarKind::float32, "cpu_row_dot: expected float32 rows, got ", t->describe().dtype);
    FASTCL_CHECK_VALUE(t->dim() == 2, "cpu_row_dot: expected a matrix (n, d), got shape ", t->describe());
  }
  FASTCL_CHECK_VALUE(x.same_shape(y), "cpu_row_dot: expected two matrices of one shape, got ", x.describe(), " and ", y.describe());
  const int64_t n = x.size(0), d = x.size(1);
  Tensor out = empty({n}, ScalarKind::float32);
  const Matrix<float> xs(x), ys(y);
  float* o = out.mutable_data_as<float>();
  for_each_row(n, d, [&](int64_t i) { o[i] = float(inner(xs[i], ys[i], d)); });
  results.put(std::move(out));
}

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

// float64 is left out: there the definition is torch's alone.
void check_rows(const char* name, const Tensor& t) {
  FASTCL_CHECK_VALUE(t.dim() == 2, name, ": expected a matrix (n, d), got shape ", t.describe());
  FASTCL_CHECK_TYPE(t.kind() == ScalarKind::float32 || t.kind() == ScalarKind::bfloat16 || t.kind() == ScalarKind::float16, name,
                    ": expected float32, bfloat16 or float16, got ", t.describe().dtype);
}

// x / max(|x|, 1e-12) in the dtype of x, in one pass, where torch's operators take five that no norm overflows in.
void unit_rows(StableIValue* arguments, uint64_t, uint64_t) {
  Stack stack(arguments), results = stack;
  const Tensor x = stack.tensor();
  check_rows("cpu_unit_rows", x);
  const int64_t n = x.size(0), d = x.size(1);
  Tensor out = empty({n, d}, x.kind());
  with_type(x.kind(), [&](auto as) {
    using T = decltype(as);
    const Matrix<T> rows(x);
    T* o = out.mutable_data_as<T>();
    for_each_row(n, d, [&](int64_t i) {
      const double inverse = inverse_of(std::sqrt(inner(rows[i], rows[i], d)));
      for (int64_t k = 0; k < d; k++) o[i * d + k] = T(float(double(float(rows[i][k])) * inverse));
    });
  });
  results.put(std::move(out));
}

void unit_rows_backward(StableIValue* arguments, uint64_t, uint64_t) {
  Stack stack(arguments), results = stack;
  const Tensor g = stack.tensor(), x = stack.tensor();
  check_rows("cpu_unit_rows_backward", x);
  FASTCL_CHECK_VALUE(g.same_shape(x) && g.kind() == x.kind(), "cpu_unit_rows_backward: expected a gradient like x, got ", g.describe(), " and ",
                     x.describe());
  const int64_t n = x.size(0), d = x.size(1);
  Tensor out = empty({n, d}, x.kind());
  with_type(x.kind(), [&](auto as) {
    using T = decltype(as);
    const Matrix<T> gradients(g), rows(x);
    T* o = out.mutable_data_as<T>();
    for_each_row(n, d, [&](int64_t i) { tangent(gradients[i], rows[i], o + i * d, d); });
  });
  results.put(std::move(out));
}

const Registration registration("fastcl", "CPU", {{"cpu_row_dot", row_dot, "cpu_row_dot(Tensor x, Tensor y) -> Tensor"},
                                        {"cpu_unit_rows", unit_rows, "cpu_unit_rows(Tensor x) -> Tensor"},
                                        {"cpu_unit_rows_backward", unit_rows_backward, "cpu_unit_rows_backward(Tensor g, Tensor x) -> Tensor"}});

}  // namespace
}  // namespace fastcl::cpu
