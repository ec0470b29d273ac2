#include "problem.h"

#include <cmath>
#include <limits>
#include <string>

namespace fastcl::cuda {
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
                    "'; run python -m fastcl.codegen and build again");
}

void check_device(std::string_view name, const Tensor& t, const Tensor& x) {
  TORCH_CHECK_VALUE(t.device() == x.device(), name, ": expected a tensor on the device of x, ", x.device(), ", got one on ", t.device());
}

// The vector as kernels read it, element after element; undefined where there is none.
Tensor vector(std::string_view name, const OptionalTensor& v, int64_t length, at::ScalarType dtype, const Tensor& x) {
  if (!v) return {};
  TORCH_CHECK_VALUE(v->dim() == 1 && v->size(0) == length, name, ": expected shape (", length, ",), got ", v->sizes());
  TORCH_CHECK_TYPE(v->scalar_type() == dtype, name, ": expected ", dtype, ", got ", v->scalar_type());
  check_device(name, *v, x);
  return v->contiguous();
}

Tensor scalar(std::string_view name, const Tensor& t, at::ScalarType dtype, const Tensor& x) {
  TORCH_CHECK_VALUE(t.numel() == 1, name, ": expected one element, got shape ", t.sizes());
  check_device(name, t, x);
  return t.to(dtype).reshape({});
}

// row_offset - col_offset, clamped to what can meet: n and m are far below 2^62.
int64_t offset_difference(int64_t row_offset, int64_t col_offset) {
  int64_t diff = 0;
  constexpr int64_t bound = int64_t(1) << 62;
  if (__builtin_sub_overflow(row_offset, col_offset, &diff)) return row_offset < col_offset ? -bound : bound;
  return std::clamp(diff, -bound, bound);
}

}  // namespace

Problem::Problem(const Arguments& a) : x(a.x), symmetric(!a.y), columns(a.columns) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x: expected a matrix (n, d), got shape ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kDouble || x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf,
                   "x: expected float64, float32, bfloat16 or float16, got ", x.scalar_type());
  y = a.y.value_or(x);
  TORCH_CHECK_VALUE(y.dim() == 2 && y.size(1) == x.size(1), "y: expected a matrix (m, ", x.size(1), "), got shape ", y.sizes());
  TORCH_CHECK_TYPE(y.scalar_type() == x.scalar_type(), "y: expected the dtype of x, ", x.scalar_type(), ", got ", y.scalar_type());
  check_device("y", y, x);
  n = x.size(0), m = y.size(0), d = x.size(1);
  dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  scale = scalar("scale", a.scale, dtype, x), shift = scalar("shift", a.shift, dtype, x);
  bias_x = vector("bias_x", a.bias_x, n, dtype, x), bias_y = vector("bias_y", a.bias_y, m, dtype, x);
  group_x = vector("group_x", a.group_x, n, at::kLong, x), group_y = vector("group_y", a.group_y, m, at::kLong, x);
  TORCH_CHECK_VALUE(!symmetric || !(columns || a.bias_x || a.bias_y || a.group_y), "y: x with itself takes no columns, biases or second groups; pass y=x");
  TORCH_CHECK_VALUE(!symmetric || a.row_offset == a.col_offset, "mask: x with itself needs equal offsets, got ", a.row_offset, " and ", a.col_offset);
  diff = offset_difference(a.row_offset, a.col_offset);
  operand = chosen<Operand>("operand", a.operand, {{"dot", Operand::dot}, {"sqdist", Operand::sqdist}});
  reduce = chosen<Reduction>("reduce", a.reduce, {{"sum", Reduction::sum}, {"logsumexp", Reduction::logsumexp}});
  mask = chosen<MaskKind>("mask", a.mask, {{"all", MaskKind::all},
                                           {"off_diagonal", MaskKind::off_diagonal},
                                           {"across_groups", MaskKind::across_groups},
                                           {"within_groups", MaskKind::within_groups}});
  if (mask == MaskKind::across_groups || mask == MaskKind::within_groups) {
    TORCH_CHECK_VALUE(group_x.defined(), "mask: '", a.mask, "' needs group_x");
    if (!group_y.defined()) group_y = group_x;
    TORCH_CHECK_VALUE(group_y.size(0) == m, "group_y: expected ", m, " groups, got none");
  }
  pair = pair_index(a.pair);
  TORCH_CHECK_VALUE(!lse() || a.pair == "identity", "pair: reduce='logsumexp' goes with 'identity' only, got '", a.pair, "'");
  constant_count = pair_entries[pair].constants;
  TORCH_CHECK_VALUE(int(a.constants.size()) >= constant_count && a.constants.size() <= constants.size(), "constants: '", a.pair, "' needs ",
                    constant_count, ", got ", a.constants.size());
  std::copy(a.constants.begin(), a.constants.end(), constants.begin());
}

Sides::Sides(const Problem& p) {
  const bool wide = p.x.scalar_type() == p.dtype;
  x = p.x, y = p.y;
  if (p.operand == Operand::sqdist && wide && p.m > 0) {
    // |x|^2 + |y|^2 - 2 <x, y> cancels for a cloud far from the origin; about a point in its midst it does not.
    const Tensor centre = y.mean(0);
    x = x - centre;
    y = p.symmetric ? x : y - centre;
  }
  // Matrix products take rows or columns that are unit-strided.
  auto multipliable = [](const Tensor& t) { return t.stride(0) == 1 || t.stride(1) == 1 ? t : t.contiguous(); };
  x = multipliable(x);
  y = p.symmetric ? x : multipliable(y);
  if (p.operand != Operand::sqdist) return;
  auto squared = [&](const Tensor& t) { return at::linalg_vector_norm(t, 2, at::IntArrayRef{1}, false, p.dtype).square(); };
  norm_x = squared(x);
  norm_y = p.symmetric ? norm_x : squared(y);
}

Equation Sides::equation(const Problem& p, bool swapped) const {
  Equation e{p.operand, p.mask, p.reduce, p.pair, {p.constants[0], p.constants[1]}, p.diff, pointer(p.scale), pointer(p.shift),
             pointer(norm_x), pointer(norm_y), pointer(p.bias_x), pointer(p.bias_y), nullptr, nullptr};
  if (p.mask == MaskKind::across_groups || p.mask == MaskKind::within_groups) {
    e.group_x = p.group_x.const_data_ptr<int64_t>();
    e.group_y = p.group_y.const_data_ptr<int64_t>();
  }
  if (swapped) {
    std::swap(e.norm_x, e.norm_y), std::swap(e.bias_x, e.bias_y), std::swap(e.group_x, e.group_y);
    e.diff = -e.diff;
  }
  return e;
}

Sums::Sums(const Problem& p, const Sides& s, const Wanted& wanted) : p_(p), s_(s), wanted_(wanted) {
  const bool sqdist = p.operand == Operand::sqdist;
  if (wanted.x || (wanted.scale && !wanted.y)) wy = p.zeros({p.n, p.d});
  if (wanted.y && !p.symmetric) wtx = p.zeros({p.m, p.d});
  if (wanted.shift || wanted.bias_x || (sqdist && (wanted.x || wanted.scale))) w_rows = p.zeros({p.n});
  if (!p.symmetric && (wanted.bias_y || (sqdist && (wanted.y || wanted.scale)))) w_cols = p.zeros({p.m});
}

void Sums::multiply(const Tensor& factor) {
  for (Tensor* t : {&wy, &wtx, &w_rows, &w_cols})
    if (t->defined()) t->mul_(factor);
}

Gradients Sums::gradients(at::ScalarType dtype, const Tensor& unit) {
  if (unit.defined()) multiply(unit);
  const double half = p_.symmetric ? 0.5 : 1.0;  // with x itself each pair was gathered in both of its roles
  Gradients g;
  if (wanted_.scale) g.scale = scale_gradient().mul_(half);
  if (wanted_.shift) g.shift = w_rows.sum().mul_(half);
  if (wanted_.x) g.x = finish(wy, w_rows, s_.x, dtype);
  if (wanted_.y) g.y = finish(wtx, w_cols, s_.y, dtype);
  if (wanted_.bias_x) g.bias_x = w_rows;
  if (wanted_.bias_y) g.bias_y = w_cols;
  return g;
}

// <W, U> without U: <x, W Y> row by row, and the norms that go with it.
Tensor Sums::scale_gradient() const {
  Tensor inner = wy.defined() ? (s_.x * wy).sum() : (s_.y * wtx).sum();
  if (p_.operand == Operand::dot) return inner;
  return w_rows.dot(s_.norm_x) + (p_.symmetric ? w_rows : w_cols).dot(s_.norm_y) - 2.0 * inner;
}

// a W Y, or 2a (diag(W 1) X - W Y)
Tensor Sums::finish(const Tensor& sums, const Tensor& weights, const Tensor& rows, at::ScalarType dtype) const {
  if (p_.operand == Operand::dot) return (sums * p_.scale).to(dtype);
  return (rows * weights.unsqueeze(1)).sub_(sums).mul_(2.0).mul_(p_.scale).to(dtype);
}

// A weight is at most sup |f'| (max |g| + max |h|). Under log-sum-exp the first factor is 1; for a sum it is taken over the z
// that Cauchy and Schwarz allow. Float16 weights then have their largest near 2^12: four bits of room above it for the sum of
// two roles and for a bound that rounding passes, 26 below it before the smallest subnormal.
Tensor weight_unit(const Problem& p, const Sides& s, const Tensor& g, const Tensor& h) {
  if (p.x.scalar_type() != at::kHalf || p.n == 0 || p.m == 0) return {};
  Tensor top = g.abs().amax();
  if (h.defined()) top = top + h.abs().amax();
  if (!p.lse()) {
    auto farthest = [](const Tensor& t) { return at::linalg_vector_norm(t, 2, at::IntArrayRef{1}, false, at::kFloat).amax(); };
    const Tensor far_x = farthest(s.x), far_y = farthest(s.y);
    Tensor ends = p.operand == Operand::dot ? at::stack({-far_x * far_y, far_x * far_y}) : at::stack({at::zeros_like(far_x), (far_x + far_y).square()});
    ends = ends * p.scale + p.shift;
    for (const Tensor* bias : {&p.bias_x, &p.bias_y})
      if (bias->defined()) ends = ends + at::stack({bias->amin(), bias->amax()});
    const Tensor low = ends.amin(), high = ends.amax(), bound = p.empty({});
    const SlopeBound args{p.pair, {p.constants[0], p.constants[1]}, pointer(low), pointer(high), mutable_pointer(bound)};
    FASTCL_LAUNCH(slope_bound, args, p.x);
    top = top * bound;
  }
  return top.mul(0x1p-12).clamp(1e-30, 1e30).nan_to_num(1.0);
}

Tensor softmax_reference(const Tensor& r, const Tensor& c) {
  const Tensor both = at::cat({r, c}), finite = both.isfinite();
  const Tensor high = both.masked_fill(~finite, -INFINITY).amax(), low = both.masked_fill(~finite, INFINITY).amin();
  return at::stack({0.5 * (high + low), (high - low < 56.0).to(both.scalar_type())}).nan_to_num(0.0);
}

Outer outer_of(std::string_view name) {
  return chosen<Outer>("outer", name, {{"sum", Outer::sum}, {"contrast", Outer::contrast}, {"pooled", Outer::pooled}});
}

OuterForm outer_form(Outer outer, const Tensor& r, const Tensor& positive) {
  if (outer == Outer::sum) return {r.sum(), at::ones_like(r), {}};
  if (outer == Outer::contrast) {
    const Tensor z = r - positive, g = z.sigmoid();
    // log(1 + e^z), which at::softplus replaces by z from 20 on.
    const Tensor value = z.clamp_min(0.0) + (-z.abs()).exp().log1p();
    return {value.sum(), g, -g};
  }
  if (r.numel() == 0) return {at::full({}, -INFINITY, r.options()), r, {}};
  const Tensor value = r.logsumexp(0);
  return {value, (r - value.masked_fill(value == -INFINITY, 0.0)).exp(), {}};
}

Tensor merged(const Tensor& a, const Tensor& b) {
  const Tensor empty = (a == -INFINITY).logical_and(b == -INFINITY);
  return at::logaddexp(a.masked_fill(empty, 0.0), b.masked_fill(empty, 0.0)).masked_fill(empty, -INFINITY);
}

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return Dtype::float64;
    case at::kFloat: return Dtype::float32;
    case at::kBFloat16: return Dtype::bfloat16;
    default: return Dtype::float16;
  }
}

void* current_stream(const Tensor& t) {
  // Tensors on the CPU reach this only under an emulator, which has no streams.
  if (t.is_cpu()) return nullptr;
  const c10::impl::VirtualGuardImpl device(t.device().type());
  return device.getStream(t.device()).native_handle();
}

void check(int error, std::string_view launch) {
  TORCH_CHECK(error == 0, "fastcl: the CUDA kernel ", launch, " could not be launched: ", fastcl_cuda_error_string(error), " (error ", error,
              "). An error of an earlier kernel can surface here: run with CUDA_LAUNCH_BLOCKING=1 to find it; backend='blocked' does without these kernels");
}

}  // namespace fastcl::cuda
