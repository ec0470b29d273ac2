// The launches of the CUDA kernels as plain C: no torch header and no CUDA header, so that they link into an extension for
// any torch, and run in tests on a machine without a GPU.
//
// Every launch is `int fastcl_cuda_<name>(const <Struct>*, void* stream)`: it returns a cudaError_t (0 is success), never
// waits for the device, and takes pointers to device memory unless told otherwise. "T" is the accumulation dtype: float64
// for float64 rows, float32 for all others. A null pointer is an absent vector. Sizes, strides and offsets are in elements.
#pragma once

#include <cstdint>

#include "../pair_reduce.h"

namespace fastcl::cuda {

enum class Dtype : int32_t { float32, float64, bfloat16, float16 };

// What z_ij, M and f are. Vectors are indexed by the row of x or y itself, not by a row of a tile.
struct Equation {
  Operand operand;
  MaskKind mask;
  Reduction reduce;
  int32_t pair;                        // place in pair_entries; for a log-sum-exp that of the identity
  double constants[2];                 // of the pair function
  // off_diagonal leaves out j = i + diff, and where the period is not 0 j = i + diff +- period. The diagonals of a period lie so far
  // apart that one at most meets a block of a kernel's, diff is that of one that meets the pairs, and the strip's kernels know none.
  int64_t diff, period;
  const void *scale, *shift;           // T, one element each: never read on the host
  const void *norm_x, *norm_y;         // T, |x_i|^2 and |y_j|^2; sqdist only
  const void *bias_x, *bias_y;         // T
  const int64_t *group_x, *group_y;    // for the two masks of groups
};

// What turns z into weights: w_ij = f'(z_ij) (g_i + h_j), or g_i e^(z_ij - r_i) + h_j e^(z_ij - c_j) for a log-sum-exp.
// For a log-sum-exp with g and h, `reference` holds (rho, close): where close is not 0, every r and c lies within 28 of rho,
// and one exponential serves both terms.
struct Weighting {
  const void *g, *h, *r, *c;           // T; g or h may be absent, r goes with g and c with h
  const void* reference;               // T, two elements; null: two exponentials
};

// Rows [i0, i1) of x against columns [j0, j1), their dot products row after row, `pitch` elements apart, 16-byte aligned.
struct Tile {
  int64_t i0, i1, j0, j1;
  void* dot;
  int64_t pitch;
  Dtype dtype;                         // T, of the dot products
};

// The reductions of one tile. Partial results: row_parts[plane][block of columns][row - i0] and
// col_parts[plane][block of rows][column - j0], planes (top, sum) for a log-sum-exp, one plane for a sum.
struct StripReduce {
  Equation equation;
  Tile tile;
  void* row_parts;
  void* col_parts;
};

// The tile's weights, and where asked W 1, W^T 1 and the row sums of f as partial results of one plane.
struct StripWeights {
  Equation equation;
  Tile tile;
  Weighting weighting;
  void* weights;                       // with the tile's pitch; may be the dot products themselves where the dtypes agree
  Dtype weights_dtype;
  void *row_sums, *col_sums, *values;
};

// The same where limits leave pairs out: those above their row's or their column's, of z, or of the product of guides that lies in
// `guided` as z's dot product does in the tile.
struct AtMost {
  const void *limit_x, *limit_y;       // T; absent: none
  const void* guided;                  // T; null: limits of z
};
struct StripReduceLimited {
  StripReduce strip;
  AtMost at_most;
};
struct StripWeightsLimited {
  StripWeights strip;                  // its weighting's reference is not read
  AtMost at_most;
};

// parts[plane][0, count)[0, size) joined into top and sum, in order; sum += factor * parts where top is null.
struct MergeParts {
  const void* parts;
  int64_t count, size;
  void *top, *sum;                     // T
  double factor;
  Dtype dtype;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows and columns of a block of the strip kernels: the partial results of a tile are its ceilings by these.
inline constexpr int64_t strip_block_rows = 64, strip_block_cols = 128;

// X(name, Struct) for every launch here; fused.h has its own list.
#define FASTCL_FOR_EACH_STRIP_LAUNCH(X)         \
  X(strip_reduce, StripReduce)                  \
  X(strip_weights, StripWeights)                \
  X(strip_reduce_limited, StripReduceLimited)   \
  X(strip_weights_limited, StripWeightsLimited) \
  X(merge_parts, MergeParts)

}  // namespace fastcl::cuda

extern "C" {
#define FASTCL_DECLARE_LAUNCH(name, Struct) int fastcl_cuda_##name(const fastcl::cuda::Struct*, void* stream);
FASTCL_FOR_EACH_STRIP_LAUNCH(FASTCL_DECLARE_LAUNCH)
int fastcl_cuda_use_device(int device);  // from now on this thread's, for the CUDA runtime that is linked here
const char* fastcl_cuda_error_string(int error);
}
