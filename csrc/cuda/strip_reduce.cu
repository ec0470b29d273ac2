// The reductions of one tile of dot products, and what joins the partial results: rows and columns from one read of the tile.
#include "strip.cuh"

namespace fastcl::cuda {
namespace {

// The dot products of a warp's rows turned into z, one row after the other: body(r, z, visited), a bit for each visited pair.
template <bool all, int unrolled, class T, class Body>
__device__ __forceinline__ void each_row(const Tile& t, const Place& p, const Columns<T>& cols, const Logits<T>& logits,
                                         Body body) {
  const T* from = static_cast<const T*>(t.dot) + (p.row - t.i0) * t.pitch + (p.col - t.j0);
#pragma unroll(unrolled)
  for (int r = 0; r < warp_rows; r++, from += t.pitch) {
    const int64_t i = p.row + r;
    const bool present = all || i < t.i1;
    T z[lane_cols];
    load_four<all>(from, present ? p.inside : 0, z);
    unsigned visited = (1u << lane_cols) - 1u;
    if (!all) visited = present ? logits.visits(i, p, cols.group) : 0;
    if (present) logits.of_row(i, cols, z);
    body(r, z, visited);
  }
}

template <class T, class Pair>
__global__ __launch_bounds__(threads) void reduce_sum(const StripReduce args) {
  __shared__ T shared[warps * strip_block_cols];
  const Place p(args.tile);
  const T k[2] = {T(args.equation.constants[0]), T(args.equation.constants[1])};
  const Columns<T> cols(args.equation, p);
  const Logits<T> logits(args.equation);
  RowSums<T> rows;
  T col[lane_cols] = {};
  const auto add = [&](int r, const T (&z)[lane_cols], unsigned visited) {
    T row = T(0);
#pragma unroll
    for (int c = 0; c < lane_cols; c++) {
      const T value = visited >> c & 1u ? value_of<Pair>(z[c], k) : T(0);
      row += value;
      col[c] += value;
    }
    rows.set(r, row, p.lane);
  };
  if (visits_all(args.equation, args.tile)) each_row<true, unrolled_rows<T>>(args.tile, p, cols, logits, add);
  else each_row<false, unrolled_rows<T>>(args.tile, p, cols, logits, add);
  const Partial<T> out(args, p);
  const T of_row = rows.of_lane(p.lane);
  if (out.stores_row(p.lane)) *out.row = of_row;
  if (args.col_parts != nullptr) {
    const T of_col = over_warps<Sum>(col, shared, p.warp, p.lane);
    if (out.has_col) *out.col = of_col;
  }
}

// One exponential an element, relative to the block's maximum. Where a row or a column lies so far under it that this would
// underflow (or nothing of it is visited), the block is done again with a maximum for each.
template <class T>
__global__ __launch_bounds__(threads) void reduce_logsumexp(const StripReduce args) {
  __shared__ T shared[warps * strip_block_cols];
  __shared__ T tops[strip_block_cols];
  const Place p(args.tile);
  const bool columns = args.col_parts != nullptr;
  const Columns<T> cols(args.equation, p);
  const Logits<T> logits(args.equation);
  T z[warp_rows][lane_cols];
  T top = -infinity<T>();
  const auto keep = [&](int r, const T (&row)[lane_cols], unsigned visited) {
#pragma unroll
    for (int c = 0; c < lane_cols; c++) {
      z[r][c] = visited >> c & 1u ? row[c] : -infinity<T>();
      top = highest(top, z[r][c]);
    }
  };
  if (visits_all(args.equation, args.tile)) each_row<true, warp_rows>(args.tile, p, cols, logits, keep);
  else each_row<false, warp_rows>(args.tile, p, cols, logits, keep);
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

// The partial results of one row or column, one after the other: the same bits in any schedule.
template <class T>
__global__ __launch_bounds__(128) void merge_parts(const MergeParts args) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= args.size) return;
  const T* part = static_cast<const T*>(args.parts) + index;
  T* sum = static_cast<T*>(args.sum) + index;
  if (args.top == nullptr) {
    double total = *sum;
    for (int64_t k = 0; k < args.count; k++) total += args.factor * double(part[k * args.size]);
    *sum = T(total);
    return;
  }
  T* tops = static_cast<T*>(args.top) + index;
  T top = *tops, total = *sum;
  const int64_t plane = args.count * args.size;
  for (int64_t k = 0; k < args.count; k++) {
    const T other = part[k * args.size], higher = highest(top, other), reference = reference_of(higher);
    total = total * exponential(top - reference) + part[plane + k * args.size] * exponential(other - reference);
    top = higher;
  }
  *tops = top;
  *sum = total;
}

template <class T>
int reduce(const StripReduce& args, cudaStream_t stream) {
  const dim3 grid = blocks_of(args.tile);
  if (args.equation.reduce == Reduction::logsumexp) {
    reduce_logsumexp<T><<<grid, threads, 0, stream>>>(args);
    return cudaGetLastError();
  }
  return with_pair(args.equation.pair, [&](auto pair) -> int {
    reduce_sum<T, decltype(pair)><<<grid, threads, 0, stream>>>(args);
    return cudaGetLastError();
  });
}

}  // namespace
}  // namespace fastcl::cuda

using namespace fastcl::cuda;

extern "C" {

int fastcl_cuda_strip_reduce(const StripReduce* args, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return args->tile.dtype == Dtype::float64 ? reduce<double>(*args, on) : reduce<float>(*args, on);
}

int fastcl_cuda_merge_parts(const MergeParts* args, void* stream) {
  const unsigned blocks = unsigned((args->size + 127) / 128);
  if (args->dtype == Dtype::float64) merge_parts<double><<<blocks, 128, 0, static_cast<cudaStream_t>(stream)>>>(*args);
  else merge_parts<float><<<blocks, 128, 0, static_cast<cudaStream_t>(stream)>>>(*args);
  return cudaGetLastError();
}

int fastcl_cuda_use_device(int device) { return cudaSetDevice(device); }

const char* fastcl_cuda_error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // extern "C"
