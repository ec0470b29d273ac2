// The operands u(x_i, y_j): closed, a few lines each. Every kernel forms the dot product; what u makes of it is here.
#pragma once

#include "pair_reduce.h"

namespace fastcl {

// u = <x, y>
struct Dot {
  static constexpr Operand kind = Operand::dot;
  template <class T>
  static FASTCL_INLINE T of(T product, T, T) {
    return product;
  }
};

// u = |x - y|^2 = |x|^2 + |y|^2 - 2 <x, y>, after a common centre was subtracted; rounding may not make it negative.
struct Sqdist {
  static constexpr Operand kind = Operand::sqdist;
  template <class T>
  static FASTCL_INLINE T of(T product, T norm_x, T norm_y) {
    return intrinsics::maximum((norm_x + norm_y) - T(2) * product, T(0));
  }
};

}  // namespace fastcl
