// A tile of dot products turned into weights in the dtype of the operands, with W 1, W^T 1 and the row sums of f on the way.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "strip.cuh"

namespace fastcl::cuda {
namespace {

// Two weights in 16 bits each, the first in the lower half, and a weight back from its bits.
struct Bfloat16 {
  __device__ __forceinline__ static unsigned pack(float a, float b) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const unsigned&>(both);
  }
  __device__ __forceinline__ static float back(unsigned bits) { return __uint_as_float(bits << 16); }
};
struct Float16 {
  __device__ __forceinline__ static unsigned pack(float a, float b) {
    const __half2 both = __floats2half2_rn(a, b);
    return reinterpret_cast<const unsigned&>(both);
  }
  __device__ __forceinline__ static float back(unsigned bits) { return __half2float(__ushort_as_half(static_cast<unsigned short>(bits))); }
};

// Stores four neighbouring weights; w becomes what was stored.
template <class Format>
__device__ __forceinline__ void store_halves(void* weights, int64_t offset, int inside, float (&w)[lane_cols]) {
  unsigned short* const to = static_cast<unsigned short*>(weights) + offset;
  const uint2 bits = {Format::pack(w[0], w[1]), Format::pack(w[2], w[3])};
  const unsigned each[lane_cols] = {bits.x & 0xffffu, bits.x >> 16, bits.y & 0xffffu, bits.y >> 16};
  // As one number: of a uint2 nvcc makes two stores, each of half a sector.
  if (inside == lane_cols) *reinterpret_cast<uint64_t*>(to) = uint64_t(bits.y) << 32 | bits.x;
#pragma unroll
  for (int c = 0; c < lane_cols; c++) {
    if (inside != lane_cols && c < inside) to[c] = static_cast<unsigned short>(each[c]);
    w[c] = Format::back(each[c]);
  }
}
template <class T>
__device__ __forceinline__ void store_four(const StripWeights& args, int64_t offset, int inside, T (&w)[lane_cols]) {
  if constexpr (sizeof(T) == 4) {
    if (args.weights_dtype == Dtype::bfloat16) return store_halves<Bfloat16>(args.weights, offset, inside, w);
    if (args.weights_dtype == Dtype::float16) return store_halves<Float16>(args.weights, offset, inside, w);
  }
  T* const to = static_cast<T*>(args.weights) + offset;
  if (inside == lane_cols) return store_vectors(to, w);
#pragma unroll
  for (int c = 0; c < lane_cols; c++)
    if (c < inside) to[c] = w[c];
}

// w_ij = f'(z_ij) (g_i + h_j)
template <class T, class Pair>
struct SumWeights {
  T h[lane_cols], k[2], g;
  const Weighting from;

  __device__ __forceinline__ SumWeights(const StripWeights& args, const Place& p) : from(args.weighting) {
    k[0] = T(args.equation.constants[0]), k[1] = T(args.equation.constants[1]);
    load_columns(from.h, p, T(0), h);
  }
  __device__ __forceinline__ void row(int64_t i) { g = at_or<T>(from.g, i, true, T(0)); }
  __device__ __forceinline__ T of(T z, int c) const { return slope_of<Pair>(z, k) * (g + h[c]); }
  __device__ __forceinline__ T value(T z) const { return value_of<Pair>(z, k); }
};

// w_ij = g_i e^(z_ij - r_i) + h_j e^(z_ij - c_j), by one exponential where all r and c are close to rho: with every
// |r_i - rho|, |c_j - rho| < 28 no factor passes 2^41, and what e^(z_ij - rho) flushes to 0 is under 2^-85 of its row and
// of its column. Differences are taken before the change of base: z log2 e - r log2 e would round twice at the size of z.
template <class T>
struct SoftmaxWeights {
  T h[lane_cols], c_[lane_cols], g, r, rho;
  bool close;
  const Weighting from;

  __device__ __forceinline__ SoftmaxWeights(const StripWeights& args, const Place& p) : from(args.weighting) {
    close = from.reference != nullptr && static_cast<const T*>(from.reference)[1] > T(0);
    rho = close ? static_cast<const T*>(from.reference)[0] : T(0);
    load_columns(from.h, p, T(0), h);
    load_columns(from.c, p, infinity<T>(), c_);
#pragma unroll
    for (int c = 0; c < lane_cols; c++) {
      c_[c] = normaliser(c_[c]);
      if (close) h[c] *= exponential(rho - c_[c]);
    }
  }
  // +inf where nothing was reduced: z - r is then -inf, and the weight exactly 0.
  __device__ __forceinline__ static T normaliser(T r) { return r == -infinity<T>() ? infinity<T>() : r; }
  __device__ __forceinline__ void row(int64_t i) {
    g = at_or<T>(from.g, i, true, T(0));
    r = normaliser(at_or<T>(from.r, i, true, infinity<T>()));
    if (close) g *= exponential(rho - r);
  }
  __device__ __forceinline__ T of(T z, int c) const {
    if (close) return exponential(z - rho) * (g + h[c]);
    T w = T(0);
    if (from.g != nullptr) w = exponential(z - r) * g;
    if (from.h != nullptr) w += exponential(z - c_[c]) * h[c];
    return w;
  }
  __device__ __forceinline__ T value(T) const { return T(0); }
};

template <class T, class Weights>
__global__ __launch_bounds__(threads) void weigh(const StripWeights args) {
  __shared__ T shared[warps * strip_block_cols];
  const Tile& t = args.tile;
  const Place p(t);
  const Columns<T> cols(args.equation, p);
  const Logits<T> logits(args.equation);
  Weights weights(args, p);
  RowSums<T> rows_of_w, values;
  T col[lane_cols] = {};
#pragma unroll(unrolled_rows<T>)
  for (int r = 0; r < warp_rows; r++) {
    T row = T(0), value = T(0);
    const int64_t i = p.row + r;
    if (i >= t.i1) continue;
    const int64_t offset = (i - t.i0) * t.pitch + (p.col - t.j0);
    T z[lane_cols], w[lane_cols];
    load_four(static_cast<const T*>(t.dot) + offset, p.inside, z);
    logits.of_row(i, cols, z);
    const unsigned visited = logits.visits(i, p, cols);
    weights.row(i);
#pragma unroll
    for (int c = 0; c < lane_cols; c++) w[c] = visited >> c & 1u ? weights.of(z[c], c) : T(0);
    if (args.values != nullptr)
#pragma unroll
      for (int c = 0; c < lane_cols; c++) value += visited >> c & 1u ? weights.value(z[c]) : T(0);
    T stored[lane_cols] = {w[0], w[1], w[2], w[3]};
    store_four(args, offset, p.inside, stored);
    // For sqdist diag(W 1) X - W Y cancels: both terms take the same rounded weights.
#pragma unroll
    for (int c = 0; c < lane_cols; c++) {
      const T counted = logits.sqdist ? stored[c] : w[c];
      row += counted;
      col[c] += counted;
    }
    rows_of_w.set(r, row, p.lane);
    values.set(r, value, p.lane);
  }
  const int64_t rows = t.i1 - t.i0, i = int64_t(blockIdx.x) * strip_block_rows + p.warp * warp_rows + p.lane / 4;
  const bool stores_row = p.lane % 4 == 0 && i < rows;
  if (args.row_sums != nullptr) {
    const T sum = rows_of_w.of_lane(p.lane);
    if (stores_row) static_cast<T*>(args.row_sums)[blockIdx.y * rows + i] = sum;
  }
  if (args.values != nullptr) {
    const T sum = values.of_lane(p.lane);
    if (stores_row) static_cast<T*>(args.values)[blockIdx.y * rows + i] = sum;
  }
  if (args.col_sums != nullptr) {
    const T sum = over_warps<Sum>(col, shared, p.warp, p.lane);
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
