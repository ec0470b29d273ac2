// The partial results that a block of the strip's reductions leaves, and how its z become those of a log-sum-exp.
#pragma once

#include "strip.cuh"

namespace fastcl::cuda {

// Writes this block's row (one for each group of four lanes) and column results to its rows of the partial results.
template <class T>
struct Partial {
  T *row, *col;
  int64_t rows, cols;
  bool has_row, has_col;

  __device__ __forceinline__ Partial(const StripReduce& args, const Place& p) {
    const Tile& t = args.tile;
    rows = t.i1 - t.i0, cols = t.j1 - t.j0;
    const int64_t i = int64_t(blockIdx.x) * strip_block_rows + p.warp * warp_rows + p.lane / 4;
    const int64_t j = int64_t(blockIdx.y) * strip_block_cols + threadIdx.x;
    row = static_cast<T*>(args.row_parts) + blockIdx.y * rows + i;
    col = static_cast<T*>(args.col_parts) + blockIdx.x * cols + j;
    has_row = i < rows;
    has_col = args.col_parts != nullptr && threadIdx.x < strip_block_cols && j < cols;
  }
  __device__ __forceinline__ bool stores_row(int lane) const { return has_row && lane % 4 == 0; }
  __device__ __forceinline__ int64_t row_plane() const { return gridDim.y * rows; }
  __device__ __forceinline__ int64_t col_plane() const { return gridDim.x * cols; }
};

// One exponential an element, relative to the block's maximum. Where a row or a column lies so far under it that this would
// underflow (or nothing of it is visited), the block is done again with a maximum for each.
// z: -inf where a pair is not visited; top: the largest of this thread's.
template <class T>
__device__ __forceinline__ void logsumexp_of_block(const StripReduce& args, const Place& p, bool columns, const T (&z)[warp_rows][lane_cols],
                                                   T top, T* shared, T* tops) {
  top = over_warp<Maximum>(top);
  if (p.lane == 0) tops[p.warp] = top;
  __syncthreads();
  T peak = tops[0];
#pragma unroll
  for (int w = 1; w < warps; w++) peak = highest(peak, tops[w]);
  const T reference = reference_of(peak);

  T row[warp_rows], col[lane_cols] = {};
#pragma unroll
  for (int r = 0; r < warp_rows; r++) {
    row[r] = T(0);
#pragma unroll
    for (int c = 0; c < lane_cols; c++) {
      const T e = exponential(z[r][c] - reference);
      row[r] += e;
      col[c] += e;
    }
  }
  const Partial<T> out(args, p);
  T row_sum = over_lanes<Sum>(row, p.lane), row_top = reference;
  T col_sum = columns ? over_warps<Sum>(col, shared, p.warp, p.lane) : T(0), col_top = reference;
  const bool faint = (out.has_row && row_sum < Limits<T>::faint) || (out.has_col && col_sum < Limits<T>::faint);
  if (__syncthreads_or(faint || peak == infinity<T>())) {
#pragma unroll
    for (int r = 0; r < warp_rows; r++) {
      row[r] = -infinity<T>();
#pragma unroll
      for (int c = 0; c < lane_cols; c++) row[r] = highest(row[r], z[r][c]);
    }
    row_top = over_lanes<Maximum>(row, p.lane);
#pragma unroll
    for (int r = 0; r < warp_rows; r++) {
      const T own = reference_of(__shfl_sync(0xffffffffu, row_top, 4 * r));
      row[r] = T(0);
#pragma unroll
      for (int c = 0; c < lane_cols; c++) row[r] += exponential(z[r][c] - own);
    }
    row_sum = over_lanes<Sum>(row, p.lane);
    row_top = row_top == infinity<T>() ? T(0) : row_top;
    if (columns) {
#pragma unroll
      for (int c = 0; c < lane_cols; c++) {
        col[c] = -infinity<T>();
#pragma unroll
        for (int r = 0; r < warp_rows; r++) col[c] = highest(col[c], z[r][c]);
      }
      col_top = over_warps<Maximum>(col, shared, p.warp, p.lane);
      if (threadIdx.x < strip_block_cols) tops[threadIdx.x] = col_top;
      __syncthreads();
#pragma unroll
      for (int c = 0; c < lane_cols; c++) {
        const T own = reference_of(tops[lane_cols * p.lane + c]);
        col[c] = T(0);
#pragma unroll
        for (int r = 0; r < warp_rows; r++) col[c] += exponential(z[r][c] - own);
      }
      col_sum = over_warps<Sum>(col, shared, p.warp, p.lane);
      col_top = col_top == infinity<T>() ? T(0) : col_top;
    }
  }
  if (out.stores_row(p.lane)) out.row[0] = row_top, out.row[out.row_plane()] = row_sum;
  if (out.has_col) out.col[0] = col_top, out.col[out.col_plane()] = col_sum;
}

}  // namespace fastcl::cuda
