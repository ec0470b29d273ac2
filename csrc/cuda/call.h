// One call of an op of launches.cpp: its arguments, taken in order, and what a kernel must not read or write refused.
#pragma once

#include <forward_list>

#include "on_device.h"

namespace fastcl::cuda {

enum class Presence { required, optional };
using enum Presence;

constexpr const char* name_of(ScalarKind kind) {
  switch (kind) {
    case ScalarKind::float64: return "float64";
    case ScalarKind::float32: return "float32";
    case ScalarKind::int64: return "int64";
    case ScalarKind::int32: return "int32";
    default: return "16 bits";
  }
}

inline int64_t bytes_of(const Tensor& t) { return t.kind() == ScalarKind::float64 ? 8 : t.kind() == ScalarKind::float32 ? 4 : 2; }

inline bool dense(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t k = t.dim(); k-- > 0; expected *= t.size(k))
    if (t.size(k) > 1 && t.stride(k) != expected) return false;
  return true;
}

class Call {
 public:
  explicit Call(StableIValue* stack) : stack_(stack) {}

  int64_t integer() { return stack_.integer(); }
  double number() { return stack_.number(); }
  bool boolean() { return stack_.boolean(); }

  // A tensor, kept until the launch; null where an optional one is absent.
  const Tensor* tensor(const char* name, Presence presence = required) {
    OptionalTensor given = presence == optional ? stack_.optional_tensor() : OptionalTensor(stack_.tensor());
    if (!given) return nullptr;
    const bool first = kept_.empty();
    const Tensor& t = kept_.emplace_front(std::move(*given));
    const Described d = t.describe();
    if (first) first_ = d;
    check_device(name, d, first_);
    return &t;
  }

  // `least` elements or more, one after the other.
  const void* in(const char* name, ScalarKind kind, int64_t least, Presence presence = required) {
    const Tensor* t = vector(name, kind, least, presence);
    return t ? t->data() : nullptr;
  }
  void* out(const char* name, ScalarKind kind, int64_t least, Presence presence = required) {
    const Tensor* t = vector(name, kind, least, presence);
    return t ? t->mutable_data() : nullptr;
  }

  // What z is; `covers` then holds its vectors to the rows and columns that are visited. least_period: of the kernel, if it knows any.
  Equation equation(int64_t least_period) {
    const Tensor& scale = *tensor("scale");
    kind_ = scale.kind();
    FASTCL_CHECK_VALUE((kind_ == ScalarKind::float32 || kind_ == ScalarKind::float64) && scale.count() == 1, "scale: expected one number of float32 or float64");
    Equation e{};
    e.scale = scale.data(), e.shift = in("shift", kind_, 1);
    const auto side = [&](const char* name, ScalarKind kind, int64_t& length) {
      const Tensor* t = vector(name, kind, 0, optional);
      if (t) length = std::min(length, t->count());
      return t ? t->data() : nullptr;
    };
    e.norm_x = side("norm_x", kind_, rows_), e.norm_y = side("norm_y", kind_, cols_);
    e.bias_x = side("bias_x", kind_, rows_), e.bias_y = side("bias_y", kind_, cols_);
    e.group_x = static_cast<const int64_t*>(side("group_x", ScalarKind::int64, rows_));
    e.group_y = static_cast<const int64_t*>(side("group_y", ScalarKind::int64, cols_));
    e.diff = integer(), e.period = integer();
    const std::string mask = stack_.text(), operand = stack_.text(), pair = stack_.text();
    e.constants[0] = number(), e.constants[1] = number();
    const Choices c = choices_of(mask, operand, pair, stack_.text());
    e.mask = c.mask, e.operand = c.operand, e.reduce = c.reduce, e.pair = c.pair;
    const bool one_meets = e.period == 0 || (least_period > 0 && e.period >= least_period);
    FASTCL_CHECK_VALUE(one_meets, "period: expected 0", least_period ? text_of(" or at least ", least_period, ", so that one diagonal at most meets a block") : ", diff telling the diagonal that meets the tile", ", got ", e.period);
    const bool groups = c.mask == MaskKind::across_groups || c.mask == MaskKind::within_groups;
    FASTCL_CHECK_VALUE(!groups || (e.group_x && e.group_y), "mask: '", mask, "' needs group_x and group_y");
    FASTCL_CHECK_VALUE(c.operand == Operand::dot || (e.norm_x && e.norm_y), "operand: 'sqdist' needs norm_x and norm_y");
    return e;
  }
  void covers(int64_t rows, int64_t cols) const {
    FASTCL_CHECK_VALUE(rows <= rows_ && cols <= cols_, "norms, biases, groups: expected ", rows, " for rows and ", cols, " for columns");
  }

  Weighting weighting(int64_t n, int64_t m, bool logsumexp) {
    Weighting w{};
    w.g = in("g", kind_, n, optional), w.h = in("h", kind_, m, optional);
    w.r = in("r", kind_, n, optional), w.c = in("c", kind_, m, optional);
    w.reference = in("reference", kind_, 2, optional);
    FASTCL_CHECK_VALUE(!logsumexp || ((!w.g || w.r) && (!w.h || w.c)), "r, c: expected with g and h for a log-sum-exp");
    return w;
  }

  Tile tile() {
    const Tensor& dot = *tensor("dot");
    const int64_t i0 = integer(), j0 = integer();
    check_matrix("dot", dot, kind_);
    FASTCL_CHECK_VALUE(i0 >= 0 && j0 >= 0, "i0, j0: expected none below 0");
    covers(i0 + dot.size(0), j0 + dot.size(1));
    return {i0, i0 + dot.size(0), j0, j0 + dot.size(1), dot.mutable_data(), dot.stride(0), dtype_of(dot)};
  }

  // The limits of a tile's rows and columns, and the products of guides that they are on.
  AtMost at_most(const Tile& t) {
    AtMost l{in("limit_x", kind_, t.i1, optional), in("limit_y", kind_, t.j1, optional), nullptr};
    FASTCL_CHECK_VALUE(l.limit_x || l.limit_y, "limit_x: expected limits of the rows, the columns or both, got none");
    if (const Tensor* guided = tensor("guided", optional)) {
      check_matrix("guided", *guided, kind_);
      FASTCL_CHECK_VALUE(guided->size(0) == t.i1 - t.i0 && guided->size(1) == t.j1 - t.j0 && guided->stride(0) == t.pitch, "guided: expected the layout of dot");
      l.guided = guided->data();
    }
    return l;
  }

  // Rows as 16-byte copies can read them.
  FusedSides sides() {
    const Tensor &x = *tensor("x"), &y = *tensor("y");
    for (const Tensor* t : {&x, &y}) {
      FASTCL_CHECK_VALUE(is_floating(t->kind()) && t->kind() != ScalarKind::float64 && t->kind() == x.kind(), "x, y: expected rows of one dtype, 16 bits or float32");
      check_matrix("x, y", *t, t->kind());
      FASTCL_CHECK_VALUE(t->size(1) == x.size(1) && t->size(1) * bytes_of(x) % 16 == 0, "x, y: expected rows of equal width, a multiple of 16 bytes");
    }
    return {x.data(), y.data(), x.stride(0), y.stride(0), x.size(0), y.size(0), x.size(1), dtype_of(x)};
  }

  // `least` elements or more, one after the other; or nothing.
  static const Tensor* check_vector(const char* name, const Tensor* t, ScalarKind kind, int64_t least) {
    if (t) FASTCL_CHECK_VALUE(t->kind() == kind && dense(*t) && t->count() >= least, name, ": expected ", least, " elements or more of ", name_of(kind), ", one after the other, got shape ", t->describe());
    return t;
  }
  // A matrix whose rows begin at multiples of 16 bytes.
  static void check_matrix(const char* name, const Tensor& t, ScalarKind kind) {
    FASTCL_CHECK_VALUE(t.dim() == 2 && t.kind() == kind, name, ": expected a matrix of ", name_of(kind));
    const bool aligned = t.stride(1) == 1 && t.stride(0) >= t.size(1) && t.stride(0) * bytes_of(t) % 16 == 0 && reinterpret_cast<uintptr_t>(t.data()) % 16 == 0;
    FASTCL_CHECK_VALUE(t.count() == 0 || aligned, name, ": expected rows that begin at multiples of 16 bytes");
  }

  ScalarKind kind() const { return kind_; }

  template <class Struct>
  void launch(int (*kernel)(const Struct*, void*), const Struct& arguments, const char* name) const {
    launch_on(first_.device_index, kernel, arguments, name);
  }

 private:
  const Tensor* vector(const char* name, ScalarKind kind, int64_t least, Presence presence) {
    return check_vector(name, tensor(name, presence), kind, least);
  }

  Stack stack_;
  std::forward_list<Tensor> kept_;  // a deque takes a function of libstdc++ 11 from newer compilers
  Described first_;
  ScalarKind kind_ = ScalarKind::float32;  // T, that of the equation
  int64_t rows_ = INT64_MAX, cols_ = INT64_MAX;
};

}  // namespace fastcl::cuda
