#include "strip.h"

#include <ATen/Context.h>

#include <cmath>
#include <cstdlib>
#include <string>

namespace fastcl::cuda::strip {
namespace {

// Bounds the workspace; read at each call.
constexpr char workspace_variable[] = "FASTCL_WORKSPACE_MB";
// Beyond this side a tile's products gain nothing: W Y of 8192 x 512 already fills an H100 with blocks of 128 x 256.
constexpr int64_t largest_side = 8192;
// Under this many rows the products of a strip as wide as the matrix, W Y and W^T X, cost more than a second sweep.
constexpr int64_t one_sweep_rows = 2048;
constexpr int64_t most_blocks = 65535;  // along the second dimension of a grid
// The pitch is a multiple of this many elements: 16 bytes of any dtype.
constexpr int64_t align = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// A side of whole blocks of a matrix product, or of vectors where it is too short for that.
int64_t whole(int64_t side) { return std::max(align, side >= 1024 ? side / 1024 * 1024 : side / align * align); }
int64_t padded(int64_t cols) { return std::max(align, ceil_div(cols, align) * align); }

// Dot products in the accumulation dtype, and weights beside them unless they can take their place.
int64_t element_bytes(const Problem& p) {
  const int64_t dots = at::elementSize(p.dtype);
  return p.x.scalar_type() == p.dtype ? dots : dots + p.x.element_size();
}

struct Shape {
  int64_t rows, cols;
};

// A tile that fits the workspace, and its blocks a grid.
Shape tile_shape(const Problem& p, bool full_width) {
  int64_t elements = workspace_bytes(p) / element_bytes(p);
  if (full_width) return {std::max<int64_t>(1, std::min(p.n, elements / padded(p.m))), std::max<int64_t>(1, p.m)};
  elements = std::min(elements, largest_side * largest_side);
  const int64_t side = whole(int64_t(std::sqrt(double(elements))));
  if (p.symmetric) return {side, side};
  Shape shape{std::min(std::max<int64_t>(1, p.n), side), 0};
  shape.cols = std::min(most_blocks * strip_block_cols, whole(elements / shape.rows));
  if (p.m < shape.cols) shape = {std::max<int64_t>(1, std::min(p.n, elements / padded(p.m))), std::max<int64_t>(1, p.m)};
  return shape;
}

bool fits_full_width(const Problem& p) {
  const int64_t rows = std::min(p.n, one_sweep_rows);
  if (p.m > most_blocks * strip_block_cols) return false;
  return tile_shape(p, true).rows >= rows && padded(p.m) * rows * element_bytes(p) <= workspace_bytes(p);
}

// Whether 16-bit operands are multiplied into float32 as they are: by CUDA alone, and not where a setting of torch's lets
// float16 accumulate in itself, a combination that cuBLAS does not have. Elsewhere they are widened, exactly.
bool multiplied_in_16_bits(const Tensor& a) {
  return a.is_cuda() && !(a.scalar_type() == at::kHalf && at::globalContext().allowFP16AccumulationCuBLAS());
}

// out = a b in the accumulation dtype.
void multiply(const Tensor& a, const Tensor& b, Tensor out) {
  const at::ScalarType wide = out.scalar_type();
  if (a.scalar_type() != wide && multiplied_in_16_bits(a)) at::mm_outf(a, b, wide, out);
  else at::mm_out(out, a.to(wide), b.to(wide));
}

// The float16 weights of a sum, rounded from exact ones in a unit that is returned. A slope may be of any size, and what bounds
// it far above every pair: its unit is the tile's own largest weight, which then is 2^14, 38 bits above the smallest subnormal.
Tensor rounded_in_a_unit(const Tensor& exact, Tensor half) {
  const Tensor unit = at::linalg_vector_norm(exact, INFINITY).mul_(0x1p-14).clamp_(1e-30, 1e30).nan_to_num_(1.0);
  at::div_out(half, exact, unit);
  return unit;
}

// A running reduction of the rows or of the columns: a sum, or the top and sum of a log-sum-exp.
class State {
 public:
  State(const Problem& p, int64_t size) : p_(p), lse_(p.lse()), sum_(p.zeros({size})) {
    if (lse_) top_ = at::full({size}, -INFINITY, p.options());
  }
  // Of sums that are gathered elsewhere.
  State(const Problem& p, const Tensor& sums) : p_(p), lse_(false), sum_(sums) {}

  Tensor parts(int64_t count, int64_t size) const { return p_.empty({lse_ ? 2 : 1, count, size}); }

  void merge(const Tensor& parts, int64_t start, double factor = 1) {
    const int64_t count = parts.size(1), size = parts.size(2);
    const Tensor sum = sum_.narrow(0, start, size), top = lse_ ? top_.narrow(0, start, size) : Tensor();
    const MergeParts args{pointer(parts), count, size, mutable_pointer(top), mutable_pointer(sum), factor, dtype_of(sum)};
    FASTCL_LAUNCH(merge_parts, args, parts);
  }

  Tensor result() const { return lse_ ? top_ + sum_.log() : sum_; }
  Tensor result(int64_t start, int64_t size) const {
    const Tensor sum = sum_.narrow(0, start, size);
    return lse_ ? top_.narrow(0, start, size) + sum.log() : sum;
  }
  const Tensor& sum() const { return sum_; }

 private:
  const Problem& p_;
  bool lse_;
  Tensor sum_, top_;
};

// What turns a tile into weights, with its vectors kept alive.
struct Weights {
  Tensor g, h, r, c, reference;

  // With x itself both roles are one vector. g and h are taken in `unit` where that is defined.
  Weights(const Problem& p, Tensor r_, Tensor c_, Tensor g_, Tensor h_, const Tensor& unit) {
    if (p.symmetric) c_ = r_, h_ = g_;
    auto own = [](const Tensor& t) { return t.defined() ? t.contiguous() : t; };
    g = own(unit.defined() ? g_ / unit : g_);
    if (h_.defined()) h = own(unit.defined() ? h_ / unit : h_);
    if (!p.lse()) return;
    r = own(r_), c = own(c_);
    if (g.defined() && h.defined()) reference = softmax_reference(r, c);
  }
  Weighting weighting() const { return {pointer(g), pointer(h), pointer(r), pointer(c), pointer(reference)}; }
};

// The tiles of one problem, one after the other in one workspace, and what follows on each.
class Strip {
 public:
  explicit Strip(const Problem& p, bool full_width = false) : p_(p), sides(p), shape_(tile_shape(p, full_width)) {
    const int64_t elements = shape_.rows * padded(shape_.cols);
    dot_ = p.empty({elements});
    weights_ = p.x.scalar_type() == p.dtype ? dot_ : at::empty({elements}, p.x.options());
    equation_ = sides.equation(p);
  }

  template <class Body>
  void for_each_tile(Body body) {
    for (int64_t i0 = 0; i0 < p_.n; i0 += shape_.rows)
      for (int64_t j0 = p_.symmetric ? i0 : 0; j0 < p_.m; j0 += shape_.cols) {
        Tile t{i0, std::min(p_.n, i0 + shape_.rows), j0, std::min(p_.m, j0 + shape_.cols), mutable_pointer(dot_), 0, dtype_of(dot_)};
        t.pitch = padded(t.j1 - t.j0);
        multiply(rows_of(sides.x, t), cols_of(sides.y, t).t(), view(dot_, t));
        body(t);
      }
  }

  // Joins the tile's reductions to those of its rows and columns.
  void reduce(const Tile& t, State& rows, State* cols) {
    const Tensor row_parts = rows.parts(col_blocks(t), t.i1 - t.i0);
    const Tensor col_parts = cols ? cols->parts(row_blocks(t), t.j1 - t.j0) : Tensor();
    const StripReduce args{equation_, t, mutable_pointer(row_parts), mutable_pointer(col_parts)};
    FASTCL_LAUNCH(strip_reduce, args, p_.x);
    rows.merge(row_parts, t.i0);
    if (cols) cols->merge(col_parts, t.j0);
  }

  // Turns the tile into weights and adds its part to the four sums, and the row sums of f to `value`.
  void accumulate(const Tile& t, const Weights& weights, Sums& sums, const Tensor& value = {}) {
    const bool mirrored = p_.symmetric && t.i0 != t.j0;
    const bool in_units = p_.x.scalar_type() == at::kHalf && !p_.lse();
    // Under sqdist W 1 and W^T 1 are those of the weights as they are rounded: diag(W 1) X - W Y cancels.
    const bool exact = !(in_units && p_.operand == Operand::sqdist);
    const Tensor none, &others = mirrored ? sums.w_rows : sums.w_cols;
    const Tensor &w_rows = exact ? sums.w_rows : none, &w_cols = exact ? others : none;
    auto parts = [&](const Tensor& into, int64_t count, int64_t size) { return into.defined() ? p_.empty({1, count, size}) : Tensor(); };
    const Tensor row_parts = parts(w_rows, col_blocks(t), t.i1 - t.i0), values = parts(value, col_blocks(t), t.i1 - t.i0);
    const Tensor col_parts = parts(w_cols, row_blocks(t), t.j1 - t.j0);
    const Tensor& stored = in_units ? dot_ : weights_;
    const StripWeights args{equation_, t, weights.weighting(), mutable_pointer(stored), dtype_of(stored),
                            mutable_pointer(row_parts), mutable_pointer(col_parts), mutable_pointer(values)};
    FASTCL_LAUNCH(strip_weights, args, p_.x);
    if (row_parts.defined()) State(p_, w_rows).merge(row_parts, t.i0);
    if (col_parts.defined()) State(p_, w_cols).merge(col_parts, t.j0);
    if (values.defined()) State(p_, value).merge(values, t.i0, mirrored ? 2 : 1);

    const Tensor w = view(weights_, t), unit = in_units ? rounded_in_a_unit(view(dot_, t), w) : Tensor();
    if (!exact && sums.w_rows.defined()) rows_of(sums.w_rows, t).addcmul_(w.sum(1, false, p_.dtype), unit);
    if (!exact && others.defined()) cols_of(others, t).addcmul_(w.sum(0, false, p_.dtype), unit);
    if (sums.wy.defined()) add_product(rows_of(sums.wy, t), w, cols_of(sides.y, t), unit);
    const Tensor& into = mirrored ? sums.wy : sums.wtx;
    if (into.defined()) add_product(cols_of(into, t), w.t(), rows_of(sides.x, t), unit);
  }

 private:
  static int64_t row_blocks(const Tile& t) { return ceil_div(t.i1 - t.i0, strip_block_rows); }
  static int64_t col_blocks(const Tile& t) { return ceil_div(t.j1 - t.j0, strip_block_cols); }
  static Tensor rows_of(const Tensor& v, const Tile& t) { return v.narrow(0, t.i0, t.i1 - t.i0); }
  static Tensor cols_of(const Tensor& v, const Tile& t) { return v.narrow(0, t.j0, t.j1 - t.j0); }
  static Tensor view(const Tensor& workspace, const Tile& t) { return workspace.as_strided({t.i1 - t.i0, t.j1 - t.j0}, {t.pitch, 1}); }

  const Problem& p_;

 public:
  const Sides sides;

 private:
  Shape shape_;
  Tensor dot_, weights_;
  Equation equation_;
};

Gradients gradients_in(at::ScalarType dtype, const Problem& p, const Tensor& r, const Tensor& c, const Tensor& g, const Tensor& h, const Wanted& wanted) {
  Strip strip(p);
  Sums sums(p, strip.sides, wanted);
  if (p.n == 0 || p.m == 0 || !wanted.any()) return sums.gradients(dtype);
  const Tensor unit = weight_unit(p, g, p.symmetric ? g : h);
  const Weights weights(p, r, c, g, h, unit);
  strip.for_each_tile([&](const Tile& t) { strip.accumulate(t, weights, sums); });
  return sums.gradients(dtype, unit);
}

Total sum_in_one_sweep(const Problem& p, const Wanted& wanted) {
  Strip strip(p);
  Sums sums(p, strip.sides, wanted);
  const Tensor r = p.zeros({p.n}), ones = at::ones({p.n}, p.options());
  const Weights weights(p, {}, {}, ones, {}, {});
  strip.for_each_tile([&](const Tile& t) { strip.accumulate(t, weights, sums, r); });
  return {r.sum(at::kDouble).to(p.dtype), sums.gradients(p.dtype), {}};
}

// Tiles as wide as the matrix: a tile's rows are reduced, their upstream gradient formed, and the tile turned into weights.
Total rows_in_one_sweep(const Problem& p, const Tensor& positive, Outer outer, const Wanted& wanted) {
  Strip strip(p, true);
  Sums sums(p, strip.sides, wanted);
  State r(p, p.n);
  const bool pooled = outer == Outer::pooled;
  Tensor value = at::full({}, pooled ? -INFINITY : 0.0, p.options().dtype(at::kDouble));
  Tensor dpositive = positive.defined() ? p.zeros({p.n}) : Tensor();
  // Each g is a sigmoid or a softmax over rows: at most 1.
  const Tensor unit = weight_unit(p, at::ones({1}, p.options()), {});
  const Tensor normaliser = p.empty({p.n}), upstream = p.empty({p.n});
  strip.for_each_tile([&](const Tile& t) {
    const int64_t count = t.i1 - t.i0;
    strip.reduce(t, r, nullptr);
    normaliser.narrow(0, t.i0, count).copy_(r.result(t.i0, count));
    const Tensor own = normaliser.narrow(0, t.i0, count).to(at::kDouble);
    OuterForm form = outer_form(outer, own, positive.defined() ? positive.narrow(0, t.i0, count).to(at::kDouble) : Tensor());
    if (dpositive.defined()) dpositive.narrow(0, t.i0, count).copy_(form.dpositive);
    const Tensor before = value;
    value = pooled ? merged(value, form.value) : value + form.value;
    if (pooled) {
      // g is relative to the tile: bring it, and all that was gathered, to the running log-sum-exp.
      const Tensor finite = value.masked_fill(value == -INFINITY, 0.0);
      form.g = (own - finite).exp();
      sums.multiply((before - finite).exp().to(p.dtype));
    }
    upstream.narrow(0, t.i0, count).copy_(form.g);
    strip.accumulate(t, Weights(p, normaliser, {}, upstream, {}, unit), sums);
  });
  return {value.to(p.dtype), sums.gradients(p.dtype, unit), dpositive};
}

}  // namespace

void add_product(Tensor out, const Tensor& a, const Tensor& b, const Tensor& unit) {
  const at::ScalarType wide = out.scalar_type();
  if (unit.defined()) {
    const Tensor part = at::empty_like(out);
    multiply(a, b, part);
    out.addcmul_(part, unit);
  } else if (a.scalar_type() != wide && multiplied_in_16_bits(a)) {
    // addmm takes no 16-bit operands beside a float32 sum; baddbmm, which adds in place where out is its summand, does.
    Tensor sum = out.unsqueeze(0);
    at::baddbmm_outf(sum, a.unsqueeze(0), b.unsqueeze(0), wide, 1, 1, sum);
  } else {
    out.addmm_(a.to(wide), b.to(wide));
  }
}

// 96 MB, or half as much again as the gradients of x and y in the accumulation dtype take, which stand beside it: the larger
// the tile, the fuller its products and the fewer launches. CLIP's gradient at 65,536 x 512 has 1,024 tiles of 2048 x 2048, or
// 64 of 8192 x 8192.
int64_t workspace_bytes(const Problem& p) {
  const char* text = std::getenv(workspace_variable);
  if (text == nullptr || *text == '\0') return std::max(int64_t(96) << 20, int64_t(at::elementSize(p.dtype)) * 3 / 2 * p.d * (p.n + p.m));
  char* end = nullptr;
  const double megabytes = std::strtod(text, &end);
  TORCH_CHECK_VALUE(*end == '\0' && megabytes > 0 && megabytes < 1e9, workspace_variable, ": expected a positive number of megabytes, got '", text, "'");
  return int64_t(megabytes * (1 << 20));
}

std::tuple<Tensor, Tensor> rows(const Problem& p) {
  Strip strip(p);
  State r(p, p.n);
  std::optional<State> c;
  if (p.columns) c.emplace(p, p.m);
  strip.for_each_tile([&](const Tile& t) {
    strip.reduce(t, r, !p.symmetric ? (c ? &*c : nullptr) : t.i0 == t.j0 ? nullptr : &r);
  });
  return {r.result(), c ? c->result() : Tensor()};
}

Gradients gradients(const Problem& p, const Tensor& r, const Tensor& c, const Tensor& g, const Tensor& h, const Wanted& wanted) {
  return gradients_in(p.x.scalar_type(), p, r, c, g, h, wanted);
}

Total total(const Problem& p, const Tensor& positive, Outer outer, const Wanted& wanted) {
  if (wanted.any() && p.n > 0 && p.m > 0) {
    if (!p.lse()) return sum_in_one_sweep(p, wanted);
    if (!p.symmetric && fits_full_width(p)) return rows_in_one_sweep(p, positive, outer, wanted);
  }
  const Tensor r = std::get<0>(rows(p));
  const OuterForm form = outer_form(outer, r.to(at::kDouble), positive.defined() ? positive.to(at::kDouble) : Tensor());
  Gradients gradients;
  if (wanted.any()) gradients = gradients_in(p.dtype, p, r, {}, form.g.to(p.dtype), {}, wanted);
  return {form.value.to(p.dtype), gradients, form.dpositive.defined() ? form.dpositive.to(p.dtype) : Tensor()};
}

}  // namespace fastcl::cuda::strip
