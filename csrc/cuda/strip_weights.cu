// A tile of dot products turned into weights in the dtype of the operands, with W 1, W^T 1 and the row sums of f on the way.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "strip.cuh"

namespace fastcl::cuda {
namespace {

// Four neighbouring weights as stored; w becomes what was stored, in T.
template <class T>
__device__ __forceinline__ void store_four(const StripWeights& args, int64_t offset, int inside, T (&w)[lane_cols]) {
  auto store = [&](auto* to, auto convert, auto back) {
    using W = std::remove_pointer_t<decltype(to)>;
    struct alignas(4 * sizeof(W) < 16 ? 4 * sizeof(W) : 16) Four {
      W v[lane_cols];
    } four;
#pragma unroll
    for (int c = 0; c < lane_cols; c++) four.v[c] = convert(w[c]), w[c] = back(four.v[c]);
    to += offset;
    if (inside == lane_cols) {
      *reinterpret_cast<Four*>(to) = four;
    } else {
#pragma unroll
      for (int c = 0; c < lane_cols; c++)
        if (c < inside) to[c] = four.v[c];
    }
  };
  auto same = [](T v) { return v; };
  if constexpr (sizeof(T) == 8) {
    store(static_cast<double*>(args.weights), same, same);
  } else if (args.weights_dtype == Dtype::float32) {
    store(static_cast<float*>(args.weights), same, same);
  } else if (args.weights_dtype == Dtype::bfloat16) {
    store(static_cast<__nv_bfloat16*>(args.weights), [](float v) { return __float2bfloat16_rn(v); }, [](__nv_bfloat16 v) { return __bfloat162float(v); });
  } else {
    store(static_cast<__half*>(args.weights), [](float v) { return __float2half_rn(v); }, [](__half v) { return __half2float(v); });
  }
}

// w_ij = f'(z_ij) (g_i + h_j)
template <class T, class Pair>
struct SumWeights {
  T h[lane_cols], k[2], g;
  const Weighting from;

  __device__ __forceinline__ SumWeights(const StripWeights& args, const Place& p) : from(args.weighting) {
    k[0] = T(args.equation.constants[0]), k[1] = T(args.equation.constants[1]);
#pragma unroll
    for (int c = 0; c < lane_cols; c++) h[c] = at_or<T>(from.h, p.col + c, c < p.inside, T(0));
  }
  __device__ __forceinline__ void row(int64_t i) { g = at_or<T>(from.g, i, true, T(0)); }
  __device__ __forceinline__ T of(T z, int c) const { return Pair::slope(z, k) * (g + h[c]); }
  __device__ __forceinline__ T value(T z) const { return Pair::value(z, k); }
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
#pragma unroll
    for (int c = 0; c < lane_cols; c++) {
      h[c] = at_or<T>(from.h, p.col + c, c < p.inside, T(0));
      c_[c] = normaliser(from.c, p.col + c, c < p.inside);
      if (close) h[c] *= exponential(rho - c_[c]);
    }
  }
  // +inf where nothing was reduced: z - r is then -inf, and the weight exactly 0.
  __device__ __forceinline__ static T normaliser(const void* vector, int64_t index, bool inside) {
    const T v = at_or<T>(vector, index, inside, infinity<T>());
    return v == -infinity<T>() ? infinity<T>() : v;
  }
  __device__ __forceinline__ void row(int64_t i) {
    g = at_or<T>(from.g, i, true, T(0));
    r = normaliser(from.r, i, true);
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
  T row[warp_rows], value[warp_rows], col[lane_cols] = {};
#pragma unroll
  for (int r = 0; r < warp_rows; r++) {
    row[r] = value[r] = T(0);
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
      for (int c = 0; c < lane_cols; c++) value[r] += visited >> c & 1u ? weights.value(z[c]) : T(0);
    T stored[lane_cols] = {w[0], w[1], w[2], w[3]};
    store_four(args, offset, p.inside, stored);
    // For sqdist diag(W 1) X - W Y cancels: both terms take the same rounded weights.
#pragma unroll
    for (int c = 0; c < lane_cols; c++) {
      const T counted = logits.sqdist ? stored[c] : w[c];
      row[r] += counted;
      col[c] += counted;
    }
  }
  const int64_t rows = t.i1 - t.i0, i = int64_t(blockIdx.x) * strip_block_rows + p.warp * warp_rows + p.lane / 4;
  const bool stores_row = p.lane % 4 == 0 && i < rows;
  if (args.row_sums != nullptr) {
    const T sum = over_lanes<Sum>(row, p.lane);
    if (stores_row) static_cast<T*>(args.row_sums)[blockIdx.y * rows + i] = sum;
  }
  if (args.values != nullptr) {
    const T sum = over_lanes<Sum>(value, p.lane);
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
