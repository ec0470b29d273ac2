#include "arguments.h"

#include <initializer_list>
#include <string>
#include <utility>

namespace fastcl {
namespace {

template <class E>
E chosen(std::string_view argument, std::string_view value, std::initializer_list<std::pair<std::string_view, E>> names) {
  std::string list;
  for (const auto& [name, e] : names) {
    if (name == value) return e;
    list += (list.empty() ? "'" : ", '") + std::string(name) + "'";
  }
  TORCH_CHECK_VALUE(false, argument, ": expected one of ", list, ", got '", value, "'");
}

int pair_index(std::string_view name) {
  for (int i = 0; i < pair_count; i++)
    if (name == pair_entries[i].name) return i;
  TORCH_CHECK_VALUE(false, "pair: expected a pair function that was built in, got '", name,
                    "'; run python -m fastcl.equation.codegen and build again");
}

void check_device(std::string_view name, const Tensor& t, const Tensor& x) {
  TORCH_CHECK_VALUE(t.device() == x.device(), name, ": expected a tensor on the device of x, ", x.device(), ", got one on ", t.device());
}

void check_scalar(std::string_view name, const Tensor& t, const Tensor& x) {
  TORCH_CHECK_VALUE(t.numel() == 1, name, ": expected one element, got shape ", t.sizes());
  check_device(name, t, x);
}

void check_vector(std::string_view name, const OptionalTensor& v, int64_t length, at::ScalarType dtype, const Tensor& x) {
  if (!v) return;
  TORCH_CHECK_VALUE(v->dim() == 1 && v->size(0) == length, name, ": expected shape (", length, ",), got ", v->sizes());
  TORCH_CHECK_TYPE(v->scalar_type() == dtype, name, ": expected ", dtype, ", got ", v->scalar_type());
  check_device(name, *v, x);
}

}  // namespace

void Arguments::check_tensors() const {
  TORCH_CHECK_VALUE(x.dim() == 2, "x: expected a matrix (n, d), got shape ", x.sizes());
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "x: expected float64, float32, bfloat16 or float16, got ", dtype);
  if (y) {
    TORCH_CHECK_VALUE(y->dim() == 2 && y->size(1) == x.size(1), "y: expected a matrix (m, ", x.size(1), "), got shape ", y->sizes());
    TORCH_CHECK_TYPE(y->scalar_type() == dtype, "y: expected the dtype of x, ", dtype, ", got ", y->scalar_type());
    check_device("y", *y, x);
  }
  check_scalar("scale", scale, x);
  check_scalar("shift", shift, x);
  check_vector("bias_x", bias_x, n(), accumulation(), x);
  check_vector("bias_y", bias_y, m(), accumulation(), x);
  check_vector("group_x", group_x, n(), at::kLong, x);
  check_vector("group_y", group_y, m(), at::kLong, x);
}

Choices Arguments::check() const {
  check_tensors();
  TORCH_CHECK_VALUE(y || !(columns || bias_x || bias_y || group_y), "y: x with itself takes no columns, biases or second groups; pass y=x");
  TORCH_CHECK_VALUE(y || row_offset == col_offset, "mask: x with itself needs equal offsets, got ", row_offset, " and ", col_offset);
  const Choices c{chosen<Operand>("operand", operand, {{"dot", Operand::dot}, {"sqdist", Operand::sqdist}}),
                  chosen<MaskKind>("mask", mask, {{"all", MaskKind::all},
                                                  {"off_diagonal", MaskKind::off_diagonal},
                                                  {"across_groups", MaskKind::across_groups},
                                                  {"within_groups", MaskKind::within_groups}}),
                  chosen<Reduction>("reduce", reduce, {{"sum", Reduction::sum}, {"logsumexp", Reduction::logsumexp}}), pair_index(pair)};
  if (c.mask == MaskKind::across_groups || c.mask == MaskKind::within_groups) {
    TORCH_CHECK_VALUE(group_x, "mask: '", mask, "' needs group_x");
    TORCH_CHECK_VALUE(group_y || n() == m(), "group_y: expected ", m(), " groups, got none");
  }
  TORCH_CHECK_VALUE(c.reduce == Reduction::sum || pair == "identity", "pair: reduce='logsumexp' goes with 'identity' only, got '", pair, "'");
  const int needed = pair_entries[c.pair].constants;
  TORCH_CHECK_VALUE(int(constants.size()) >= needed && constants.size() <= 2, "constants: '", pair, "' needs ", needed, ", got ", constants.size());
  return c;
}

Outer outer_of(std::string_view name, Reduction reduce, bool has_positive) {
  const Outer outer = chosen<Outer>("outer", name, {{"sum", Outer::sum}, {"contrast", Outer::contrast}, {"pooled", Outer::pooled}});
  TORCH_CHECK_VALUE(reduce == Reduction::logsumexp || outer == Outer::sum, "outer: 'contrast' and 'pooled' go with reduce='logsumexp' only");
  TORCH_CHECK_VALUE(has_positive == (outer == Outer::contrast), "positive: expected a vector exactly for outer='contrast'");
  return outer;
}

}  // namespace fastcl
