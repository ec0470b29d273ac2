// The launches around the fused sweeps that make a whole loss of two aligned views, for batches whose time is the host's: what
// comes before the pairs, what becomes of their reductions, and the gradients of rows as they were given. Rules as in launch.h.
//
//     z_ij = a u(x_i, y_j) + b                 of rows of unit length, or of rows as they are; pairs (i, i) are positives alone
//     contrast    L = w sum_i softplus(r_i - z_ii)        with columns, half of this and half of the same of the columns
//     sum         L = w sum_i r_i + sum_i [ w' h(p' z_ii + q') + l z_ii ] + k
//
//     aligned_rows        rows as the sweeps take them, their norms, u(x_i, y_i), the numbers of the sweep
//     aligned_finish      r and c from their parts, L, d L / d z_ii, the factors of the gradient sweeps
//     aligned_gradients   dx, dy and the gradients of a and b, from W Y, W^T X and W 1
#pragma once

#include "fused.h"

namespace fastcl::cuda {

// Numbers on the device, in one line of memory: every sweep reads its scale and its shift there.
struct AlignedNumbers {
  float scale, shift;              // a and b
  float swept_scale, swept_shift;  // p a and p b + q, of the pairs
  float unit;                      // of the weights
  int32_t single[2];               // of FusedFactors, for rows and for the others
  uint32_t finished;               // how many blocks of aligned_gradients are done: 0 between launches
};

// A matrix as it was given, of any strides.
struct AlignedView {
  const void* rows;
  int64_t stride, step, count;
};

struct AlignedRows {
  AlignedView x, y;
  int64_t d, width;  // of rows as they are given, and as they are written: padded with zeros
  Dtype dtype;
  int32_t normalize, squared;
  const void *scale, *shift;  // float32, one element each; null: the numbers
  double scale_number, shift_number, slope, offset;  // p and q
  AlignedNumbers* numbers;
  void *u, *v;                // of x and of y, in their dtype; float32 ones as tf32 holds them
  float *norm_u, *norm_v;     // their squared norms; null: not wanted
  float* matching;            // u(x_i, y_i)
  int64_t *group_u, *group_v; // i for row i of either side; null: not wanted
};

// A reduction from its parts (`out` is not written), and where (factor, reference) of its rows go: padded(size) pairs, of which
// those from size on are zeros.
struct AlignedReduction {
  FusedMerge parts;
  float* factors;  // null: no gradient is wanted
};

// w h(p z + q)
struct AlignedTerm {
  int32_t pair;
  double weight, slope, offset, constants[2];
};

struct AlignedFinish {
  AlignedReduction rows, others;  // others: columns, or the rows of y with itself, whose parts.size is 0 where there are none
  int64_t n, views;               // of either view; rows of the loss there are for each pair
  int32_t contrast, columns;
  int32_t symmetric;              // x with itself: a row is a column too
  int64_t empty_others;           // without others: how many factors of columns are to be zeros
  int32_t half;                   // float16 weights, which have a unit
  double weight, linear, constant;  // w, l, k
  AlignedTerm positives;
  AlignedNumbers* numbers;
  const float* matching;
  float* of_matching;             // d L / d z_ii; null: no gradient is wanted
  float* value;
};

// One side of the gradients. Rows [0, count) have sums of the sweep; null where there was none.
struct AlignedSide {
  AlignedView given;              // rows of what was normalised; null: they were not
  const void* unit;               // rows of width, as they were swept
  const float *norm, *sums, *ones;  // squared norms; W Y; W 1
  void* gradient;                 // (count, d), in the rows' dtype; null: not wanted
  float of_dot, of_norm, of_ones; // what <u_i, (W Y)_i> and (W 1)_i |u_i|^2 count for d a, and (W 1)_i for d b
};

struct AlignedGradients {
  AlignedSide x, y;
  int64_t n;                      // pairs that match
  int64_t d, width;
  Dtype dtype;
  int32_t normalize, squared;
  AlignedNumbers* numbers;
  const float *matching, *of_matching, *upstream;
  double slope;                   // p
  float* parts;                   // two for each block; null: no number's gradient is wanted
  float *of_scale, *of_shift;
};

#define FASTCL_FOR_EACH_ALIGNED_LAUNCH(X) \
  X(aligned_rows, AlignedRows)            \
  X(aligned_finish, AlignedFinish)        \
  X(aligned_gradients, AlignedGradients)

inline constexpr int64_t aligned_threads = 256;  // of aligned_rows and aligned_gradients: a warp for each row
inline constexpr int64_t aligned_rows_of_block = aligned_threads / 32;
inline constexpr int64_t aligned_finish_threads = 1024;

inline int64_t aligned_gradient_blocks(int64_t x_rows, int64_t y_rows) { return ceil_div(x_rows + y_rows, aligned_rows_of_block); }

}  // namespace fastcl::cuda

extern "C" {
FASTCL_FOR_EACH_ALIGNED_LAUNCH(FASTCL_DECLARE_LAUNCH)
}
