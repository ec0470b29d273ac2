// A tile of dot products turned into weights in the dtype of the operands, with W 1, W^T 1 and the row sums of f on the way.
#include "strip.cuh"

namespace fastcl::cuda {
namespace {

// What a row or column brings to its weights: their factor, and what is taken off z.
template <class T>
struct Brought {
  T factor, log;
};

// What the rows and columns of a block bring, in shared memory, formed once by one thread each.
template <class T>
struct Staged {
  struct alignas(2 * sizeof(T)) Row {
    T term, factor;
  };
  Row row[strip_block_rows];
  T row_log[strip_block_rows], row_norm[strip_block_rows];
  alignas(16) T col[4][strip_block_cols];  // bias, factor, log, norm

  template <class Weights>
  __device__ __forceinline__ void fill(const StripWeights& args, const Weights& weights) {
    const Equation& e = args.equation;
    const Tile& t = args.tile;
    const int k = threadIdx.x, own = k - int(strip_block_cols);
    if (k < strip_block_cols) {
      const int64_t j = t.j0 + int64_t(blockIdx.y) * strip_block_cols + k;
      const bool inside = j < t.j1;
      const Brought<T> y = weights.column(j, inside);
      col[0][k] = at_or<T>(e.bias_y, j, inside, T(0)), col[1][k] = y.factor, col[2][k] = y.log;
      col[3][k] = at_or<T>(e.norm_y, j, inside, T(0));
    } else if (own < strip_block_rows) {
      const int64_t i = t.i0 + int64_t(blockIdx.x) * strip_block_rows + own;
      const bool inside = i < t.i1;
      const Brought<T> x = weights.row(i, inside);
      row[own] = {*static_cast<const T*>(e.shift) + at_or<T>(e.bias_x, i, inside, T(0)), x.factor};
      row_log[own] = x.log, row_norm[own] = at_or<T>(e.norm_x, i, inside, T(0));
    }
    __syncthreads();
  }
};

// What a lane's four columns bring.
template <class T>
struct ColumnsOf {
  T bias[lane_cols], factor[lane_cols], log[lane_cols], norm[lane_cols];
  int64_t group[lane_cols];

  __device__ __forceinline__ ColumnsOf(const Staged<T>& staged, int lane) {
    load_four<true>(staged.col[0] + lane_cols * lane, lane_cols, bias);
    load_four<true>(staged.col[1] + lane_cols * lane, lane_cols, factor);
    load_four<true>(staged.col[2] + lane_cols * lane, lane_cols, log);
    load_four<true>(staged.col[3] + lane_cols * lane, lane_cols, norm);
  }
};

// w_ij = f'(z_ij) (g_i + h_j)
template <class T, class Pair>
struct SumWeights {
  static constexpr bool has_values = true;

  T k[2];
  const Weighting from;

  __device__ __forceinline__ explicit SumWeights(const StripWeights& args) : from(args.weighting) {
    k[0] = T(args.equation.constants[0]), k[1] = T(args.equation.constants[1]);
  }
  __device__ __forceinline__ Brought<T> row(int64_t i, bool inside) const { return side(from.g, i, inside); }
  __device__ __forceinline__ Brought<T> column(int64_t j, bool inside) const { return side(from.h, j, inside); }
  __device__ __forceinline__ Brought<T> side(const void* own, int64_t k, bool inside) const {
    return {at_or<T>(own, k, inside, T(0)), T(0)};
  }
  __device__ __forceinline__ void of_row(const T (&z)[lane_cols], T factor, T, const ColumnsOf<T>& cols,
                                         T (&w)[lane_cols]) const {
#pragma unroll
    for (int c = 0; c < lane_cols; c++) w[c] = slope_of<Pair>(z[c], k) * (factor + cols.factor[c]);
  }
  __device__ __forceinline__ T value(T z) const { return value_of<Pair>(z, k); }
};

// w_ij = g_i e^(z_ij - r_i) + h_j e^(z_ij - c_j). One exponential serves g or h alone, and both where all r and c are close to
// rho: with every |r_i - rho|, |c_j - rho| < 28 no factor g e^(rho - r) passes 2^41, and what e^(z_ij - rho) flushes to 0 is under
// 2^-85 of its row and of its column. Differences are taken of z as it was reduced, which a term with -r in it would round
// elsewhere, and before the change of base: z log2 e - r log2 e would round twice at the size of z.
template <class T>
struct SoftmaxWeights {
  static constexpr bool has_values = false;

  T rho;
  bool close, single;
  const Weighting from;

  __device__ __forceinline__ explicit SoftmaxWeights(const StripWeights& args) : from(args.weighting) {
    close = from.reference != nullptr && static_cast<const T*>(from.reference)[1] > T(0);
    rho = close ? static_cast<const T*>(from.reference)[0] : T(0);
    single = close || from.g == nullptr || from.h == nullptr;
  }
  __device__ __forceinline__ Brought<T> side(const void* own, const void* logs, int64_t k, bool inside) const {
    const T factor = at_or<T>(own, k, inside, T(0)), log = normaliser(at_or<T>(logs, k, inside, infinity<T>()));
    return close ? Brought<T>{factor * exponential(rho - log), T(0)} : Brought<T>{factor, own != nullptr ? log : T(0)};
  }
  __device__ __forceinline__ Brought<T> row(int64_t i, bool inside) const {
    Brought<T> x = side(from.g, from.r, i, inside);
    if (close) x.log = rho;
    return x;
  }
  __device__ __forceinline__ Brought<T> column(int64_t j, bool inside) const {
    return side(from.h, from.c, j, inside);
  }
  __device__ __forceinline__ void of_row(const T (&z)[lane_cols], T factor, T log, const ColumnsOf<T>& cols,
                                         T (&w)[lane_cols]) const {
    if (single && from.g != nullptr) {
#pragma unroll
      for (int c = 0; c < lane_cols; c++) w[c] = exponential(z[c] - log) * (factor + cols.factor[c]);
    } else if (single) {
#pragma unroll
      for (int c = 0; c < lane_cols; c++) w[c] = exponential(z[c] - cols.log[c]) * cols.factor[c];
    } else {
#pragma unroll
      for (int c = 0; c < lane_cols; c++)
        w[c] = exponential(z[c] - log) * factor + exponential(z[c] - cols.log[c]) * cols.factor[c];
    }
  }
};

// The sums of a thread's weights: of its rows, of f over them, and of its columns.
template <class T>
struct WeightSums {
  RowSums<T> rows, values;
  T col[lane_cols] = {};
};

// Turns a row of four dot products into weights and adds them to the sums; pairs of `all` without a test.
template <bool all, class T, class Weights>
__device__ __forceinline__ void weigh_row(const StripWeights& args, const Place& p, int r, int64_t offset, const Logits<T>& logits,
                                          const Weights& weights, const Staged<T>& staged, const ColumnsOf<T>& cols,
                                          T (&z)[lane_cols], WeightSums<T>& sums) {
  const int own = p.warp * warp_rows + r;
  const auto [term, factor] = staged.row[own];
  logits.of_row(term, staged.row_norm[own], cols.norm, cols.bias, z);
  T w[lane_cols], row = T(0);
  weights.of_row(z, factor, staged.row_log[own], cols, w);
  const unsigned visited = all ? (1u << lane_cols) - 1u : logits.visits(p.row + r, p, cols.group);
#pragma unroll
  for (int c = 0; c < lane_cols; c++)
    if (!(visited >> c & 1u)) w[c] = T(0);
  store_four(args.weights, offset, args.weights_dtype, all ? lane_cols : p.inside, w);
  // diag(W 1) X - W Y cancels: both terms take the same rounded weights.
  if (logits.sqdist)
#pragma unroll
    for (int c = 0; c < lane_cols; c++) w[c] = rounded_to(args.weights_dtype, w[c]);
#pragma unroll
  for (int c = 0; c < lane_cols; c++) {
    row += w[c];
    sums.col[c] += w[c];
  }
  sums.rows.set(r, row, p.lane);
  if constexpr (Weights::has_values) {
    if (args.values == nullptr) return;
    T value = T(0);
#pragma unroll
    for (int c = 0; c < lane_cols; c++) value += visited >> c & 1u ? weights.value(z[c]) : T(0);
    sums.values.set(r, value, p.lane);
  }
}

template <bool all, class T, class Weights>
__device__ __forceinline__ void weigh_rows(const StripWeights& args, const Place& p, const Weights& weights,
                                           const Staged<T>& staged, WeightSums<T>& sums) {
  constexpr int ahead = sizeof(T) == 4 ? 4 : 1;  // rows that are loaded before the first of them is used
  const Tile& t = args.tile;
  const Logits<T> logits(args.equation);
  ColumnsOf<T> cols(staged, p.lane);
  if (!all) load_columns(args.equation.group_y, p, int64_t(0), cols.group);
  int64_t offset = (p.row - t.i0) * t.pitch + (p.col - t.j0);
  const int rows = all ? warp_rows : int(min(int64_t(warp_rows), t.i1 - p.row));
#pragma unroll(unrolled_rows<T> / ahead)
  for (int r0 = 0; r0 < warp_rows; r0 += ahead) {
    T z[ahead][lane_cols];
#pragma unroll
    for (int k = 0; k < ahead; k++)
      if (r0 + k < rows) load_four<all>(static_cast<const T*>(t.dot) + offset + k * t.pitch, p.inside, z[k]);
#pragma unroll
    for (int k = 0; k < ahead; k++, offset += t.pitch)
      if (r0 + k < rows) weigh_row<all>(args, p, r0 + k, offset, logits, weights, staged, cols, z[k], sums);
  }
}

template <class T, class Weights>
__global__ __launch_bounds__(threads, sizeof(T) == 4 ? 3 : 2) void weigh(const StripWeights args) {
  __shared__ T shared[warps * strip_block_cols];
  __shared__ Staged<T> staged;
  const Tile& t = args.tile;
  const Place p(t);
  const Weights weights(args);
  staged.fill(args, weights);
  WeightSums<T> sums;
  if (visits_all(args.equation, t)) weigh_rows<true>(args, p, weights, staged, sums);
  else weigh_rows<false>(args, p, weights, staged, sums);
  const int64_t rows = t.i1 - t.i0, i = int64_t(blockIdx.x) * strip_block_rows + p.warp * warp_rows + p.lane / 4;
  const bool stores_row = p.lane % 4 == 0 && i < rows;
  if (args.row_sums != nullptr) {
    const T sum = sums.rows.of_lane(p.lane);
    if (stores_row) static_cast<T*>(args.row_sums)[blockIdx.y * rows + i] = sum;
  }
  if (args.values != nullptr) {
    const T sum = sums.values.of_lane(p.lane);
    if (stores_row) static_cast<T*>(args.values)[blockIdx.y * rows + i] = sum;
  }
  if (args.col_sums != nullptr) {
    const T sum = over_warps<Sum>(sums.col, shared, p.warp, p.lane);
    const int64_t m = t.j1 - t.j0, j = int64_t(blockIdx.y) * strip_block_cols + threadIdx.x;
    if (threadIdx.x < strip_block_cols && j < m) static_cast<T*>(args.col_sums)[blockIdx.x * m + j] = sum;
  }
}

template <class T>
int weights(const StripWeights& args, cudaStream_t stream) {
  const dim3 grid = blocks_of(args.tile);
  if (args.equation.reduce == Reduction::logsumexp) {
    weigh<T, SoftmaxWeights<T>><<<grid, threads, 0, stream>>>(args);
    return cudaGetLastError();
  }
  return with_pair(args.equation.pair, [&](auto pair) -> int {
    weigh<T, SumWeights<T, decltype(pair)>><<<grid, threads, 0, stream>>>(args);
    return cudaGetLastError();
  });
}

}  // namespace
}  // namespace fastcl::cuda

extern "C" int fastcl_cuda_strip_weights(const fastcl::cuda::StripWeights* args, void* stream) {
  using namespace fastcl::cuda;
  const auto on = static_cast<cudaStream_t>(stream);
  return args->tile.dtype == Dtype::float64 ? weights<double>(*args, on) : weights<float>(*args, on);
}
