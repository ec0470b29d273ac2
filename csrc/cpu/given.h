// The op's arguments: its tensors, and what is checked of them.
#pragma once

#include "own_pairs.h"
#include "../tensors.h"

namespace fastcl::cpu {

struct Given {
  Tensor x;
  OptionalTensor y;
  Tensor scale, shift;
  OptionalTensor bias_x, bias_y, group_x, group_y, limit_x, limit_y, guide_x, guide_y;
  int64_t row_offset, col_offset, period;
  std::string mask, operand, pair;
  std::vector<double> constants;
  std::string reduce;
  bool columns;
  const OwnPair* own;  // null where the pair function is one of fastcl's

  explicit Given(Stack& stack);  // PROBLEM of fastcl/equation/problem.py
  // A sum of all z_ij, and whatever else the caller makes of it.
  Given(Tensor x, OptionalTensor y, Tensor scale, Tensor shift);
  bool in_double() const { return x.kind() == ScalarKind::float64; }
  // Raises for what no kernel may be given.
  Choices check() const;
  void check(const Wanted& wanted) const;

 private:
  void check_tensors() const;
  void check_guides() const;
};

}  // namespace fastcl::cpu
