#include "given.h"

namespace fastcl::cpu {
namespace {

constexpr std::string_view name_of(ScalarKind kind) {
  return kind == ScalarKind::float64 ? "float64" : kind == ScalarKind::float32 ? "float32" : "int64";
}

// The dtype of r, c and everything scalar.
ScalarKind accumulation(const Tensor& x) { return x.kind() == ScalarKind::float64 ? ScalarKind::float64 : ScalarKind::float32; }

void check_scalar(std::string_view name, const Tensor& given, const Described& x) {
  const Described t = given.describe();
  FASTCL_CHECK_VALUE(given.count() == 1, name, ": expected one element, got shape ", t);
  FASTCL_CHECK_TYPE(is_floating(t.kind), name, ": expected a floating dtype, got ", t.dtype);
  check_device(name, t, x);
}

void check_vector(std::string_view name, const OptionalTensor& given, int64_t length, ScalarKind kind, const Described& x) {
  if (!given) return;
  const Described v = given->describe();
  FASTCL_CHECK_VALUE(v.dim == 1 && v.sizes[0] == length, name, ": expected shape (", length, ",), got ", v);
  FASTCL_CHECK_TYPE(v.kind == kind, name, ": expected ", name_of(kind), ", got ", v.dtype);
  check_device(name, v, x);
}

}  // namespace

Given::Given(Stack& s)
    : x(s.tensor()), y(s.optional_tensor()), scale(s.tensor()), shift(s.tensor()), bias_x(s.optional_tensor()), bias_y(s.optional_tensor()),
      group_x(s.optional_tensor()), group_y(s.optional_tensor()), limit_x(s.optional_tensor()), limit_y(s.optional_tensor()),
      guide_x(s.optional_tensor()), guide_y(s.optional_tensor()), row_offset(s.integer()), col_offset(s.integer()), period(s.integer()),
      mask(s.text()), operand(s.text()), pair(s.text()), constants(s.numbers()), reduce(s.text()), columns(s.boolean()), own(own_pair(pair)) {}

Given::Given(Tensor x, OptionalTensor y, Tensor scale, Tensor shift)
    : x(std::move(x)), y(std::move(y)), scale(std::move(scale)), shift(std::move(shift)), row_offset(0), col_offset(0), period(0), mask("all"),
      operand("dot"), pair("identity"), reduce("sum"), columns(false), own(nullptr) {}

void Given::check_tensors() const {
  const Described of_x = x.describe();
  FASTCL_CHECK_VALUE(of_x.dim == 2, "x: expected a matrix (n, d), got shape ", of_x);
  FASTCL_CHECK_TYPE(is_floating(of_x.kind), "x: expected float64, float32, bfloat16 or float16, got ", of_x.dtype);
  if (y) {
    const Described of_y = y->describe();
    FASTCL_CHECK_VALUE(of_y.dim == 2 && of_y.sizes[1] == x.size(1), "y: expected a matrix (m, ", x.size(1), "), got shape ", of_y);
    FASTCL_CHECK_TYPE(of_y.kind == of_x.kind, "y: expected the dtype of x, ", of_x.dtype, ", got ", of_y.dtype);
    check_device("y", of_y, of_x);
  }
  const int64_t n = x.size(0), m = y ? y->size(0) : n;
  check_scalar("scale", scale, of_x);
  check_scalar("shift", shift, of_x);
  check_vector("bias_x", bias_x, n, accumulation(x), of_x);
  check_vector("bias_y", bias_y, m, accumulation(x), of_x);
  check_vector("group_x", group_x, n, ScalarKind::int64, of_x);
  check_vector("group_y", group_y, m, ScalarKind::int64, of_x);
  check_vector("limit_x", limit_x, n, accumulation(x), of_x);
  check_vector("limit_y", limit_y, m, accumulation(x), of_x);
}

// Limits of another product: rows of any one width, of each side that there is.
void Given::check_guides() const {
  if (!guide_x && !guide_y) return;
  FASTCL_CHECK_VALUE(guide_x && bool(guide_y) == bool(y),
                     "guide_y: expected guides of rows and of columns, and of x with itself guide_x alone");
  FASTCL_CHECK_VALUE(limit_x || limit_y, "guide_x: expected limits beside it, got none");
  for (const OptionalTensor* given : {&guide_x, &guide_y}) {
    if (!*given) continue;
    const bool of_y = given == &guide_y;
    const std::string_view name = of_y ? "guide_y" : "guide_x";
    const int64_t count = of_y ? y->size(0) : x.size(0);
    const Described guide = (*given)->describe();
    FASTCL_CHECK_VALUE(guide.dim == 2 && guide.sizes[0] == count, name, ": expected a matrix (", count, ", k), got shape ", guide);
    FASTCL_CHECK_VALUE(guide.sizes[1] == guide_x->size(1), name, ": expected rows of the width of guide_x, ", guide_x->size(1),
                       ", got shape ", guide);
    FASTCL_CHECK_TYPE(guide.kind == accumulation(x), name, ": expected ", name_of(accumulation(x)), ", got ", guide.dtype);
    check_device(name, guide, x.describe());
  }
}

Choices Given::check() const {
  check_tensors();
  check_guides();
  FASTCL_CHECK_VALUE(y || !(columns || bias_x || bias_y || group_y || limit_y),
                     "y: x with itself takes no columns, biases, second groups or second limits; pass y=x");
  FASTCL_CHECK_VALUE(y || row_offset == col_offset, "mask: x with itself needs equal offsets, got ", row_offset, " and ",
                     col_offset);
  const Choices c = choices_of(mask, operand, own ? pair_entries[0].name : pair, reduce);
  if (c.mask == MaskKind::across_groups || c.mask == MaskKind::within_groups) {
    const int64_t m = y ? y->size(0) : x.size(0);
    FASTCL_CHECK_VALUE(group_x, "mask: '", mask, "' needs group_x");
    FASTCL_CHECK_VALUE(group_y || x.size(0) == m, "group_y: expected ", m, " groups, got none");
  }
  FASTCL_CHECK_VALUE(c.reduce == Reduction::sum || pair == "identity", "pair: reduce='logsumexp' goes with 'identity' only, got '",
                     pair, "'");
  const int needed = own ? own->constants : pair_entries[c.pair].constants, most = own ? needed : 2;
  const auto count = int64_t(constants.size());
  FASTCL_CHECK_VALUE(count >= needed && count <= most, "constants: '", pair, "' needs ", int64_t(needed), ", got ", count);
  return c;
}

void Given::check(const Wanted& wanted) const {
  FASTCL_CHECK_VALUE(y || !wanted.y, "wanted: x with itself has no gradient of y; pass y=x");
}

}  // namespace fastcl::cpu
