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

Choices choices_of(std::string_view mask, std::string_view operand, std::string_view pair, std::string_view reduce) {
  return {chosen<Operand>("operand", operand, {{"dot", Operand::dot}, {"sqdist", Operand::sqdist}}),
          chosen<MaskKind>("mask", mask, {{"all", MaskKind::all},
                                          {"off_diagonal", MaskKind::off_diagonal},
                                          {"across_groups", MaskKind::across_groups},
                                          {"within_groups", MaskKind::within_groups}}),
          chosen<Reduction>("reduce", reduce, {{"sum", Reduction::sum}, {"logsumexp", Reduction::logsumexp}}), pair_index(pair)};
}

Outer outer_of(std::string_view name, Reduction reduce, bool has_positive) {
  const Outer outer = chosen<Outer>("outer", name, {{"sum", Outer::sum}, {"contrast", Outer::contrast}, {"pooled", Outer::pooled}});
  FASTCL_CHECK_VALUE(reduce == Reduction::logsumexp || outer == Outer::sum, "outer: 'contrast' and 'pooled' go with reduce='logsumexp' only");
  FASTCL_CHECK_VALUE(has_positive == (outer == Outer::contrast), "positive: expected a vector exactly for outer='contrast'");
  return outer;
}

}  // namespace fastcl
