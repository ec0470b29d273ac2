#include "fused.h"

#include <ATen/Context.h>

#include "form.h"
#include "fused_schedule.h"

namespace fastcl::cuda::fused {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded(int64_t rows) { return ceil_div(rows, fused_tile) * fused_tile; }

// How float32 operands are multiplied: torch's own setting, as torch.mm follows it.
bool tf32_allowed() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32;
}

bool holds_dtype(const Problem& p) {
  return p.x.scalar_type() != at::kDouble && (p.x.scalar_type() != at::kFloat || tf32_allowed());
}

// Rows as 16-byte asynchronous copies can read them; float32 ones rounded to tf32, in a copy.
Tensor aligned(const Tensor& t) {
  const int64_t unit = 16 / t.element_size(), d = std::max(unit, ceil_div(t.size(1), unit) * unit);
  const bool fits = t.size(1) == d && t.stride(1) == 1 && t.stride(0) % unit == 0 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  if (fits && t.scalar_type() != at::kFloat) return t;
  const Tensor from = t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous(), to = at::empty({t.size(0), d}, t.options());
  const FusedPack args{pointer(from), from.stride(0), t.size(0), t.size(1), mutable_pointer(to), d, dtype_of(t)};
  FASTCL_LAUNCH(fused_pack, args, t);
  return to;
}

// The operands of one problem as the fused kernels take them. What the products multiply is what norms and gradients see.
struct Operands {
  explicit Operands(const Problem& p) : sides(p), x(aligned(sides.x)), y(p.symmetric ? x : aligned(sides.y)), d(x.size(1)) {
    sides.x = x.narrow(1, 0, p.d), sides.y = y.narrow(1, 0, p.d);
    if (p.operand != Operand::sqdist || p.x.scalar_type() != at::kFloat) return;
    sides.norm_x = sides.x.square().sum(1);
    sides.norm_y = p.symmetric ? sides.norm_x : sides.y.square().sum(1);
  }

  FusedSides fused(bool swapped = false) const {
    const Tensor &a = swapped ? y : x, &b = swapped ? x : y;
    return {pointer(a), pointer(b), a.stride(0), b.stride(0), a.size(0), b.size(0), d, dtype_of(a)};
  }

  Sides sides;
  Tensor x, y;
  int64_t d;
};

// The kept rows and stages that shared memory holds; every device that these kernels run on holds the last one.
std::pair<bool, int> stages_of(Dtype dtype, int64_t d, bool lse, int64_t bytes) {
  for (const auto& [resident, stages] : {std::pair(true, 3), std::pair(true, 2), std::pair(false, 3)})
    if (fused_rows_shared(dtype, d, resident, stages, lse) <= bytes) return {resident, stages};
  return {false, 2};
}

// What a gradient multiplies, and the reductions that it belongs to.
struct Weights {
  Tensor g, h, r, c, reference;

  Weighting weighting(bool swapped) const {
    if (swapped) return {pointer(h), pointer(g), pointer(c), pointer(r), pointer(reference)};
    return {pointer(g), pointer(h), pointer(r), pointer(c), pointer(reference)};
  }
};

// W Y, or swapped W^T X, by one sweep; row_sums, where defined, receives W 1 or W^T 1.
Tensor sweep(const Problem& p, const Operands& o, const Weights& weights, bool swapped, const Tensor& row_sums) {
  const FusedSides sides = o.fused(swapped);
  const Tensor x_factors = p.empty({padded(sides.n), 2}), y_factors = p.empty({padded(sides.m), 2});
  const Tensor single = at::empty({1}, p.options().dtype(at::kInt)), wy = p.empty({sides.n, o.d});
  const FusedFactors factors{weights.weighting(swapped), sides.n, sides.m, p.lse(), mutable_pointer(x_factors), mutable_pointer(y_factors),
                             mutable_pointer(single)};
  FASTCL_LAUNCH(fused_factors, factors, p.x);
  const FusedGradient args{o.sides.equation(p, swapped), sides, pointer(x_factors), pointer(y_factors), pointer(single), mutable_pointer(wy),
                           mutable_pointer(row_sums)};
  FASTCL_LAUNCH(fused_gradient, args, p.x);
  return wy.narrow(1, 0, p.d);
}

Gradients gradients_in(at::ScalarType dtype, const Problem& p, const Tensor& r, const Tensor& c, const Tensor& g, const Tensor& h,
                       const Wanted& wanted) {
  const Operands o(p);
  Sums sums(p, o.sides, wanted);
  if (!wanted.any()) return sums.gradients(dtype);
  const Tensor& g_y = p.symmetric ? g : h;
  const Tensor unit = weight_unit(p, g, g_y);
  const auto own = [&](const Tensor& t) { return t.defined() ? (unit.defined() ? t / unit : t).contiguous() : t; };
  Weights weights{own(g), own(g_y), {}, {}, {}};
  if (p.lse()) {
    weights.r = r.contiguous(), weights.c = p.symmetric ? weights.r : c.defined() ? c.contiguous() : c;
    if (g_y.defined()) weights.reference = softmax_reference(weights.r, weights.c);
  }
  if (sums.wy.defined() || sums.w_rows.defined()) {
    const Tensor wy = sweep(p, o, weights, false, sums.w_rows);
    if (sums.wy.defined()) sums.wy = wy;
  }
  if (sums.wtx.defined() || sums.w_cols.defined()) {
    const Tensor wtx = sweep(p, o, weights, true, sums.w_cols);
    if (sums.wtx.defined()) sums.wtx = wtx;
  }
  return sums.gradients(dtype, unit);
}

}  // namespace

bool holds_rows(const Problem& p, const DeviceFacts& facts) {
  return facts.major >= 8 && holds_dtype(p) && fused_rows_shared(dtype_of(p.x), p.d, false, 2, p.lse()) <= facts.shared_bytes;
}

bool holds_gradients(const Problem& p, const DeviceFacts& facts) {
  const Dtype dtype = dtype_of(p.x);
  // A sum's float16 weights need a unit that only the strip form finds, once a tile is there.
  if (dtype == Dtype::float16 && !p.lse()) return false;
  // From 12.0 on the kernels that need more than 99 KB are not compiled.
  return holds_rows(p, facts) && p.d <= (facts.major < 12 ? fused_gradient_most(dtype) : 128) && fused_gradient_shared(dtype, p.d) <= facts.shared_bytes;
}

std::tuple<Tensor, Tensor> rows(const Problem& p) {
  const Operands o(p);
  const DeviceFacts facts = device_facts(p.x);
  const bool lse = p.lse(), cols = p.columns || p.symmetric;
  const int64_t blocks = ceil_div(p.n, fused_tile), tiles = ceil_div(p.m, fused_tile), sms = std::max(1, facts.multiprocessors);
  const int64_t ctas = std::min(blocks, sms), per_split = ceil_div(tiles, std::clamp<int64_t>(sms / ctas, 1, tiles));
  const int64_t splits = ceil_div(tiles, per_split);  // small n: several CTAs share a row block
  const auto [resident, stages] = stages_of(dtype_of(o.x), o.d, lse, facts.shared_bytes);
  const int64_t width = lse ? 2 : 1;
  const Tensor row_parts = p.empty({splits, p.n, width}), col_parts = cols ? p.empty({ctas, p.m, width}) : Tensor();
  const FusedRows args{o.sides.equation(p), o.fused(), ctas, splits, mutable_pointer(row_parts), mutable_pointer(col_parts), p.symmetric,
                       resident, stages};
  FASTCL_LAUNCH(fused_rows, args, p.x);
  const auto merge = [&](const Tensor& rows, const Tensor& columns, int64_t size) {
    const Tensor out = p.empty({size});
    const FusedMerge join{pointer(rows), pointer(columns), splits, ctas, size, p.symmetric, lse, mutable_pointer(out)};
    FASTCL_LAUNCH(fused_merge, join, p.x);
    return out;
  };
  return {merge(row_parts, p.symmetric ? col_parts : Tensor(), p.n), p.columns ? merge({}, col_parts, p.m) : Tensor()};
}

Gradients gradients(const Problem& p, const Tensor& r, const Tensor& c, const Tensor& g, const Tensor& h, const Wanted& wanted) {
  return gradients_in(p.x.scalar_type(), p, r, c, g, h, wanted);
}

Total total(const Problem& p, const Tensor& positive, Outer outer, const Wanted& wanted) {
  const Tensor r = std::get<0>(rows(p));
  const OuterForm form = outer_form(outer, r.to(at::kDouble), positive.defined() ? positive.to(at::kDouble) : Tensor());
  Gradients gradients;
  if (wanted.any()) gradients = gradients_in(p.dtype, p, r, {}, form.g.to(p.dtype), {}, wanted);
  return {form.value.to(p.dtype), gradients, form.dpositive.defined() ? form.dpositive.to(p.dtype) : Tensor()};
}

}  // namespace fastcl::cuda::fused
