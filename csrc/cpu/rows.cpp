// What is O(n d) beside the sweeps, where torch's own operators would pass over memory several times.
#include "rows.h"

namespace fastcl::cpu {
namespace {

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
    for_each_row(n, d, [&](int64_t i) { unit_row(rows[i], o + i * d, d); });
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
