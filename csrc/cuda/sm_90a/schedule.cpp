#include "schedule.h"

#include <cmath>

#include "../form.h"
#include "../strip.h"
#include "launch.h"

// Absent where the kernels of 9.0a were not built.
extern "C" __attribute__((weak)) int fastcl_cuda_hopper_rows(const fastcl::cuda::HopperTiles*, void* stream);

namespace fastcl::cuda::hopper {
namespace {

// Up to this d a strip of weights stays in the L2 cache; from there on its products hide that it does not.
constexpr int64_t cached_d = 256, cached_bytes = 24 << 20;
constexpr double log2_e = 1.4426950408889634;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows as the copy engine reads them: 16-byte aligned, no two of them the same memory, d a multiple of 8.
Tensor readable(const Tensor& t) {
  const int64_t d = std::max<int64_t>(8, ceil_div(t.size(1), 8) * 8);
  const bool fits = t.size(1) == d && t.stride(1) == 1 && t.stride(0) >= d && t.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  if (fits) return t;
  const Tensor to = at::zeros({t.size(0), d}, t.options());
  to.narrow(1, 0, t.size(1)).copy_(t);
  return to;
}

struct Operands {
  explicit Operands(const Problem& p) : sides(p), x(readable(sides.x)), y(p.symmetric ? x : readable(sides.y)) {
    sides.x = x.narrow(1, 0, p.d), sides.y = y.narrow(1, 0, p.d);
  }
  // Rows [i0, i1) of x and [j0, j1) of y.
  FusedSides of(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    return {pointer(x.narrow(0, i0, i1 - i0)), pointer(y.narrow(0, j0, j1 - j0)), x.stride(0), y.stride(0), i1 - i0, j1 - j0, x.size(1), dtype_of(x)};
  }

  Sides sides;
  Tensor x, y;
};

// CTAs along x, and splits of y: as few idle turns as can be, then few CTAs, whose columns take a line of memory each.
struct Grid {
  int64_t ctas, splits;
};
Grid grid(int64_t n, int64_t m, int64_t block, int64_t multiprocessors) {
  const int64_t blocks = ceil_div(n, block), tiles = ceil_div(m, 128), sms = std::max<int64_t>(1, multiprocessors);
  Grid best{1, 1};
  double least = INFINITY;
  for (int64_t ctas = std::min(blocks, sms); ctas >= 1; ctas--) {
    const int64_t splits = std::min(tiles, sms / ctas);
    // A block of x is waited for, as long as two tiles of 128 rows take; a CTA's line of columns may cost a thousandth.
    const double cost = double(ceil_div(blocks, ctas) * (ceil_div(tiles, splits) + 2)) * (1 + 0.001 * double(ctas));
    if (cost < least) least = cost, best = {ctas, splits};
  }
  return best;
}

// The reference of a log-sum-exp, as HopperTiles has it. Where it is no number every sum is doubtful.
Tensor bound(const Problem& p, const Operands& o) {
  const auto longest = [](const Tensor& t) { return at::linalg_vector_norm(t, 2, at::IntArrayRef{1}, false, at::kFloat).amax(); };
  const Tensor of_x = longest(o.sides.x), of_y = p.symmetric ? of_x : longest(o.sides.y);
  Tensor z = p.operand == Operand::dot ? p.scale.abs() * of_x * of_y : p.scale.clamp_min(0.0) * (of_x + of_y).square();
  for (const Tensor* bias : {&p.bias_x, &p.bias_y})
    if (bias->defined()) z = z + bias->amax();
  return z.mul(log2_e).sub_(60.0).ceil_();
}

// The same reductions with a maximum for each tile, by the kernels of sm_80, in place of those that `merge` finds doubtful. They
// read the flag on the device: nobody waits, and where it is not set they do nothing.
struct Careful {
  Careful(const Problem& p, const Operands& o, const Tensor& doubtful_, int64_t multiprocessors) : doubtful(doubtful_) {
    const int64_t blocks = ceil_div(p.n, fused_tile), tiles = ceil_div(p.m, fused_tile), ctas = std::min<int64_t>(blocks, 16);
    const int64_t per_split = ceil_div(tiles, std::clamp<int64_t>(multiprocessors / ctas, 1, tiles)), splits = ceil_div(tiles, per_split);
    row_parts = p.empty({splits, p.n, 2}), col_parts = p.columns || p.symmetric ? p.empty({ctas, p.m, 2}) : Tensor();
    const HopperCareful args{{o.sides.equation(p), o.of(0, p.n, 0, p.m), ctas, splits, mutable_pointer(row_parts), mutable_pointer(col_parts), p.symmetric, 0, 3},
                             pointer(doubtful)};
    FASTCL_LAUNCH(hopper_careful, args, p.x);
    merge = {nullptr, nullptr, splits, ctas, 0, p.symmetric, 1, nullptr};
  }
  void replace(const HopperMerge& own, bool rows, const Tensor& like) {
    FusedMerge from = merge;
    from.row_parts = rows ? pointer(row_parts) : nullptr;
    from.col_parts = !rows || from.triangle ? pointer(col_parts) : nullptr;
    from.size = own.size;
    const HopperReplace args{own, from};
    FASTCL_LAUNCH(hopper_replace, args, like);
  }

  Tensor doubtful, row_parts, col_parts;
  FusedMerge merge;
};

// The weights of one problem, strip by strip in one workspace, and what follows on each.
class Strips {
 public:
  Strips(const Problem& p, const Operands& o, Sums& sums, const Tensor& r, const Tensor& c, const Tensor& g, const Tensor& h, const Tensor& unit)
      : p_(p), o_(o), sums_(sums), multiprocessors_(device_facts(p.x).multiprocessors), equation_(o.sides.equation(p)) {
    const auto own = [&](const Tensor& t) { return t.defined() ? (unit.defined() ? t / unit : t).contiguous() : t; };
    const Tensor g_ = own(g), h_ = own(p.symmetric ? g : h), r_ = p.lse() ? r.contiguous() : Tensor();
    const Tensor c_ = !p.lse() ? Tensor() : p.symmetric ? r_ : c.defined() ? c.contiguous() : c;
    both_ = p.lse() && g_.defined() && h_.defined();
    if (both_) reference_ = softmax_reference(r_, c_);
    const auto padded = [](int64_t rows) { return ceil_div(rows, fused_tile) * fused_tile; };
    x_factors_ = p.empty({padded(p.n), 2}), y_factors_ = p.empty({padded(p.m), 2});
    const Tensor single = at::empty({1}, p.options().dtype(at::kInt));
    const FusedFactors args{{pointer(g_), pointer(h_), pointer(r_), pointer(c_), pointer(reference_)}, p.n, p.m, p.lse(), mutable_pointer(x_factors_),
                            mutable_pointer(y_factors_), mutable_pointer(single)};
    FASTCL_LAUNCH(fused_factors, args, p.x);

    int64_t elements = strip::workspace_bytes(p) / p.x.element_size();
    if (p.d <= cached_d) elements = std::min(elements, cached_bytes / p.x.element_size());
    const int64_t side = std::max<int64_t>(256, int64_t(std::sqrt(double(elements))) / 256 * 256);
    rows_ = std::min(p.n, p.m < side ? std::max(side, elements / std::max<int64_t>(256, p.m) / 256 * 256) : side);
    cols_ = p.symmetric ? rows_ : std::min(p.m, p.n < side ? std::max(side, elements / std::max<int64_t>(256, p.n) / 256 * 256) : side);
    // A sweep keeps W Y of its block of x: it needs a block for half of the multiprocessors at least, and takes strips as high as one
    // for each.
    sweeps_ = !p.symmetric && sums.wy.defined() && !hopper_general(equation_, sums.w_rows.defined() || sums.w_cols.defined()) && p.d <= 256 &&
              2 * ceil_div(p.n, 128) >= multiprocessors_;
    if (sweeps_) rows_ = std::min(p.n, 128 * multiprocessors_), cols_ = std::min(p.m, std::max<int64_t>(64, elements / rows_ / 64 * 64));
    weights_ = at::empty({cols_ * pitch(rows_)}, p.x.options());
  }

  // Adds every strip's part to the four sums, and the sum of f to `value`.
  void accumulate(const Tensor& value = {}) {
    for (int64_t i = 0; i < p_.n; i += rows_)
      for (int64_t j = p_.symmetric ? i : 0; j < p_.m; j += cols_) add(i, std::min(p_.n, i + rows_), j, std::min(p_.m, j + cols_), value);
  }

 private:
  static int64_t pitch(int64_t rows) { return ceil_div(rows, 8) * 8; }

  void add(int64_t i0, int64_t i1, int64_t j0, int64_t j1, const Tensor& value) {
    const bool mirrored = p_.symmetric && i0 != j0;
    const Tensor &w_cols = mirrored ? sums_.w_rows : sums_.w_cols, &wtx = mirrored ? sums_.wy : sums_.wtx;
    const int64_t n = i1 - i0, m = j1 - j0;
    const bool summed = sums_.w_rows.defined() || w_cols.defined() || value.defined();
    const Grid at_ = sweeps_ ? Grid{std::min(ceil_div(n, 128), multiprocessors_), 1} : grid(n, m, hopper_block(equation_, o_.x.size(1), true, summed), multiprocessors_);
    const Tensor row_parts = summed ? p_.empty({at_.splits, n}) : Tensor(), col_parts = summed ? p_.empty({at_.ctas, m}) : Tensor();
    const Tensor values = value.defined() ? p_.empty({at_.ctas, m}) : Tensor();
    HopperTiles args{equation_, o_.of(i0, i1, j0, j1), i0, j0, at_.ctas, at_.splits, 0, both_, pointer(reference_), mutable_pointer(row_parts),
                     mutable_pointer(col_parts), mutable_pointer(values), pointer(x_factors_), pointer(y_factors_), nullptr, nullptr, nullptr, pitch(n)};
    Tensor unit;
    if (p_.x.scalar_type() == at::kHalf && !p_.lse()) {
      // A slope may be of any size, and what bounds it far above every pair: the unit is the strip's own largest weight, which then
      // is 2^14, 38 bits above the smallest subnormal. To know it takes a product more.
      const Tensor peaks = p_.empty({8 * at_.splits, at_.ctas});
      args.peaks = mutable_pointer(peaks);
      FASTCL_LAUNCH(hopper_weights, args, p_.x);
      unit = peaks.amax().mul_(0x1p-14).clamp_(1e-30, 1e30).nan_to_num_(1.0);
      args.peaks = nullptr, args.unit = pointer(unit);
    }
    args.weights = mutable_pointer(weights_);
    if (sweeps_) {
      const Tensor wy = sums_.wy.narrow(0, i0, n);
      args.wy = mutable_pointer(wy), args.wy_columns = p_.d;
      FASTCL_LAUNCH(hopper_sweep, args, p_.x);
    } else {
      FASTCL_LAUNCH(hopper_weights, args, p_.x);
    }
    const auto gather = [&](const Tensor& into, int64_t start, const Tensor& parts) {
      if (!into.defined()) return;
      const Tensor sum = parts.sum(0);
      into.narrow(0, start, sum.size(0)).add_(unit.defined() ? sum.mul_(unit) : sum);
    };
    gather(sums_.w_rows, i0, row_parts), gather(w_cols, j0, col_parts);
    if (value.defined()) value.add_(values.sum(at::kDouble), mirrored ? 2 : 1);
    const Tensor w = weights_.as_strided({m, n}, {pitch(n), 1});  // transposed
    if (sums_.wy.defined() && !sweeps_) strip::add_product(sums_.wy.narrow(0, i0, n), w.t(), o_.sides.y.narrow(0, j0, m), unit);
    if (wtx.defined()) strip::add_product(wtx.narrow(0, j0, m), w, o_.sides.x.narrow(0, i0, n), unit);
  }

  const Problem& p_;
  const Operands& o_;
  Sums& sums_;
  int64_t multiprocessors_, rows_, cols_;
  bool both_, sweeps_;
  Equation equation_;
  Tensor reference_, x_factors_, y_factors_, weights_;
};

Gradients gradients_in(at::ScalarType dtype, const Problem& p, const Tensor& r, const Tensor& c, const Tensor& g, const Tensor& h, const Wanted& wanted) {
  const Operands o(p);
  Sums sums(p, o.sides, wanted);
  if (!wanted.any()) return sums.gradients(dtype);
  const Tensor unit = weight_unit(p, g, p.symmetric ? g : h);
  Strips(p, o, sums, r, c, g, h, unit).accumulate();
  return sums.gradients(dtype, unit);
}

}  // namespace

bool holds(const Problem& p, const DeviceFacts& facts) {
  const int64_t most = int64_t{1} << 29;
  return fastcl_cuda_hopper_rows != nullptr && facts.major == 9 && facts.minor == 0 && facts.shared_bytes >= hopper_shared && p.dtype == at::kFloat &&
         p.x.element_size() == 2 && p.n >= 1 && p.m >= 1 && p.n <= most && p.m <= most;
}

std::tuple<Tensor, Tensor> rows(const Problem& p) {
  const Operands o(p);
  const Equation e = o.sides.equation(p);
  const bool cols = p.columns || p.symmetric;
  const int64_t multiprocessors = device_facts(p.x).multiprocessors, block = hopper_block(e, o.x.size(1), false, false);
  const auto [ctas, splits] = grid(p.n, p.m, block, multiprocessors);
  const Tensor row_parts = p.empty({splits, p.n}), col_parts = cols ? p.empty({ctas, p.m}) : Tensor();
  const Tensor reference = p.lse() ? bound(p, o) : Tensor(), doubtful = at::zeros({1}, p.options().dtype(at::kInt));
  HopperTiles args{e, o.of(0, p.n, 0, p.m), 0, 0, ctas, splits, p.symmetric, 0, pointer(reference), mutable_pointer(row_parts), mutable_pointer(col_parts)};
  FASTCL_LAUNCH(hopper_rows, args, p.x);
  const auto join = [&](const Tensor& rows, const Tensor& columns, int64_t size, const Tensor& out) {
    const HopperMerge merge{pointer(rows), pointer(columns), splits, ctas, size, p.symmetric ? block : 0, p.lse(), pointer(reference), pointer(p.shift), mutable_pointer(out), mutable_pointer(doubtful)};
    FASTCL_LAUNCH(hopper_merge, merge, p.x);
    return merge;
  };
  const Tensor r = p.empty({p.n}), c = p.columns ? p.empty({p.m}) : Tensor();
  const HopperMerge of_r = join(row_parts, p.symmetric ? col_parts : Tensor(), p.n, r);
  HopperMerge of_c{};
  if (p.columns) of_c = join({}, col_parts, p.m, c);
  if (p.lse()) {
    Careful careful(p, o, doubtful, multiprocessors);
    careful.replace(of_r, true, p.x);
    if (p.columns) careful.replace(of_c, false, p.x);
  }
  return {r, c};
}

Gradients gradients(const Problem& p, const Tensor& r, const Tensor& c, const Tensor& g, const Tensor& h, const Wanted& wanted) {
  return gradients_in(p.x.scalar_type(), p, r, c, g, h, wanted);
}

Total total(const Problem& p, const Tensor& positive, Outer outer, const Wanted& wanted) {
  if (!p.lse() && wanted.any()) {
    const Operands o(p);
    Sums sums(p, o.sides, wanted);
    const Tensor value = at::zeros({}, p.options().dtype(at::kDouble)), ones = at::ones({p.n}, p.options());
    Strips(p, o, sums, {}, {}, ones, {}, {}).accumulate(value);
    return {value.to(p.dtype), sums.gradients(p.dtype), {}};
  }
  const Tensor r = std::get<0>(rows(p));
  const OuterForm form = outer_form(outer, r.to(at::kDouble), positive.defined() ? positive.to(at::kDouble) : Tensor());
  Gradients gradients;
  if (wanted.any()) gradients = gradients_in(p.dtype, p, r, {}, form.g.to(p.dtype), {}, wanted);
  return {form.value.to(p.dtype), gradients, form.dpositive.defined() ? form.dpositive.to(p.dtype) : Tensor()};
}

}  // namespace fastcl::cuda::hopper
