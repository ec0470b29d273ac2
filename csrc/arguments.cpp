#include "arguments.h"

#include <initializer_list>
#include <utility>

namespace fastcl {
namespace {

template <class E>
E chosen(std::string_view argument, std::string_view value, std::initializer_list<std::pair<std::string_view, E>> names) {
  std::string list;
  for (const auto& [name, e] : names) {
    if (name == value) return e;
    list += text_of(list.empty() ? "'" : ", '", name, "'");
  }
  refuse_value(text_of(argument, ": expected one of ", list, ", got '", value, "'"));
}

int pair_index(std::string_view name) {
  for (int i = 0; i < pair_count; i++)
    if (name == pair_entries[i].name) return i;
  refuse_value(text_of("pair: expected a pair function that was built in, got '", name,
                       "'; run python -m fastcl.equation.codegen and build again"));
}

constexpr std::string_view name_of(ScalarKind kind) {
  return kind == ScalarKind::float64 ? "float64" : kind == ScalarKind::float32 ? "float32" : "int64";
}

void check_scalar(std::string_view name, const Described& t, const Described& x) {
  int64_t count = 1;
  for (int64_t k = 0; k < t.dim; k++) count *= t.sizes[k];
  FASTCL_CHECK_VALUE(count == 1, name, ": expected one element, got shape ", t);
  FASTCL_CHECK_TYPE(is_floating(t.kind), name, ": expected a floating dtype, got ", t.dtype);
  check_device(name, t, x);
}

// The dtype of r, c and everything scalar.
ScalarKind accumulation(const Described& x) { return x.kind == ScalarKind::float64 ? ScalarKind::float64 : ScalarKind::float32; }

void check_vector(std::string_view name, const Described& v, int64_t length, ScalarKind kind, const Described& x) {
  if (!v.there) return;
  FASTCL_CHECK_VALUE(v.dim == 1 && v.sizes[0] == length, name, ": expected shape (", length, ",), got ", v);
  FASTCL_CHECK_TYPE(v.kind == kind, name, ": expected ", name_of(kind), ", got ", v.dtype);
  check_device(name, v, x);
}

}  // namespace

void append(std::string& text, const Described& t) {
  text += "[";
  for (int64_t k = 0; k < t.dim; k++) text += (k > 0 ? ", " : "") + std::to_string(t.sizes[k]);
  text += "]";
}

void check_device(std::string_view name, const Described& t, const Described& x) {
  FASTCL_CHECK_VALUE(t.device_type == x.device_type && t.device_index == x.device_index, name, ": expected a tensor on the device of x, ",
                     x.device, ":", int64_t(x.device_index), ", got one on ", t.device, ":", int64_t(t.device_index));
}

void Arguments::check_tensors() const {
  FASTCL_CHECK_VALUE(x.dim == 2, "x: expected a matrix (n, d), got shape ", x);
  FASTCL_CHECK_TYPE(is_floating(x.kind),
                    "x: expected float64, float32, bfloat16 or float16, got ", x.dtype);
  if (y.there) {
    FASTCL_CHECK_VALUE(y.dim == 2 && y.sizes[1] == x.sizes[1], "y: expected a matrix (m, ", x.sizes[1], "), got shape ", y);
    FASTCL_CHECK_TYPE(y.kind == x.kind, "y: expected the dtype of x, ", x.dtype, ", got ", y.dtype);
    check_device("y", y, x);
  }
  const int64_t n = x.sizes[0], m = y.there ? y.sizes[0] : n;
  check_scalar("scale", scale, x);
  check_scalar("shift", shift, x);
  check_vector("bias_x", bias_x, n, accumulation(x), x);
  check_vector("bias_y", bias_y, m, accumulation(x), x);
  check_vector("group_x", group_x, n, ScalarKind::int64, x);
  check_vector("group_y", group_y, m, ScalarKind::int64, x);
  check_vector("limit_x", limit_x, n, accumulation(x), x);
  check_vector("limit_y", limit_y, m, accumulation(x), x);
}

// Limits of another product: rows of any one width, of each side that there is.
void Arguments::check_guides() const {
  if (!guide_x.there && !guide_y.there) return;
  FASTCL_CHECK_VALUE(guide_x.there && guide_y.there == y.there,
                     "guide_y: expected guides of rows and of columns, and of x with itself guide_x alone");
  FASTCL_CHECK_VALUE(limit_x.there || limit_y.there, "guide_x: expected limits beside it, got none");
  const std::string_view names[] = {"guide_x", "guide_y"};
  for (const Described* guide : {&guide_x, &guide_y}) {
    if (!guide->there) continue;
    const std::string_view name = names[guide == &guide_y];
    const int64_t count = guide == &guide_y ? y.sizes[0] : x.sizes[0];
    FASTCL_CHECK_VALUE(guide->dim == 2 && guide->sizes[0] == count, name, ": expected a matrix (", count, ", k), got shape ",
                       *guide);
    FASTCL_CHECK_VALUE(guide->sizes[1] == guide_x.sizes[1], name, ": expected rows of the width of guide_x, ", guide_x.sizes[1],
                       ", got shape ", *guide);
    FASTCL_CHECK_TYPE(guide->kind == accumulation(x), name, ": expected ", name_of(accumulation(x)), ", got ", guide->dtype);
    check_device(name, *guide, x);
  }
}

Choices choices_of(std::string_view mask, std::string_view operand, std::string_view pair, std::string_view reduce) {
  return {chosen<Operand>("operand", operand, {{"dot", Operand::dot}, {"sqdist", Operand::sqdist}}),
          chosen<MaskKind>("mask", mask, {{"all", MaskKind::all},
                                          {"off_diagonal", MaskKind::off_diagonal},
                                          {"across_groups", MaskKind::across_groups},
                                          {"within_groups", MaskKind::within_groups}}),
          chosen<Reduction>("reduce", reduce, {{"sum", Reduction::sum}, {"logsumexp", Reduction::logsumexp}}), pair_index(pair)};
}

Choices Arguments::check() const {
  check_tensors();
  check_guides();
  FASTCL_CHECK_VALUE(y.there || !(columns || bias_x.there || bias_y.there || group_y.there || limit_y.there),
                     "y: x with itself takes no columns, biases, second groups or second limits; pass y=x");
  FASTCL_CHECK_VALUE(y.there || row_offset == col_offset, "mask: x with itself needs equal offsets, got ", row_offset, " and ", col_offset);
  const Choices c = choices_of(mask, operand, own_constants < 0 ? pair : pair_entries[0].name, reduce);
  if (c.mask == MaskKind::across_groups || c.mask == MaskKind::within_groups) {
    const int64_t m = y.there ? y.sizes[0] : x.sizes[0];
    FASTCL_CHECK_VALUE(group_x.there, "mask: '", mask, "' needs group_x");
    FASTCL_CHECK_VALUE(group_y.there || x.sizes[0] == m, "group_y: expected ", m, " groups, got none");
  }
  FASTCL_CHECK_VALUE(c.reduce == Reduction::sum || pair == "identity", "pair: reduce='logsumexp' goes with 'identity' only, got '", pair, "'");
  const bool own = own_constants >= 0;
  const int needed = own ? own_constants : pair_entries[c.pair].constants, most = own ? needed : 2;
  FASTCL_CHECK_VALUE(int(constants) >= needed && int(constants) <= most, "constants: '", pair, "' needs ", int64_t(needed), ", got ", int64_t(constants));
  return c;
}

Outer outer_of(std::string_view name, Reduction reduce, bool has_positive) {
  const Outer outer = chosen<Outer>("outer", name, {{"sum", Outer::sum}, {"contrast", Outer::contrast}, {"pooled", Outer::pooled}});
  FASTCL_CHECK_VALUE(reduce == Reduction::logsumexp || outer == Outer::sum, "outer: 'contrast' and 'pooled' go with reduce='logsumexp' only");
  FASTCL_CHECK_VALUE(has_positive == (outer == Outer::contrast), "positive: expected a vector exactly for outer='contrast'");
  return outer;
}

}  // namespace fastcl
