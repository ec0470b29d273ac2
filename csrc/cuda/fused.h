// The launches of the fused kernels: dot products, pair function and reductions in one sweep over tiles of 128 rows that
// stay in registers and shared memory, nothing of size n x m in memory. Same rules as launch.h.
//
//     fused_rows      row and column reductions of every pair of row blocks      1 product of 2 n m d flops
//     fused_merge     their partial results, joined in one order
//     fused_factors   g, h, r, c as the gradient multiplies them
//     fused_gradient  W Y, and where asked W 1 and the row sums of f             2 products
//
// W^T X is fused_gradient with the sides exchanged, so that rows and columns take 5 products, and the same bits every run.
#pragma once

#include "launch.h"

namespace fastcl::cuda {

// x (n, d) and y (m, d) as the tensor cores take them: rows and their strides are multiples of 16 bytes, d too (padded with
// zeros), and float32 rows hold what tf32 can hold. Any size below 2^31 - 128.
struct FusedSides {
  const void *x, *y;
  int64_t x_stride, y_stride, n, m, d;
  Dtype dtype;  // bfloat16, float16, or float32 for tf32
};

// Partial results are pairs (top, sum) of floats, tops in units of log 2, for a log-sum-exp; else single floats.
struct FusedRows {
  Equation equation;
  FusedSides sides;
  int64_t ctas;      // each takes every ctas-th block of 128 rows; at most as many as there are blocks
  int64_t splits;    // of the column tiles, at most as many as there are
  void* row_parts;   // [splits][n]
  void* col_parts;   // [ctas][m]; null: columns are not wanted
  int32_t triangle;  // y is x: tiles below the diagonal are those above it, transposed, and are not visited
  int32_t resident;  // x's rows stay in shared memory for a whole sweep
  int32_t stages;    // 2 to 4 chunks of 128 bytes a row in flight
};

struct FusedMerge {
  const void *row_parts, *col_parts;  // either may be absent; both are joined in the triangle
  int64_t splits, ctas, size;
  int32_t triangle;
  int32_t logsumexp;
  void* out;  // float32 (size,)
};

// Pairs (factor, reference), one for each row of either side, padded to a multiple of 128. A log-sum-exp has
//     w_ij = (factor_i + factor_j) 2^(z - reference_i - reference_j)                        one exponential, or
//     w_ij = factor_i 2^(z - reference_i) + factor_j 2^(z - reference_j)                     two
// with z in units of log 2; which, says `single`, one int32 on the device: one for g or h alone, and for both as the weighting's
// reference has it; two where a normaliser is large (fused_large).
struct FusedFactors {
  Weighting weighting;
  int64_t n, m;
  int32_t logsumexp;
  void *x_factors, *y_factors, *single;  // single: 1 before
};

struct FusedGradient {
  Equation equation;
  FusedSides sides;
  const void *x_factors, *y_factors, *single;
  void* wy;  // float32 (n, d), every row d long: W Y without the scale
  void* w_rows;  // float32 (n,), W 1 from the weights as they were rounded for the product; null: not wanted
  void* values;  // float32 (n,), the sums of f over each row, of a sum alone; null: not wanted
};

// Rounds float32 rows to tf32 (to nearest, ties away) and pads rows of any type with zeros.
struct FusedPack {
  const void* from;
  int64_t from_stride, rows, d;
  void* to;  // (rows, to_d), contiguous
  int64_t to_d;
  Dtype dtype;
};

#define FASTCL_FOR_EACH_FUSED_LAUNCH(X) \
  X(fused_rows, FusedRows)              \
  X(fused_merge, FusedMerge)            \
  X(fused_factors, FusedFactors)        \
  X(fused_gradient, FusedGradient)      \
  X(fused_pack, FusedPack)

inline constexpr int64_t fused_tile = 128;   // rows of a block, columns of a tile
inline int64_t padded(int64_t rows) { return ceil_div(rows, fused_tile) * fused_tile; }
inline constexpr int64_t fused_least_period = 2 * fused_tile;  // of a mask's diagonals, of which a block then meets one at most
// From here on a normaliser, or a shift in units of log 2, is so large that the roundings of z - r show in a weight: it is then
// held at g or h, which no weight passes (fused_weights.cuh).
inline constexpr float fused_large = 2048.f;
inline constexpr int64_t fused_chunk = 128;  // bytes of a row that are loaded at a time
inline constexpr int64_t fused_line = 16;    // bytes of what a row brings to its elements besides the dot product

inline int64_t fused_chunks(Dtype dtype, int64_t d) { return ceil_div(d * (dtype == Dtype::float32 ? 4 : 2), fused_chunk); }

// Shared memory of fused_rows: the stages, x's rows where they stay, lines, and where warps join their partial results.
inline int64_t fused_rows_shared(Dtype dtype, int64_t d, bool resident, int64_t stages, bool logsumexp) {
  const int64_t side = fused_tile * fused_chunk, part = logsumexp ? 8 : 4;
  const int64_t ring = stages * (resident ? side : 2 * side), kept = resident ? fused_chunks(dtype, d) * side : 0;
  return ring + kept + 2 * fused_tile * fused_line + (2 + 4) * fused_tile * part;
}

// The widest rows whose W Y fits the registers of one CTA; wider ones are the strip form's.
inline int64_t fused_gradient_most(Dtype dtype) { return dtype == Dtype::float32 ? 128 : 256; }

// The widest whose sums of f fit beside it.
inline constexpr int64_t fused_values_most = 128;

// Shared memory of fused_gradient for that d: x's rows, two stages of y's with their factors, weights, and lines.
inline int64_t fused_gradient_shared(Dtype dtype, int64_t d) {
  const bool wide = dtype == Dtype::float32;
  const int64_t chunks = wide || d > 128 ? 4 : 2, cols = wide ? 32 : 64, side = fused_tile * fused_chunk;
  return chunks * side + 2 * cols * (chunks * fused_chunk + 8) + (wide ? 0 : side) + (fused_tile + cols) * fused_line;
}

}  // namespace fastcl::cuda

extern "C" {
FASTCL_FOR_EACH_FUSED_LAUNCH(FASTCL_DECLARE_LAUNCH)
}
