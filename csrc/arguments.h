// What the ops' arguments are checked by, before memory is touched. No tensor and no torch header; tensors.h describes tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "pair_reduce.h"

namespace fastcl {

// The dtypes that an argument may have.
enum class ScalarKind { float32, float64, bfloat16, float16, int64, int32, other };

inline bool is_floating(ScalarKind kind) { return kind <= ScalarKind::float16; }

// What a check needs to know of a tensor.
struct Described {
  int64_t dim = 0;
  const int64_t* sizes = nullptr;
  ScalarKind kind = ScalarKind::other;
  const char* dtype = "";     // its name, for messages
  int device_type = 0, device_index = 0;
  const char* device = "";
};

// What the names stand for.
struct Choices {
  Operand operand;
  MaskKind mask;
  Reduction reduce;
  int pair;  // place in pair_entries; 0 where it is not of them
};

Choices choices_of(std::string_view mask, std::string_view operand, std::string_view pair, std::string_view reduce);

// Which of the six gradients to form.
struct Wanted {
  bool x, y, scale, shift, bias_x, bias_y;
  template <class Six>
  explicit Wanted(const Six& w) : x(w[0]), y(w[1]), scale(w[2]), shift(w[3]), bias_x(w[4]), bias_y(w[5]) {}
  bool any() const { return x || y || scale || shift || bias_x || bias_y; }
};

// The outer function of a total form, checked against what it goes with.
Outer outer_of(std::string_view name, Reduction reduce, bool has_positive);

void check_device(std::string_view name, const Described& t, const Described& x);

// ValueError and TypeError, in the way of the library that links this.
[[noreturn]] void refuse_value(const std::string& message);
[[noreturn]] void refuse_type(const std::string& message);

// Words and numbers, one after the other.
inline void append(std::string& text, std::string_view word) { text += word; }
inline void append(std::string& text, int64_t number) { text += std::to_string(number); }
void append(std::string& text, const Described& t);  // its shape
template <class... Parts>
std::string text_of(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  return text;
}

#define FASTCL_CHECK_VALUE(condition, ...) \
  if (!(condition)) ::fastcl::refuse_value(::fastcl::text_of(__VA_ARGS__))
#define FASTCL_CHECK_TYPE(condition, ...) \
  if (!(condition)) ::fastcl::refuse_type(::fastcl::text_of(__VA_ARGS__))

}  // namespace fastcl
