// The launches of the Hopper kernels: tiles of S = Y X^T by wgmma, x in shared memory, y streamed by the copy engine. Same rules
// as ../launch.h.
//
//     hopper_rows      row and column reductions                                    1 product of 2 n m d flops, half with x itself
//     hopper_merge     their partial results joined in order, and the guard's flag
//     hopper_careful   the same reductions with maxima, where the flag says so
//     hopper_weights   weights in the rows' dtype to a strip, with their sums       1 product
//     hopper_sweep     those of a plain log-sum-exp, and W Y                         2
//     hopper_product   W Y or W^T X from a strip, added in float32                   1
#pragma once

#include "../fused.h"

namespace fastcl::cuda {

// One sweep. x and y point to rows x0 and y0 of what the equation's vectors are indexed by. A log-sum-exp has one reference for
// all pairs, an integer, above which no z without the shift lies by more than 60 (base 2): nothing overflows, and what vanishes lies
// 186 below what Cauchy and Schwarz allow. A row or column whose sum came out under 2^-84 is doubtful. More than 60 would leave
// fewer digits behind the point of z - reference: half a unit in its last place is 2e-6 of a term up to 64, 4e-6 up to 128.
struct HopperTiles {
  Equation equation;
  FusedSides sides;        // of this launch: n and m are its own rows; below 2^29
  int64_t x0, y0;
  int64_t ctas, splits;    // along x, of y; at most as many as there are blocks of x
  int32_t triangle;        // y is x: tiles on one side of the diagonal are those on the other, transposed
  int32_t both;            // weights of a log-sum-exp: g and h are both there
  const void* reference;   // float: rows of a log-sum-exp (one element, base 2); its weights: Weighting::reference, or null
  void *row_parts, *col_parts;          // float [splits][n] and [ctas][m]: reductions, or W 1 and W^T 1; null: not wanted
  void* value_parts;                    // float [ctas][m]: column sums of f beside the weights of a sum; null: not wanted
  const void *x_factors, *y_factors, *single;  // of FusedFactors
  const void* unit;        // float, one element: weights are divided by it; null: 1
  void* peaks;             // float [8 * splits][ctas]: the largest |w|, and nothing is stored; float16 sums
  void* weights;           // (m, pitch) of the rows' dtype
  int64_t pitch;           // a multiple of 8
  void* wy;                // hopper_sweep: W Y is added to it, float (n, wy_columns), wy_columns at most d
  int64_t wy_columns;
};

struct HopperMerge {
  const void *row_parts, *col_parts;  // either may be absent; both are joined in the triangle
  int64_t splits, ctas, size;
  int64_t block;                      // rows of a block of x, for the triangle; 0 elsewhere
  int32_t logsumexp;
  const void *reference, *shift;      // of a log-sum-exp: it is put back here
  void* out;                          // float (size,)
  void* doubtful;                     // int32, one element, 0 before: set to 1 where a sum is too small
};

// out (rows, columns) += unit A Z: A is a strip of weights (m, n), or where `transposed` its transpose. With several splits of what
// is summed over, each writes its part instead.
struct HopperProduct {
  const void* weights;  // (m, pitch) of z's dtype
  int64_t m, n, pitch;
  int32_t transposed;
  Dtype dtype;
  const void* z;        // rows of d; both pitch and stride are multiples of 8
  int64_t z_stride, d;
  const void* unit;     // float, one element; null: 1
  int64_t splits;
  void* out;            // float (rows, columns), or (splits, rows, columns)
  int64_t columns;      // at most d
};

// fused_rows behind the flag, and its results in place of the doubtful ones.
struct HopperCareful {
  FusedRows rows;
  const void* doubtful;
};
struct HopperReplace {
  HopperMerge merge;
  FusedMerge careful;                 // its out is not used
};

#define FASTCL_FOR_EACH_HOPPER_LAUNCH(X) \
  X(hopper_rows, HopperTiles)            \
  X(hopper_weights, HopperTiles)         \
  X(hopper_sweep, HopperTiles)           \
  X(hopper_product, HopperProduct)       \
  X(hopper_merge, HopperMerge)           \
  X(hopper_careful, HopperCareful)       \
  X(hopper_replace, HopperReplace)

inline constexpr int64_t hopper_shared = 232448;  // bytes that one CTA may have
inline constexpr int64_t hopper_least_period = 320;  // of a mask's diagonals: 256 rows of x by 64 of y meet one at most

inline bool hopper_terms(const Equation& e) { return e.operand == Operand::sqdist || e.bias_x != nullptr || e.bias_y != nullptr; }
inline bool hopper_groups(const Equation& e) { return e.mask == MaskKind::across_groups || e.mask == MaskKind::within_groups; }

// A problem that is more than a log-sum-exp of scale * <x, y> + shift takes tiles of 128 rows, whose accumulators leave registers
// for it; `sums`: weights and their row or column sums.
inline bool hopper_general(const Equation& e, bool sums) { return e.reduce == Reduction::sum || sums || hopper_terms(e) || hopper_groups(e); }

// Rows of x that stay in shared memory, by d; 0: they do not fit, and x is streamed too.
inline int64_t hopper_resident(const Equation& e, int64_t d, bool weights, bool sums) {
  if (hopper_general(e, sums)) return d <= (weights && hopper_terms(e) && hopper_groups(e) ? 704 : 768) ? 128 : 0;
  if (weights) return d <= 256 ? 256 : d <= 768 ? 128 : 0;
  return d <= 384 ? 256 : d <= 512 ? 192 : d <= 768 ? 128 : 0;
}
// Whether two CTAs along x share y's chunks, where their number is even: with 128 rows of x a byte from the L2 cache is multiplied
// less often than the tensor cores take.
inline bool hopper_shares_y(int64_t resident, int64_t d) { return resident == 128 && d > 256; }
// Rows of x of a tile.
inline int64_t hopper_block(const Equation& e, int64_t d, bool weights, bool sums) {
  const int64_t resident = hopper_resident(e, d, weights, sums);
  return resident ? resident : hopper_general(e, sums) ? 128 : 256;
}

}  // namespace fastcl::cuda

extern "C" {
FASTCL_FOR_EACH_HOPPER_LAUNCH(FASTCL_DECLARE_LAUNCH)
}
