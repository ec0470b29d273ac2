#include "problem.h"

#include <cmath>
#include <limits>
#include <string>

namespace fastcl {

void refuse_value(const std::string& message) { C10_THROW_ERROR(ValueError, message); }
void refuse_type(const std::string& message) { C10_THROW_ERROR(TypeError, message); }

namespace cuda {
namespace {

Described describe(const Tensor& t) {
  const auto dtype = t.scalar_type();
  const ScalarKind kind = dtype == at::kDouble ? ScalarKind::float64 : dtype == at::kFloat ? ScalarKind::float32 : dtype == at::kBFloat16 ? ScalarKind::bfloat16
                        : dtype == at::kHalf ? ScalarKind::float16 : dtype == at::kLong ? ScalarKind::int64 : ScalarKind::other;
  return {true, t.dim(), t.sizes().data(), kind, at::toString(dtype), int(t.device().type()), std::max<int>(t.device().index(), 0),
          t.is_cuda() ? "cuda" : t.is_cpu() ? "cpu" : "another"};
}
Described describe(const OptionalTensor& t) { return t ? describe(*t) : Described(); }

// The vector as kernels read it, element after element; undefined where there is none.
Tensor contiguous(const OptionalTensor& v) { return v ? v->contiguous() : Tensor(); }

// row_offset - col_offset, clamped to what can meet: n and m are far below 2^62.
int64_t offset_difference(int64_t row_offset, int64_t col_offset) {
  int64_t diff = 0;
  constexpr int64_t bound = int64_t(1) << 62;
  if (__builtin_sub_overflow(row_offset, col_offset, &diff)) return row_offset < col_offset ? -bound : bound;
  return std::clamp(diff, -bound, bound);
}

// The mean of y in 16 bits, and 0 in the columns where that would round a row. A row within a factor of two of the mean loses
// nothing (Sterbenz), and only a cloud that is far from the origin for its size needs the centre; a rounded row would be off by
// 2^-9 of itself, which no centre is worth.
Tensor exact_centre(const Tensor& x, const Tensor& y) {
  const Tensor centre = y.mean(0, false, at::kFloat).to(y.scalar_type());
  const auto kept = [&](const Tensor& rows) {
    return (rows - centre).to(at::kFloat).eq(rows.to(at::kFloat) - centre.to(at::kFloat)).all(0);
  };
  const Tensor exact = x.is_same(y) ? kept(x) : kept(x).logical_and(kept(y));
  return centre.masked_fill(exact.logical_not(), 0.0);
}

}  // namespace

Choices Given::check() const {
  FASTCL_CHECK_VALUE(!limit_x && !limit_y, "limit_x, limit_y: expected none, these kernels leave out no pairs by their logits; use backend='blocked'");
  return Arguments{describe(x), describe(y), describe(scale), describe(shift), describe(bias_x), describe(bias_y), describe(group_x),
                   describe(group_y), describe(limit_x), describe(limit_y), row_offset, col_offset, period, mask, operand, pair, constants.size(), reduce, columns}
      .check();
}

Problem::Problem(const Given& a) : x(a.x), symmetric(!a.y), columns(a.columns) {
  const Choices choices = a.check();
  operand = choices.operand, mask = choices.mask, reduce = choices.reduce, pair = choices.pair;
  y = a.y.value_or(x);
  n = x.size(0), m = y.size(0), d = x.size(1);
  dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  scale = a.scale.to(dtype).reshape({}), shift = a.shift.to(dtype).reshape({});
  bias_x = contiguous(a.bias_x), bias_y = contiguous(a.bias_y);
  group_x = contiguous(a.group_x), group_y = a.group_y ? contiguous(a.group_y) : group_x;
  diff = offset_difference(a.row_offset, a.col_offset);
  if (const int64_t period = a.period; mask == MaskKind::off_diagonal && period > 0) {
    // Groups say the same. To look for the nearest diagonal costs registers in every kernel: 198 -> 214 in a gradient of float32,
    // 58 -> 66 in a sum, a block less on a multiprocessor.
    const auto whole = x.options().dtype(at::kLong);
    mask = MaskKind::across_groups;
    group_x = (at::arange(n, whole) + diff).remainder(period);
    group_y = symmetric ? group_x : at::arange(m, whole).remainder(period);
  }
  std::copy(a.constants.begin(), a.constants.end(), constants.begin());
}

Sides::Sides(const Problem& p) {
  x = p.x, y = p.y;
  if (p.operand == Operand::sqdist && p.m > 0) {
    // |x|^2 + |y|^2 - 2 <x, y> cancels for a cloud far from the origin; about a point in its midst it does not.
    const Tensor centre = p.x.scalar_type() == p.dtype ? y.mean(0) : exact_centre(x, y);
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

// A weight of a log-sum-exp is at most max |g| + max |h|. Float16 weights then have their largest near 2^12: four bits of room
// above it for the sum of two roles and for a bound that rounding passes, 26 below it before the smallest subnormal.
Tensor weight_unit(const Problem& p, const Tensor& g, const Tensor& h) {
  if (p.x.scalar_type() != at::kHalf || !p.lse() || p.n == 0 || p.m == 0) return {};
  Tensor top = g.abs().amax();
  if (h.defined()) top = top + h.abs().amax();
  return top.mul(0x1p-12).clamp(1e-30, 1e30).nan_to_num(1.0);
}

Tensor softmax_reference(const Tensor& r, const Tensor& c) {
  const Tensor both = at::cat({r, c}), finite = both.isfinite();
  const Tensor high = both.masked_fill(~finite, -INFINITY).amax(), low = both.masked_fill(~finite, INFINITY).amin();
  return at::stack({0.5 * (high + low), (high - low < 56.0).to(both.scalar_type())}).nan_to_num(0.0);
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

void check(int error, std::string_view launch) {
  TORCH_CHECK(error == 0, "fastcl: the CUDA kernel ", launch, " could not be launched: ", fastcl_cuda_error_string(error), " (error ", error,
              "). An error of an earlier kernel can surface here: run with CUDA_LAUNCH_BLOCKING=1 to find it; backend='blocked' does without these kernels");
}

}  // namespace cuda
}  // namespace fastcl
