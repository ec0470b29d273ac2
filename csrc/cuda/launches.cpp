// The launches of the CUDA kernels as torch ops, over torch's stable C interface: each takes the fields of its struct, in their
// order, and starts one kernel on the current stream of its tensors' device. What is written is the caller's memory; nothing is
// allocated, and no value is read on the host. What a kernel must not read or write is refused.
#include "call.h"
#include "sm_90a/launch.h"

namespace fastcl::cuda {
namespace {

// ---- strip

constexpr int64_t no_period = 0;

StripReduce strip_reduce_of(Call& a) {
  StripReduce s{a.equation(no_period), a.tile(), nullptr, nullptr};
  const int64_t planes = s.equation.reduce == Reduction::logsumexp ? 2 : 1, rows = s.tile.i1 - s.tile.i0, cols = s.tile.j1 - s.tile.j0;
  s.row_parts = a.out("rows", a.kind(), planes * ceil_div(cols, strip_block_cols) * rows);
  s.col_parts = a.out("cols", a.kind(), planes * ceil_div(rows, strip_block_rows) * cols, optional);
  return s;
}

StripWeights strip_weights_of(Call& a) {
  StripWeights s{a.equation(no_period), a.tile()};
  const Tile& t = s.tile;
  const int64_t rows = t.i1 - t.i0, cols = t.j1 - t.j0;
  s.weighting = a.weighting(t.i1, t.j1, s.equation.reduce == Reduction::logsumexp);
  const Tensor& weights = *a.tensor("weights");
  Call::check_matrix("weights", weights, weights.kind());
  FASTCL_CHECK_VALUE(is_floating(weights.kind()) && weights.size(0) == rows && weights.size(1) == cols && weights.stride(0) == t.pitch, "weights: expected the layout of dot");
  s.weights = weights.mutable_data(), s.weights_dtype = dtype_of(weights);
  FASTCL_CHECK_VALUE((s.weights_dtype == Dtype::float64) == (t.dtype == Dtype::float64), "weights: expected float64 where dot has it, and there alone");
  const int64_t of_rows = ceil_div(cols, strip_block_cols) * rows;
  s.row_sums = a.out("rows", a.kind(), of_rows, optional);
  s.col_sums = a.out("cols", a.kind(), ceil_div(rows, strip_block_rows) * cols, optional);
  s.values = a.out("values", a.kind(), of_rows, optional);
  return s;
}

// A grid of no blocks is refused by CUDA.
template <class Struct>
void launch_on_tile(const Call& a, const Tile& t, int (*kernel)(const Struct*, void*), const Struct& arguments, const char* name) {
  if (t.i1 > t.i0 && t.j1 > t.j0) a.launch(kernel, arguments, name);
}

void strip_reduce(Call& a) {
  const StripReduce s = strip_reduce_of(a);
  launch_on_tile(a, s.tile, fastcl_cuda_strip_reduce, s, "strip_reduce");
}
void strip_weights(Call& a) {
  const StripWeights s = strip_weights_of(a);
  launch_on_tile(a, s.tile, fastcl_cuda_strip_weights, s, "strip_weights");
}
void strip_reduce_limited(Call& a) {
  StripReduceLimited s{strip_reduce_of(a), {}};
  s.at_most = a.at_most(s.strip.tile);
  launch_on_tile(a, s.strip.tile, fastcl_cuda_strip_reduce_limited, s, "strip_reduce_limited");
}
void strip_weights_limited(Call& a) {
  StripWeightsLimited s{strip_weights_of(a), {}};
  s.at_most = a.at_most(s.strip.tile);
  launch_on_tile(a, s.strip.tile, fastcl_cuda_strip_weights_limited, s, "strip_weights_limited");
}

void merge_parts(Call& a) {
  const Tensor &parts = *a.tensor("parts"), *top = a.tensor("top", optional), &sum = *a.tensor("sum");
  const double factor = a.number();
  const int64_t planes = top ? 2 : 1;
  FASTCL_CHECK_VALUE(parts.dim() == 3 && parts.size(0) == planes && dense(parts), "parts: expected ", planes, " planes");
  const int64_t count = parts.size(1), size = parts.size(2);
  Call::check_vector("top", top, parts.kind(), size), Call::check_vector("sum", &sum, parts.kind(), size);
  FASTCL_CHECK_VALUE(parts.kind() == ScalarKind::float32 || parts.kind() == ScalarKind::float64, "parts: expected float32 or float64");
  const MergeParts args{parts.data(), count, size, top ? top->mutable_data() : nullptr, sum.mutable_data(), factor, dtype_of(parts)};
  if (size > 0) a.launch(fastcl_cuda_merge_parts, args, "merge_parts");
}

// ---- fused

void fused_pack(Call& a) {
  const Tensor &from = *a.tensor("from"), &to = *a.tensor("to");
  FASTCL_CHECK_VALUE(from.dim() == 2 && (from.size(1) <= 1 || from.stride(1) == 1) && is_floating(from.kind()) && from.kind() != ScalarKind::float64, "from: expected rows of 16 bits or float32");
  Call::check_matrix("to", to, from.kind());
  FASTCL_CHECK_VALUE(dense(to) && to.size(0) == from.size(0) && to.size(1) >= from.size(1), "to: expected as many rows, at least as wide");
  const FusedPack args{from.data(), from.stride(0), from.size(0), from.size(1), to.mutable_data(), to.size(1), dtype_of(from)};
  a.launch(fastcl_cuda_fused_pack, args, "fused_pack");
}

FusedRows fused_rows_of(Call& a) {
  FusedRows f{a.equation(fused_least_period), a.sides()};
  f.ctas = a.integer(), f.splits = a.integer();
  a.covers(f.sides.n, f.sides.m);
  const int64_t width = f.equation.reduce == Reduction::logsumexp ? 2 : 1;
  f.row_parts = a.out("rows", ScalarKind::float32, f.splits * f.sides.n * width);
  f.col_parts = a.out("cols", ScalarKind::float32, f.ctas * f.sides.m * width, optional);
  f.triangle = a.boolean(), f.resident = a.boolean(), f.stages = int32_t(a.integer());
  return f;
}

void fused_rows(Call& a) {
  const FusedRows f = fused_rows_of(a);
  a.launch(fastcl_cuda_fused_rows, f, "fused_rows");
}

// Parts of rows and columns, `width` numbers of float32 for each of m.size.
template <class Merge>
void take_parts(Merge& m, const Tensor* rows, const Tensor* cols, int64_t width) {
  const auto data = [&](const char* name, const Tensor* t, int64_t parts) {
    return Call::check_vector(name, t, ScalarKind::float32, parts * m.size * width) ? t->data() : nullptr;
  };
  m.row_parts = data("rows", rows, m.splits), m.col_parts = data("cols", cols, m.ctas);
}

void fused_merge(Call& a) {
  FusedMerge f{};
  const Tensor *rows = a.tensor("rows", optional), *cols = a.tensor("cols", optional);
  f.splits = a.integer(), f.ctas = a.integer(), f.triangle = a.boolean(), f.logsumexp = a.boolean();
  const Tensor& out = *a.tensor("out");
  f.size = out.count();
  f.out = Call::check_vector("out", &out, ScalarKind::float32, 0)->mutable_data();
  take_parts(f, rows, cols, f.logsumexp ? 2 : 1);
  a.launch(fastcl_cuda_fused_merge, f, "fused_merge");
}

void fused_factors(Call& a) {
  const int64_t n = a.integer(), m = a.integer();
  const bool logsumexp = a.boolean();
  FusedFactors f{a.weighting(n, m, logsumexp), n, m, logsumexp};
  f.x_factors = a.out("x_factors", ScalarKind::float32, 2 * padded(n)), f.y_factors = a.out("y_factors", ScalarKind::float32, 2 * padded(m));
  f.single = a.out("single", ScalarKind::int32, 1);
  a.launch(fastcl_cuda_fused_factors, f, "fused_factors");
}

void fused_gradient(Call& a) {
  FusedGradient f{a.equation(fused_least_period), a.sides()};
  a.covers(f.sides.n, f.sides.m);
  f.x_factors = a.in("x_factors", ScalarKind::float32, 2 * padded(f.sides.n)), f.y_factors = a.in("y_factors", ScalarKind::float32, 2 * padded(f.sides.m));
  f.single = a.in("single", ScalarKind::int32, 1);
  f.wy = a.out("wy", ScalarKind::float32, f.sides.n * f.sides.d), f.w_rows = a.out("w_rows", ScalarKind::float32, f.sides.n, optional);
  f.values = a.out("values", ScalarKind::float32, f.sides.n, optional);
  FASTCL_CHECK_VALUE(!f.values || f.equation.reduce == Reduction::sum, "values: expected none beside a log-sum-exp");
  a.launch(fastcl_cuda_fused_gradient, f, "fused_gradient");
}

// ---- hopper

#ifdef FASTCL_HOPPER
HopperTiles hopper_tiles(Call& a) {
  HopperTiles t{a.equation(hopper_least_period), a.sides()};
  const int64_t n = t.sides.n, m = t.sides.m;
  t.x0 = a.integer(), t.y0 = a.integer(), t.ctas = a.integer(), t.splits = a.integer(), t.triangle = a.boolean(), t.both = a.boolean();
  FASTCL_CHECK_VALUE(t.x0 >= 0 && t.y0 >= 0, "x0, y0: expected none below 0");
  a.covers(t.x0 + n, t.y0 + m);
  const auto f = ScalarKind::float32;
  t.reference = a.in("reference", f, 1, optional);
  t.row_parts = a.out("rows", f, t.splits * n, optional), t.col_parts = a.out("cols", f, t.ctas * m, optional);
  t.value_parts = a.out("values", f, t.ctas * m, optional);
  t.x_factors = a.in("x_factors", f, 2 * padded(t.x0 + n), optional), t.y_factors = a.in("y_factors", f, 2 * padded(t.y0 + m), optional);
  t.single = a.in("single", ScalarKind::int32, 1, optional);
  t.unit = a.in("unit", f, 1, optional);
  t.peaks = a.out("peaks", f, 8 * t.splits * t.ctas, optional);
  if (const Tensor* weights = a.tensor("weights", optional)) {  // transposed
    Call::check_matrix("weights", *weights, weights->kind());
    FASTCL_CHECK_VALUE(weights->size(0) == m && weights->size(1) == n && dtype_of(*weights) == t.sides.dtype, "weights: expected (m, n) in the dtype of x");
    t.weights = weights->mutable_data(), t.pitch = weights->stride(0);
  }
  if (const Tensor* wy = a.tensor("wy", optional)) {
    FASTCL_CHECK_VALUE(wy->kind() == f && wy->dim() == 2 && wy->size(0) == n && wy->size(1) <= t.sides.d && dense(*wy), "wy: expected dense rows of float32, at most as wide as x");
    t.wy = wy->mutable_data(), t.wy_columns = wy->size(1);
  }
  return t;
}

void hopper_rows(Call& a) { const HopperTiles t = hopper_tiles(a); a.launch(fastcl_cuda_hopper_rows, t, "hopper_rows"); }
void hopper_weights(Call& a) { const HopperTiles t = hopper_tiles(a); a.launch(fastcl_cuda_hopper_weights, t, "hopper_weights"); }
void hopper_sweep(Call& a) { const HopperTiles t = hopper_tiles(a); a.launch(fastcl_cuda_hopper_sweep, t, "hopper_sweep"); }

void hopper_product(Call& a) {
  HopperProduct h{};
  const Tensor& weights = *a.tensor("weights");
  h.transposed = a.boolean();
  const Tensor &z = *a.tensor("z");
  for (const Tensor* t : {&weights, &z}) Call::check_matrix("weights, z", *t, z.kind());
  FASTCL_CHECK_VALUE(z.kind() == ScalarKind::bfloat16 || z.kind() == ScalarKind::float16, "weights, z: expected 16 bits");
  h.weights = weights.data(), h.m = weights.size(0), h.n = weights.size(1), h.pitch = weights.stride(0);
  h.z = z.data(), h.z_stride = z.stride(0), h.d = z.size(1), h.dtype = dtype_of(z);
  const int64_t rows = h.transposed ? h.n : h.m, k = h.transposed ? h.m : h.n;
  h.unit = a.in("unit", ScalarKind::float32, 1, optional), h.splits = a.integer();
  const Tensor& out = *a.tensor("out");
  FASTCL_CHECK_VALUE(z.size(0) == k && h.splits >= 1 && out.dim() >= 2, "z, splits: expected ", k, " rows, and at least one split");
  h.columns = out.size(out.dim() - 1);
  FASTCL_CHECK_VALUE(out.kind() == ScalarKind::float32 && dense(out) && h.columns <= h.d && out.count() == h.splits * rows * h.columns, "out: expected float32 of ", rows, " rows a split, at most as wide as z");
  h.out = out.mutable_data();
  a.launch(fastcl_cuda_hopper_product, h, "hopper_product");
}

HopperMerge hopper_merge_of(Call& a) {
  HopperMerge h{};
  const auto f = ScalarKind::float32;
  const Tensor *rows = a.tensor("rows", optional), *cols = a.tensor("cols", optional);
  h.splits = a.integer(), h.ctas = a.integer(), h.block = a.integer(), h.logsumexp = a.boolean();
  h.reference = a.in("reference", f, 1, optional), h.shift = a.in("shift", f, 1);
  const Tensor& out = *a.tensor("out");
  h.size = out.count();
  h.out = Call::check_vector("out", &out, f, 0)->mutable_data();
  take_parts(h, rows, cols, 1);
  h.doubtful = a.out("doubtful", ScalarKind::int32, 1);
  return h;
}

void hopper_merge(Call& a) { const HopperMerge h = hopper_merge_of(a); a.launch(fastcl_cuda_hopper_merge, h, "hopper_merge"); }

void hopper_careful(Call& a) {
  HopperCareful h{fused_rows_of(a)};
  h.doubtful = a.in("doubtful", ScalarKind::int32, 1);
  a.launch(fastcl_cuda_hopper_careful, h, "hopper_careful");
}

void hopper_replace(Call& a) {
  HopperReplace h{hopper_merge_of(a)};
  const Tensor *rows = a.tensor("careful_rows", optional), *cols = a.tensor("careful_cols", optional);
  FusedMerge& f = h.careful;
  f.splits = a.integer(), f.ctas = a.integer(), f.triangle = h.merge.block != 0, f.logsumexp = 1, f.size = h.merge.size;
  take_parts(f, rows, cols, 2);
  a.launch(fastcl_cuda_hopper_replace, h, "hopper_replace");
}
#endif

// ---- registration

template <void (*op)(Call&)>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  Call call(stack);
  op(call);
}

#define FASTCL_EQUATION                                                                                                       \
  "Tensor scale, Tensor shift, Tensor? norm_x, Tensor? norm_y, Tensor? bias_x, Tensor? bias_y, Tensor? group_x, Tensor? group_y, " \
  "int diff, int period, str mask, str operand, str pair, float k0, float k1, str reduce"
#define FASTCL_WEIGHTING "Tensor? g, Tensor? h, Tensor? r, Tensor? c, Tensor? reference"
#define FASTCL_REDUCE FASTCL_EQUATION ", Tensor dot, int i0, int j0, Tensor(a!) rows, Tensor(b!)? cols"
#define FASTCL_WEIGHTS FASTCL_EQUATION ", Tensor(a!) dot, int i0, int j0, " FASTCL_WEIGHTING ", Tensor(a!) weights, Tensor(b!)? rows, Tensor(c!)? cols, Tensor(d!)? values"
#define FASTCL_AT_MOST ", Tensor? limit_x, Tensor? limit_y, Tensor? guided"
#define FASTCL_OP(name, arguments) {#name, boxed<name>, #name "(" arguments ") -> ()"}

const Registration launches(FASTCL_LAUNCH_LIBRARY, FASTCL_LAUNCH_KEY, {
  FASTCL_OP(strip_reduce, FASTCL_REDUCE), FASTCL_OP(strip_reduce_limited, FASTCL_REDUCE FASTCL_AT_MOST),
  FASTCL_OP(strip_weights, FASTCL_WEIGHTS), FASTCL_OP(strip_weights_limited, FASTCL_WEIGHTS FASTCL_AT_MOST),
  FASTCL_OP(merge_parts, "Tensor parts, Tensor(a!)? top, Tensor(b!) sum, float factor"),
  FASTCL_OP(fused_pack, "Tensor rows, Tensor(a!) to"),
#define FASTCL_ROWS FASTCL_EQUATION ", Tensor x, Tensor y, int ctas, int splits, Tensor(a!) rows, Tensor(b!)? cols, bool triangle, bool resident, int stages"
  FASTCL_OP(fused_rows, FASTCL_ROWS),
  FASTCL_OP(fused_merge, "Tensor? rows, Tensor? cols, int splits, int ctas, bool triangle, bool logsumexp, Tensor(a!) out"),
  FASTCL_OP(fused_factors, "int n, int m, bool logsumexp, " FASTCL_WEIGHTING ", Tensor(a!) x_factors, Tensor(b!) y_factors, Tensor(c!) single"),
  FASTCL_OP(fused_gradient, FASTCL_EQUATION ", Tensor x, Tensor y, Tensor x_factors, Tensor y_factors, Tensor single, Tensor(a!) wy, Tensor(b!)? w_rows, Tensor(c!)? values"),
#ifdef FASTCL_HOPPER
#define FASTCL_TILES FASTCL_EQUATION ", Tensor x, Tensor y, int x0, int y0, int ctas, int splits, bool triangle, bool both, Tensor? reference, " \
  "Tensor(a!)? rows, Tensor(b!)? cols, Tensor(c!)? values, Tensor? x_factors, Tensor? y_factors, Tensor? single, Tensor? unit, Tensor(d!)? peaks, " \
  "Tensor(e!)? weights, Tensor(f!)? wy"
#define FASTCL_MERGE "Tensor? rows, Tensor? cols, int splits, int ctas, int block, bool logsumexp, Tensor? reference, Tensor shift, Tensor(a!) out, Tensor(b!) doubtful"
  FASTCL_OP(hopper_rows, FASTCL_TILES), FASTCL_OP(hopper_weights, FASTCL_TILES), FASTCL_OP(hopper_sweep, FASTCL_TILES),
  FASTCL_OP(hopper_product, "Tensor weights, bool transposed, Tensor z, Tensor? unit, int splits, Tensor(a!) out"),
  FASTCL_OP(hopper_merge, FASTCL_MERGE),
  FASTCL_OP(hopper_careful, FASTCL_ROWS ", Tensor doubtful"),
  FASTCL_OP(hopper_replace, FASTCL_MERGE ", Tensor? careful_rows, Tensor? careful_cols, int careful_splits, int careful_ctas"),
#endif
});

}  // namespace
}  // namespace fastcl::cuda
