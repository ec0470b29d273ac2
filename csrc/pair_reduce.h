// The one equation, as every compiled backend sees it.
//
//     z_ij = a * u(x_i, y_j) + b + bx_i + by_j,   u = <x_i, y_j> or |x_i - y_j|^2
//     r_i  = REDUCE_{j in M(i)} f(z_ij)           c_j the column twin
//     w_ij = f'(z_ij) (g_i e_ij + h_j k_ij)       e = k = 1 for sum; exp(z_ij - r_i), exp(z_ij - c_j) for logsumexp
//
// and the gradients follow from four sums, which is all that a kernel computes:
//
//     W Y (n, d)   W^T X (m, d)   W 1 (n,)   W^T 1 (m,)
#pragma once

#include <cstdint>

#include "generated/pairs.h"

namespace fastcl {

enum class Operand { dot, sqdist };
enum class MaskKind { all, off_diagonal, across_groups, within_groups };
enum class Reduction { sum, logsumexp };
enum class Outer { sum, contrast, pooled };

// The pair functions, each with the number by which kernels know it: its place in the generated list.
struct PairEntry {
  const char* name;
  int constants;
};
#define FASTCL_ENTRY(name, type, constants) {name, constants},
inline constexpr PairEntry pair_entries[] = {FASTCL_FOR_EACH_PAIR(FASTCL_ENTRY)};
#undef FASTCL_ENTRY
inline constexpr int pair_count = sizeof(pair_entries) / sizeof(pair_entries[0]);

}  // namespace fastcl
