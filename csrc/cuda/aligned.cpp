// A whole loss of two aligned views as two ops, from rows as they are given to one number, and from its upstream gradient to those
// of the rows: three launches each for a batch whose time is the host's. Between them `state` keeps what is O(n), `rows` the rows as
// the sweeps take them; aligned.h has the loss, csrc/cpu/aligned.cpp the same on a CPU.
#include "aligned.h"

#include <utility>

#include "on_device.h"

namespace fastcl::cuda {
namespace {

// w f(p z + q), with the constants of f after its three numbers.
struct Term {
  std::string pair;
  std::vector<double> numbers;

  explicit Term(Stack& s) : pair(s.text()), numbers(s.numbers()) {
    FASTCL_CHECK_VALUE(numbers.size() >= 3 && numbers.size() <= 5, "numbers: expected a weight, a slope, an offset and at most two constants of '", pair, "', got ", int64_t(numbers.size()));
    numbers.resize(5);
  }
  AlignedTerm for_kernel() const {
    return {int32_t(choices_of("all", "dot", pair, "sum").pair), numbers[0], numbers[1], numbers[2], {numbers[3], numbers[4]}};
  }
};

// The loss, and the device: what CUDA_ALIGNED of fastcl/equation/problem.py has from `normalize` on.
struct Form {
  bool normalize;
  std::string sides, operand, reduce, outer;
  bool columns;
  Term negatives, positives;
  double linear, constant;
  Wanted wanted;
  int64_t multiprocessors, shared_bytes;
  Choices of_pairs;  // of the sweeps
  AlignedTerm of_matching;

  explicit Form(Stack& s)
      : normalize(s.boolean()), sides(s.text()), operand(s.text()), reduce(s.text()), outer(s.text()), columns(s.boolean()), negatives(s),
        positives(s), linear(s.number()), constant(s.number()), wanted(s.six_booleans()), multiprocessors(s.integer()), shared_bytes(s.integer()),
        of_pairs(choices_of("off_diagonal", operand, negatives.pair, reduce)), of_matching(positives.for_kernel()) {
    FASTCL_CHECK_VALUE(sides == "xy" || sides == "xx" || sides == "xx+yy" || sides == "stacked", "sides: expected xy, xx, xx+yy or stacked, got ", sides);
    FASTCL_CHECK_VALUE(outer == "sum" || (outer == "contrast" && logsumexp()), "outer: expected sum, or contrast of a log-sum-exp, got ", outer);
    FASTCL_CHECK_VALUE(!columns || (outer == "contrast" && sides == "xy"), "columns: expected outer='contrast' and sides='xy', got ", outer, " and ", sides);
    FASTCL_CHECK_VALUE(multiprocessors > 0, "multiprocessors: expected one or more, got ", multiprocessors);
  }
  bool logsumexp() const { return reduce == "logsumexp"; }
  bool contrast() const { return outer == "contrast"; }
  bool stacked() const { return sides == "stacked"; }
  bool both() const { return sides == "xx+yy"; }
  bool symmetric() const { return sides != "xy"; }
  bool squared() const { return operand == "sqdist"; }
};

// Where the parts of one piece of memory lie: each begins at a multiple of 128 bytes.
class Places {
  int64_t floats_ = 0;

 public:
  int64_t of(int64_t floats) { return std::exchange(floats_, floats_ + ceil_div(floats, 32) * 32); }
  int64_t size() const { return floats_; }
};

// Sizes of a loss, and where each of its vectors lies in `state`.
struct Layout {
  int64_t n, m, d, width;
  int64_t swept_n, swept_m;  // rows and columns of the (first) sweep
  bool groups;               // two views that lie closer together than the kernels tell diagonals apart
  int64_t numbers, matching, of_matching, norms, group, factors, other_factors, size;

  Layout(const Form& f, int64_t n_, int64_t m_, int64_t d_, ScalarKind kind) : n(n_), m(m_), d(d_) {
    const int64_t unit = kind == ScalarKind::float32 ? 4 : 8;
    width = ceil_div(d, unit) * unit;
    swept_n = f.stacked() ? n + m : n, swept_m = f.symmetric() ? swept_n : m;
    groups = f.stacked() && n < fused_least_period;
    Places at;
    numbers = at.of(sizeof(AlignedNumbers) / sizeof(float)), matching = at.of(n), of_matching = at.of(n);
    norms = at.of(f.squared() ? n + m : 0), group = at.of(groups ? 2 * (n + m) : 0);
    factors = at.of(2 * padded(swept_n)), other_factors = at.of(f.symmetric() && !f.both() ? 0 : 2 * padded(m));
    size = at.size();
  }
};

Tensor empty_on(const Described& device, std::initializer_list<int64_t> shape, ScalarKind kind) {
  return empty(shape, kind, device.device_type, device.device_index);
}

// One loss on its device: the sweeps of its pairs, over memory that `state` and `rows` hold.
class Aligned {
 public:
  const Form& form;
  const Layout at;
  const Described device;

  Aligned(const Form& f, const Layout& layout, const Tensor& rows, const Tensor& state)
      : form(f), at(layout), device(rows.describe()), dtype_(dtype_of(rows)), bytes_(rows.kind() == ScalarKind::float32 ? 4 : 2),
        rows_(static_cast<char*>(rows.mutable_data())), state_(state.mutable_data_as<float>()) {
    FASTCL_CHECK_VALUE(state.kind() == ScalarKind::float32 && state.count() == at.size, "state: expected ", at.size, " numbers of float32, got ", state.describe());
    FASTCL_CHECK_VALUE(rows.dim() == 2 && rows.size(0) == at.n + at.m && rows.size(1) == at.width, "rows: expected those of the forward, got ", rows.describe());
  }

  Dtype dtype() const { return dtype_; }
  float* state(int64_t place) const { return state_ + place; }
  AlignedNumbers* numbers() const { return reinterpret_cast<AlignedNumbers*>(state(at.numbers)); }
  char* unit(bool of_y) const { return rows_ + (of_y ? at.n * at.width * bytes_ : 0); }
  float* norms(bool of_y) const { return form.squared() ? state(at.norms) + (of_y ? at.n : 0) : nullptr; }
  int64_t* groups(bool of_y) const { return at.groups ? reinterpret_cast<int64_t*>(state(at.group)) + (of_y ? at.n : 0) : nullptr; }

  template <class Struct>
  void launch(int (*kernel)(const Struct*, void*), const Struct& arguments, const char* name) const {
    launch_on(device.device_index, kernel, arguments, name);
  }

  // What the pairs of one sweep are: of x with y, with the roles exchanged, or of either with itself.
  Equation equation(bool x_is_y, bool y_is_x) const {
    const Choices& c = form.of_pairs;
    Equation e{c.operand, at.groups ? MaskKind::across_groups : c.mask, c.reduce, c.pair, {form.negatives.numbers[3], form.negatives.numbers[4]}};
    e.period = form.stacked() && !at.groups ? at.n : 0;
    e.scale = &numbers()->swept_scale, e.shift = &numbers()->swept_shift;
    e.norm_x = norms(x_is_y), e.norm_y = norms(!y_is_x);
    e.group_x = groups(false), e.group_y = groups(false);
    return e;
  }
  FusedSides sides(bool x_is_y, bool y_is_x) const {
    const int64_t n = form.stacked() ? at.swept_n : x_is_y ? at.m : at.n, m = form.stacked() ? at.swept_m : y_is_x ? at.n : at.m;
    return {unit(x_is_y), unit(!y_is_x), at.width, at.width, n, m, at.width, dtype_};
  }

 private:
  Dtype dtype_;
  int64_t bytes_;
  char* rows_;
  float* state_;
};

// ---- forward

// r of one sweep (and c), as parts that are joined later: the schedule of fastcl/backends/cuda/fused.py.
class Sweep {
  int64_t rows_ = 0, columns_ = 0;
  int32_t logsumexp_ = 0;

 public:
  FusedRows args;
  Tensor parts;

  Sweep(const Aligned& a, bool x_is_y, bool y_is_x) : args{a.equation(x_is_y, y_is_x), a.sides(x_is_y, y_is_x)}, parts(memory(a)) {
    float* const at = parts.mutable_data_as<float>();
    args.row_parts = at, args.col_parts = columns_ > 0 ? at + rows_ : nullptr;
    a.launch(fastcl_cuda_fused_rows, args, "fused_rows");
  }
  FusedMerge of_rows() const { return {args.row_parts, args.triangle ? args.col_parts : nullptr, args.splits, args.ctas, args.sides.n, args.triangle, logsumexp_, nullptr}; }
  FusedMerge of_columns() const { return {nullptr, args.col_parts, args.splits, args.ctas, args.sides.m, args.triangle, logsumexp_, nullptr}; }

 private:
  Tensor memory(const Aligned& a) {
    const FusedSides& s = args.sides;
    const int64_t blocks = ceil_div(s.n, fused_tile), tiles = ceil_div(s.m, fused_tile), most = a.form.multiprocessors;
    logsumexp_ = a.form.logsumexp(), args.triangle = a.form.symmetric();
    args.ctas = std::min(blocks, most);
    // Few rows: several CTAs share a row block.
    args.splits = ceil_div(tiles, ceil_div(tiles, std::min(std::max<int64_t>(most / args.ctas, 1), tiles)));
    args.resident = 0, args.stages = 2;  // what every device holds
    for (const auto& [resident, stages] : {std::pair(1, 3), std::pair(1, 2), std::pair(0, 3)})
      if (fused_rows_shared(s.dtype, s.d, resident, stages, logsumexp_) <= a.form.shared_bytes) {
        args.resident = resident, args.stages = stages;
        break;
      }
    const int64_t planes = logsumexp_ ? 2 : 1;
    rows_ = ceil_div(args.splits * s.n * planes, 4) * 4, columns_ = args.triangle || a.form.columns ? args.ctas * s.m * planes : 0;
    return empty_on(a.device, {rows_ + columns_}, ScalarKind::float32);
  }
};

AlignedView view_of(const Tensor& t) { return {t.data(), t.stride(0), t.stride(1), t.size(0)}; }

void check_rows(const Form& f, const Tensor& x, const Tensor& y) {
  for (const Tensor* t : {&x, &y}) {
    FASTCL_CHECK_VALUE(t->dim() == 2 && is_floating(t->kind()) && t->kind() != ScalarKind::float64 && t->kind() == x.kind(), "rows: expected two matrices (n, d) of one dtype, float32 or 16 bits, got ", t->describe());
    check_device("y", t->describe(), x.describe());
  }
  const bool alike = x.size(0) == y.size(0);
  FASTCL_CHECK_VALUE(x.size(1) == y.size(1) && x.size(1) > 0 && x.size(0) > 0 && (alike || (f.sides == "xy" && !f.columns && x.size(0) < y.size(0))),
                     "y: expected rows that match those of x, of shape ", x.describe(), ", got ", y.describe());
}

const void* number_of(const OptionalTensor& t, const Tensor& x) {
  if (!t) return nullptr;
  FASTCL_CHECK_VALUE(t->count() == 1 && t->kind() == ScalarKind::float32, "scale and shift: expected one number of float32, got ", t->describe());
  check_device("scale and shift", t->describe(), x.describe());
  return t->data();
}

void aligned_loss(StableIValue* arguments, uint64_t, uint64_t) {
  Stack stack(arguments), results = stack;
  const Tensor x = stack.tensor(), y = stack.tensor();
  const OptionalTensor scale = stack.optional_tensor(), shift = stack.optional_tensor();
  const double scale_number = stack.number(), shift_number = stack.number();
  const Form f(stack);
  check_rows(f, x, y);
  const Described device = x.describe();
  const Layout layout(f, x.size(0), y.size(0), x.size(1), x.kind());
  Tensor rows = empty_on(device, {layout.n + layout.m, layout.width}, x.kind()), state = empty_on(device, {layout.size}, ScalarKind::float32);
  Tensor value = empty_on(device, {}, ScalarKind::float32);
  const Aligned a(f, layout, rows, state);

  AlignedRows prepare{view_of(x), view_of(y), layout.d, layout.width, a.dtype(), f.normalize, f.squared(), number_of(scale, x), number_of(shift, x),
                      scale_number, shift_number, f.negatives.numbers[1], f.negatives.numbers[2], a.numbers(), a.unit(false), a.unit(true)};
  prepare.norm_u = a.norms(false), prepare.norm_v = a.norms(true), prepare.matching = a.state(layout.matching);
  prepare.group_u = a.groups(false), prepare.group_v = a.groups(true);
  a.launch(fastcl_cuda_aligned_rows, prepare, "aligned_rows");

  const Sweep sweep(a, false, f.symmetric());
  std::optional<Sweep> of_y;
  if (f.both()) of_y.emplace(a, true, false);

  AlignedFinish finish{};
  const bool any = f.wanted.any();
  finish.rows = {sweep.of_rows(), any ? a.state(layout.factors) : nullptr};
  if (of_y) finish.others.parts = of_y->of_rows();
  if (f.columns) finish.others.parts = sweep.of_columns();
  finish.others.factors = any && (!f.symmetric() || f.both()) ? a.state(layout.other_factors) : nullptr;
  finish.empty_others = any && !f.symmetric() && !f.columns ? padded(layout.m) : 0;
  finish.n = layout.n, finish.views = f.stacked() && f.contrast() ? 2 : 1;
  finish.contrast = f.contrast(), finish.columns = f.columns, finish.symmetric = f.symmetric(), finish.half = x.kind() == ScalarKind::float16;
  finish.weight = f.negatives.numbers[0], finish.linear = f.linear, finish.constant = f.constant, finish.positives = f.of_matching;
  finish.numbers = a.numbers(), finish.matching = a.state(layout.matching), finish.of_matching = any ? a.state(layout.of_matching) : nullptr;
  finish.value = value.mutable_data_as<float>();
  a.launch(fastcl_cuda_aligned_finish, finish, "aligned_finish");
  results.put(std::move(value)), results.put(std::move(rows)), results.put(std::move(state));
}

// ---- backward

// W Y of a sweep, and W 1 where that is asked for, in memory that lives until the kernels that read it are on their way.
struct Sums {
  std::optional<Tensor> memory;
  float *wy = nullptr, *ones = nullptr;

  void sweep(const Aligned& a, bool x_is_y, bool y_is_x, bool with_ones) {
    FusedGradient g{a.equation(x_is_y, y_is_x), a.sides(x_is_y, y_is_x)};
    const int64_t size = g.sides.n * g.sides.d;
    memory = empty_on(a.device, {size + (with_ones ? g.sides.n : 0)}, ScalarKind::float32);
    wy = memory->mutable_data_as<float>(), ones = with_ones ? wy + size : nullptr;
    const bool itself = a.form.symmetric();
    const float *of_x = a.state(a.at.factors), *of_y = a.state(itself && !a.form.both() ? a.at.factors : a.at.other_factors);
    g.x_factors = x_is_y ? of_y : of_x, g.y_factors = y_is_x ? of_x : of_y;
    g.single = &a.numbers()->single[itself && x_is_y];
    g.wy = wy, g.w_rows = ones;
    a.launch(fastcl_cuda_fused_gradient, g, "fused_gradient");
  }
};

void aligned_loss_backward(StableIValue* arguments, uint64_t, uint64_t) {
  Stack stack(arguments), results = stack;
  const Tensor upstream = stack.tensor();
  const OptionalTensor x = stack.optional_tensor(), y = stack.optional_tensor();
  const Tensor rows = stack.tensor(), state = stack.tensor();
  const int64_t n = stack.integer(), d = stack.integer();
  const Form f(stack);
  FASTCL_CHECK_VALUE(upstream.count() == 1 && upstream.kind() == ScalarKind::float32, "upstream: expected one number of float32, got ", upstream.describe());
  FASTCL_CHECK_VALUE(rows.dim() == 2 && n > 0 && d > 0 && rows.size(0) > n, "n: expected fewer than there are rows, ", rows.describe(), ", got ", n);
  for (const Tensor* t : {&upstream, &state}) check_device("upstream and state", t->describe(), rows.describe());
  const Layout layout(f, n, rows.size(0) - n, d, rows.kind());
  const Aligned a(f, layout, rows, state);
  const Wanted& wanted = f.wanted;
  const bool numbers = wanted.scale || wanted.shift, ones = wanted.shift || f.squared();
  const bool of_y = wanted.y || (numbers && f.both()) || (wanted.scale && f.squared() && !f.symmetric());

  Sums first, second;
  if (wanted.x || numbers || (f.stacked() && wanted.y)) first.sweep(a, false, f.symmetric(), ones);
  if (of_y && (f.both() || !f.symmetric())) second.sweep(a, true, !f.symmetric(), ones);

  AlignedGradients g{};
  const auto side = [&](const OptionalTensor& given, bool y_side, std::optional<Tensor>& into, bool want) {
    const Sums& sums = y_side && !f.stacked() ? second : first;
    const int64_t count = y_side ? layout.m : layout.n, from = y_side && f.stacked() ? n : 0;
    AlignedSide s{};
    if (given) {
      FASTCL_CHECK_VALUE(given->dim() == 2 && given->size(0) == count && given->size(1) == d && given->kind() == rows.kind(), "rows: expected those of the forward, got ", given->describe());
      check_device("rows", given->describe(), rows.describe());
    }
    if (want) {
      FASTCL_CHECK_VALUE(given || !f.normalize, "rows: expected those that were normalised, got none");
      into = empty_on(a.device, {count, d}, rows.kind());
      s.gradient = into->mutable_data();
      if (f.normalize) s.given = view_of(*given);
    }
    s.given.count = count, s.unit = a.unit(y_side), s.norm = a.norms(y_side);
    if (sums.wy) s.sums = sums.wy + from * layout.width, s.ones = sums.ones ? sums.ones + from : nullptr;
    const bool squared = f.squared();
    if (f.symmetric()) s.of_dot = squared ? -1.f : 0.5f, s.of_norm = squared ? 1.f : 0.f, s.of_ones = 0.5f;
    else if (!y_side) s.of_dot = squared ? -2.f : 1.f, s.of_norm = squared ? 1.f : 0.f, s.of_ones = 1.f;
    else s.of_norm = squared ? 1.f : 0.f;
    return s;
  };
  std::optional<Tensor> of_rows[2];
  g.x = side(x, false, of_rows[0], wanted.x), g.y = side(y, true, of_rows[1], wanted.y);
  g.n = n, g.d = d, g.width = layout.width, g.dtype = a.dtype(), g.normalize = f.normalize, g.squared = f.squared();
  g.numbers = a.numbers(), g.matching = a.state(layout.matching), g.of_matching = a.state(layout.of_matching);
  g.upstream = upstream.data_as<float>(), g.slope = f.negatives.numbers[1];
  std::optional<Tensor> of_numbers[2], parts;
  if (wanted.scale) of_numbers[0] = empty_on(a.device, {}, ScalarKind::float32), g.of_scale = of_numbers[0]->mutable_data_as<float>();
  if (wanted.shift) of_numbers[1] = empty_on(a.device, {}, ScalarKind::float32), g.of_shift = of_numbers[1]->mutable_data_as<float>();
  if (numbers) parts = empty_on(a.device, {4 * aligned_gradient_blocks(layout.n, layout.m)}, ScalarKind::float32), g.parts = parts->mutable_data_as<float>();
  a.launch(fastcl_cuda_aligned_gradients, g, "aligned_gradients");
  for (auto* pair : {of_rows, of_numbers})
    for (int k = 0; k < 2; k++) results.put(pair[k] ? std::move(*pair[k]) : empty_on(a.device, {0}, ScalarKind::float32));
}

#define FASTCL_LOSS                                                                                                           \
  "bool normalize, str sides, str operand, str reduce, str outer, bool columns, str pair, float[] pair_numbers, str positive, " \
  "float[] positive_numbers, float linear, float constant, bool[] wanted, int multiprocessors, int shared_bytes"

const Registration losses(FASTCL_LAUNCH_LIBRARY, FASTCL_LAUNCH_KEY, {
  {"cuda_aligned_loss", aligned_loss,
   "cuda_aligned_loss(Tensor x, Tensor y, Tensor? scale, Tensor? shift, float scale_number, float shift_number, " FASTCL_LOSS ") -> (Tensor value, Tensor, Tensor)"},
  {"cuda_aligned_loss_backward", aligned_loss_backward,
   "cuda_aligned_loss_backward(Tensor upstream, Tensor? x, Tensor? y, Tensor rows, Tensor state, int n, int d, " FASTCL_LOSS ") -> (Tensor, Tensor, Tensor, Tensor)"},
});

}  // namespace
}  // namespace fastcl::cuda
