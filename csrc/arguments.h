// The op's flat arguments (fastcl/ops.py has the schema), as both compiled backends take them and check them.
// ATen only: no CUDA header, and nothing here reads a tensor's values.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <string_view>

#include "pair_reduce.h"

// The parameters of an op's implementation, and the Arguments made of them.
#define FASTCL_PROBLEM                                                                                                    \
  const at::Tensor &x, const std::optional<at::Tensor>&y, const at::Tensor &scale, const at::Tensor &shift,               \
      const std::optional<at::Tensor>&bias_x, const std::optional<at::Tensor>&bias_y,                                     \
      const std::optional<at::Tensor>&group_x, const std::optional<at::Tensor>&group_y, int64_t row_offset,               \
      int64_t col_offset, int64_t period, c10::string_view mask, c10::string_view operand, c10::string_view pair,         \
      at::ArrayRef<double> constants, c10::string_view reduce, bool columns
#define FASTCL_ARGUMENTS                                                                                              \
  ::fastcl::Arguments {                                                                                               \
    x, y, scale, shift, bias_x, bias_y, group_x, group_y, row_offset, col_offset, period, mask, operand, pair, constants, \
        reduce, columns                                                                                               \
  }

namespace fastcl {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What the names stand for.
struct Choices {
  Operand operand;
  MaskKind mask;
  Reduction reduce;
  int pair;  // place in pair_entries
};

struct Arguments {
  const Tensor& x;
  const OptionalTensor& y;
  const Tensor &scale, &shift;
  const OptionalTensor &bias_x, &bias_y, &group_x, &group_y;
  int64_t row_offset, col_offset, period;
  std::string_view mask, operand, pair;
  at::ArrayRef<double> constants;
  std::string_view reduce;
  bool columns;

  bool in_double() const { return x.scalar_type() == at::kDouble; }
  // The dtype of r, c and everything scalar.
  at::ScalarType accumulation() const { return in_double() ? at::kDouble : at::kFloat; }
  int64_t n() const { return x.size(0); }
  int64_t m() const { return y ? y->size(0) : x.size(0); }

  // Raises for what no kernel may be given, before any memory is touched.
  Choices check() const;

 private:
  void check_tensors() const;
};

// Which of the six gradients to form.
struct Wanted {
  bool x, y, scale, shift, bias_x, bias_y;
  explicit Wanted(const std::array<bool, 6>& w) : x(w[0]), y(w[1]), scale(w[2]), shift(w[3]), bias_x(w[4]), bias_y(w[5]) {}
  bool any() const { return x || y || scale || shift || bias_x || bias_y; }
};

// The outer function of a total form, checked against what it goes with.
Outer outer_of(std::string_view name, Reduction reduce, bool has_positive);

}  // namespace fastcl
