// The strip's kernels where limits leave pairs out: above its row's or its column's is z, or the product of guides at its place.
//
// Kernels of their own, so that those without limits hold none in registers. There is one for each dtype and reduction: tiles are
// read and written at the speed of memory, beside which a branch that all threads take to their pair function, and a second
// exponential, are small.
#include "strip.cuh"

namespace fastcl::cuda {
namespace {

struct Value {
  template <class Pair, class T>
  __device__ __forceinline__ static T of(T z, const T* k) { return value_of<Pair>(z, k); }
};
struct Slope {
  template <class Pair, class T>
  __device__ __forceinline__ static T of(T z, const T* k) { return slope_of<Pair>(z, k); }
};

// Four values in turn, each in the place of its z; of float64 by one copy of the function.
template <class What, class Pair, class T>
__device__ __forceinline__ void of_four(const T* k, T (&z)[lane_cols]) {
#pragma unroll(sizeof(T) == 8 ? 1 : lane_cols)
  for (int c = 0; c < lane_cols; c++) {
    const T v = What::template of<Pair>(z[0], k);
    z[0] = z[1], z[1] = z[2], z[2] = z[3], z[3] = v;
  }
}

// f or f' of four z, by the pair function of that number.
template <class What, class T>
__device__ __forceinline__ void of_pair(const Equation& e, T (&z)[lane_cols]) {
  const T k[2] = {T(e.constants[0]), T(e.constants[1])};
  int number = 0;
#define FASTCL_CASE(name, type, constants) \
  if (e.pair == number++) return of_four<What, type>(k, z);
  FASTCL_FOR_EACH_PAIR(FASTCL_CASE)
#undef FASTCL_CASE
}

// z of a thread's rows, and which of their pairs count.
template <class T>
struct Limited {
  const Equation& e;
  const Tile& t;
  const AtMost& at_most;
  const Place p;
  const Logits<T> logits;
  const Columns<T> cols;
  T limit[lane_cols];

  __device__ __forceinline__ Limited(const Equation& equation, const Tile& tile, const AtMost& limits)
      : e(equation), t(tile), at_most(limits), p(tile), logits(equation), cols(equation, p) {
    load_columns(at_most.limit_y, p, infinity<T>(), limit);
  }

  __device__ __forceinline__ bool has(int r) const { return p.row + r < t.i1; }
  __device__ __forceinline__ int64_t offset(int r) const { return (p.row + r - t.i0) * t.pitch + (p.col - t.j0); }

  // z of the r-th row, which the tile has; a bit is set for each pair that counts. What is NaN is above no limit.
  __device__ __forceinline__ unsigned row(int r, T (&z)[lane_cols]) const {
    const int64_t i = p.row + r;
    T guided[lane_cols] = {};
    load_four<false>(static_cast<const T*>(t.dot) + offset(r), p.inside, z);
    const bool by_guides = at_most.guided != nullptr;
    if (by_guides) load_four<false>(static_cast<const T*>(at_most.guided) + offset(r), p.inside, guided);
    logits.of_row(i, cols, z);
    const T own = at_or<T>(at_most.limit_x, i, true, infinity<T>());
    unsigned counts = logits.visits(i, p, cols.group);
#pragma unroll
    for (int c = 0; c < lane_cols; c++) {
      const T decides = by_guides ? guided[c] : z[c];
      if (decides > own || decides > limit[c]) counts &= ~(1u << c);
    }
    return counts;
  }
};

template <class T>
__global__ __launch_bounds__(threads) void reduce_sum_limited(const StripReduceLimited args) {
  __shared__ T shared[warps * strip_block_cols];
  const StripReduce& strip = args.strip;
  const Limited<T> limited(strip.equation, strip.tile, args.at_most);
  const Place& p = limited.p;
  RowSumsInTurn<T> rows;
  T col[lane_cols] = {};
#pragma unroll 1
  for (int r = 0; r < warp_rows && limited.has(r); r++) {
    T f[lane_cols], row = T(0);
    const unsigned counts = limited.row(r, f);
    of_pair<Value>(strip.equation, f);
#pragma unroll
    for (int c = 0; c < lane_cols; c++) {
      const T value = counts >> c & 1u ? f[c] : T(0);
      row += value;
      col[c] += value;
    }
    rows.set(r, row, p.lane);
  }
  const Partial<T> out(strip, p);
  if (out.stores_row(p.lane)) *out.row = rows.of_lane(p.lane);
  if (strip.col_parts != nullptr) {
    const T of_col = over_warps<Sum>(col, shared, p.warp, p.lane);
    if (out.has_col) *out.col = of_col;
  }
}

// A sum of exponentials relative to an infinite maximum is one of exponentials relative to 0.
template <class T>
__device__ __forceinline__ T finite_top(T top) {
  return top == infinity<T>() ? T(0) : top;
}

// Each row and column relative to its own maximum: of rows that keep few pairs many lie far under the block's.
template <class T>
__global__ __launch_bounds__(threads) void reduce_logsumexp_limited(const StripReduceLimited args) {
  __shared__ T shared[warps * strip_block_cols];
  __shared__ alignas(16) T tops[strip_block_cols];
  const StripReduce& strip = args.strip;
  const Limited<T> limited(strip.equation, strip.tile, args.at_most);
  const Place& p = limited.p;
  T z[warp_rows][lane_cols] = {};
#pragma unroll
  for (int r = 0; r < warp_rows; r++) {
    unsigned counts = 0;
    if (limited.has(r)) counts = limited.row(r, z[r]);
#pragma unroll
    for (int c = 0; c < lane_cols; c++)
      if (!(counts >> c & 1u)) z[r][c] = -infinity<T>();
  }
  T row[warp_rows];
#pragma unroll
  for (int r = 0; r < warp_rows; r++) row[r] = highest(highest(z[r][0], z[r][1]), highest(z[r][2], z[r][3]));
  const T row_top = over_lanes<Maximum>(row, p.lane);
#pragma unroll
  for (int r = 0; r < warp_rows; r++) {
    const T own = reference_of(__shfl_sync(0xffffffffu, row_top, 4 * r));
    row[r] = T(0);
#pragma unroll
    for (int c = 0; c < lane_cols; c++) row[r] += exponential(z[r][c] - own);
  }
  const T row_sum = over_lanes<Sum>(row, p.lane);
  const Partial<T> out(strip, p);
  if (out.stores_row(p.lane)) out.row[0] = finite_top(row_top), out.row[out.row_plane()] = row_sum;
  if (strip.col_parts == nullptr) return;
  T col[lane_cols];
#pragma unroll
  for (int c = 0; c < lane_cols; c++) {
    col[c] = z[0][c];
#pragma unroll
    for (int r = 1; r < warp_rows; r++) col[c] = highest(col[c], z[r][c]);
  }
  const T col_top = over_warps<Maximum>(col, shared, p.warp, p.lane);
  if (threadIdx.x < strip_block_cols) tops[threadIdx.x] = col_top;
  __syncthreads();
  T own[lane_cols];
  load_four<true>(tops + lane_cols * p.lane, lane_cols, own);
#pragma unroll
  for (int c = 0; c < lane_cols; c++) {
    own[c] = reference_of(own[c]);
    col[c] = T(0);
#pragma unroll
    for (int r = 0; r < warp_rows; r++) col[c] += exponential(z[r][c] - own[c]);
  }
  const T col_sum = over_warps<Sum>(col, shared, p.warp, p.lane);
  if (out.has_col) out.col[0] = finite_top(col_top), out.col[out.col_plane()] = col_sum;
}

template <class T, bool logsumexp>
__global__ __launch_bounds__(threads, sizeof(T) == 4 ? 3 : 1) void weigh_limited(const StripWeightsLimited args) {
  __shared__ T shared[warps * strip_block_cols];
  const StripWeights& strip = args.strip;
  const Tile& t = strip.tile;
  const Weighting& from = strip.weighting;
  const Limited<T> limited(strip.equation, t, args.at_most);
  const Place& p = limited.p;
  T h[lane_cols], log[lane_cols], col[lane_cols] = {};
  load_columns(from.h, p, T(0), h);
  if constexpr (logsumexp) {
    load_columns(from.c, p, T(0), log);
#pragma unroll
    for (int c = 0; c < lane_cols; c++) log[c] = normaliser(log[c]);
  }
  RowSumsInTurn<T> rows, values;
#pragma unroll 1
  for (int r = 0; r < warp_rows && limited.has(r); r++) {
    T z[lane_cols], w[lane_cols], row = T(0);
    const unsigned counts = limited.row(r, z);
    const T g = at_or<T>(from.g, p.row + r, true, T(0));
    if constexpr (logsumexp) {
      const T own = normaliser(at_or<T>(from.r, p.row + r, true, T(0)));
#pragma unroll
      for (int c = 0; c < lane_cols; c++) w[c] = from.g != nullptr ? exponential(z[c] - own) * g : T(0);
      if (from.h != nullptr)
#pragma unroll
        for (int c = 0; c < lane_cols; c++) w[c] += exponential(z[c] - log[c]) * h[c];
    } else {
#pragma unroll
      for (int c = 0; c < lane_cols; c++) w[c] = z[c];
      of_pair<Slope>(strip.equation, w);
#pragma unroll
      for (int c = 0; c < lane_cols; c++) w[c] *= g + h[c];
    }
#pragma unroll
    for (int c = 0; c < lane_cols; c++) {
      if (!(counts >> c & 1u)) w[c] = T(0);
      // diag(W 1) X - W Y cancels: both terms take the same rounded weights.
      const T counted = limited.logits.sqdist ? rounded_to(strip.weights_dtype, w[c]) : w[c];
      row += counted;
      col[c] += counted;
      // The weight of a logit of NaN is NaN in W Y, where the row that it came from is 0, whatever the slope is there.
      if (z[c] != z[c] && w[c] != T(0)) w[c] = z[c];
    }
    store_four(strip.weights, limited.offset(r), strip.weights_dtype, p.inside, w);
    rows.set(r, row, p.lane);
    if (!logsumexp && strip.values != nullptr) {
      T value = T(0);
      of_pair<Value>(strip.equation, z);
#pragma unroll
      for (int c = 0; c < lane_cols; c++) value += counts >> c & 1u ? z[c] : T(0);
      values.set(r, value, p.lane);
    }
  }
  const int64_t n = t.i1 - t.i0, i = int64_t(blockIdx.x) * strip_block_rows + p.warp * warp_rows + p.lane / 4;
  const bool stores_row = p.lane % 4 == 0 && i < n;
  if (strip.row_sums != nullptr && stores_row) static_cast<T*>(strip.row_sums)[blockIdx.y * n + i] = rows.of_lane(p.lane);
  if (strip.values != nullptr && stores_row) static_cast<T*>(strip.values)[blockIdx.y * n + i] = values.of_lane(p.lane);
  if (strip.col_sums != nullptr) {
    const T sum = over_warps<Sum>(col, shared, p.warp, p.lane);
    const int64_t m = t.j1 - t.j0, j = int64_t(blockIdx.y) * strip_block_cols + threadIdx.x;
    if (threadIdx.x < strip_block_cols && j < m) static_cast<T*>(strip.col_sums)[blockIdx.x * m + j] = sum;
  }
}

template <class T>
void reduce(const StripReduceLimited& args, cudaStream_t stream) {
  const dim3 grid = blocks_of(args.strip.tile);
  if (args.strip.equation.reduce == Reduction::logsumexp) reduce_logsumexp_limited<T><<<grid, threads, 0, stream>>>(args);
  else reduce_sum_limited<T><<<grid, threads, 0, stream>>>(args);
}

template <class T>
void weigh(const StripWeightsLimited& args, cudaStream_t stream) {
  const dim3 grid = blocks_of(args.strip.tile);
  if (args.strip.equation.reduce == Reduction::logsumexp) weigh_limited<T, true><<<grid, threads, 0, stream>>>(args);
  else weigh_limited<T, false><<<grid, threads, 0, stream>>>(args);
}

}  // namespace
}  // namespace fastcl::cuda

using namespace fastcl::cuda;

extern "C" {

int fastcl_cuda_strip_reduce_limited(const StripReduceLimited* args, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  args->strip.tile.dtype == Dtype::float64 ? reduce<double>(*args, on) : reduce<float>(*args, on);
  return cudaGetLastError();
}

int fastcl_cuda_strip_weights_limited(const StripWeightsLimited* args, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  args->strip.tile.dtype == Dtype::float64 ? weigh<double>(*args, on) : weigh<float>(*args, on);
  return cudaGetLastError();
}

}  // extern "C"
