// The gradient sweep: a CTA owns 128 rows and all of d. S is formed again tile by tile, becomes weights, and these multiply
// the tile of Y that is still in shared memory. The same kernel with the sides exchanged gives W^T X.
#pragma once

#include "fused_weights.cuh"

namespace fastcl::cuda {

// What a CTA may have where code is compiled for the architectures with 99 KB; kernels that need more are left empty there,
// since the schedule never launches them (and one of them spilled).
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
inline constexpr int most_shared = 99 << 10;
#else
inline constexpr int most_shared = 227 << 10;
#endif

// Bring rows row0 .. of x, all of d.
template <class C>
__device__ __forceinline__ void load_gradient_rows(uint32_t x_at, const void* x, int64_t stride, int row0, int n, int d) {
  using T = typename C::T;
#pragma unroll
  for (int k = 0; k < C::chunks; k++)
    if (k * C::width < d)
      load_chunk<T, C::BM, C::threads>(x_at + k * C::BM * chunk_bytes, static_cast<const T*>(x), stride, row0, n, k, d);
}

// Bring tile j of y, and the factors of its columns, into a stage.
template <class C>
__device__ __forceinline__ void load_gradient_tile(uint32_t y_at, uint32_t factors_at, const void* y, const float2* factors,
                                                   int64_t stride, int col0, int m, int d) {
  using T = typename C::T;
#pragma unroll
  for (int k = 0; k < C::chunks; k++)
    if (k * C::width < d)
      load_chunk<T, C::BN, C::threads>(y_at + k * C::BN * chunk_bytes, static_cast<const T*>(y), stride, col0, m, k, d);
  if (threadIdx.x < C::factor_bytes / 16) copy_async(factors_at + threadIdx.x * 16, factors + col0 + threadIdx.x * 2, true);
}

// Under sqdist from the weights as the product takes them: diag(W 1) X - W Y cancels.
template <class C>
__device__ __forceinline__ void add_row_sums(float (&sums)[C::MI][2], const float (&s)[C::MI][C::NI][4], bool sqdist) {
#pragma unroll
  for (int i = 0; i < C::MI; i++)
#pragma unroll
    for (int k = 0; k < C::NI; k++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums[i][e >> 1] += sqdist ? rounded<typename C::T>(s[i][k][e]) : s[i][k][e];
}

// Sums of the row block, joined over the warps of a row (in `meeting`, shared, [WN][BM]).
template <class C>
__device__ __forceinline__ void store_row_sums(const float (&sums)[C::MI][2], float* to, float* meeting, int row0, int n, const C& at) {
  __syncthreads();
#pragma unroll
  for (int i = 0; i < C::MI; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float sum = row_sum(sums[i][h]);
      if (at.t == 0) meeting[at.wn * C::BM + at.row(i, h)] = sum;
    }
  __syncthreads();
  for (int r = threadIdx.x; r < C::BM && row0 + r < n; r += C::threads) {
    float sum = meeting[r];
#pragma unroll
    for (int k = 1; k < C::WN; k++) sum += meeting[k * C::BM + r];
    to[row0 + r] = sum;
  }
}

// W Y of the row block.
template <class C>
__device__ __forceinline__ void store_gradient(const float (&acc)[C::MI][C::DI][4], float* wy, int row0, int n, int d, const C& at) {
#pragma unroll
  for (int i = 0; i < C::MI; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = row0 + at.row(i, h);
      if (row >= n) continue;
#pragma unroll
      for (int j = 0; j < C::DI; j++)
        if (at.out(j) < d)
          *reinterpret_cast<float2*>(wy + static_cast<int64_t>(row) * d + at.out(j)) =
              make_float2(acc[i][j][2 * h], acc[i][j][2 * h + 1]);
    }
}

template <class C, class Weights>
__global__ void __launch_bounds__(C::threads, 1) fused_gradient_kernel(const FusedGradient p) {
  if constexpr (C::shared > most_shared) {
    __trap();
  } else {
    using T = typename C::T;
    extern __shared__ __align__(1024) unsigned char shared[];
    const int n = static_cast<int>(p.sides.n), m = static_cast<int>(p.sides.m), d = static_cast<int>(p.sides.d);
    const int row0 = blockIdx.x * C::BM, tiles = (m + C::BN - 1) / C::BN;
    const float2 *x_factors = static_cast<const float2*>(p.x_factors), *y_factors = static_cast<const float2*>(p.y_factors);
    const uint32_t x = shared_address(shared), y = x + C::x_bytes, w = y + C::stages * C::y_bytes, factors = w + C::w_bytes;
    unsigned char* const columns = shared + C::x_bytes + C::stages * C::y_bytes + C::w_bytes;
    const Pairs<C, Weights::logsumexp> pairs(p.equation, p.sides, columns + C::stages * C::factor_bytes);
    const Weights weights(pairs, static_cast<const int*>(p.single));
    const C at;
    const uint32_t x_lane = left_lane(at.wm * C::MI * 16), y_lane = right_lane(at.wn * C::NI * 8);

    load_gradient_rows<C>(x, p.sides.x, p.sides.x_stride, row0, n, d);
    load_gradient_tile<C>(y, factors, p.sides.y, y_factors, p.sides.y_stride, 0, m, d);
    copies_commit();
    pairs.stage_rows(row0);
    float2 row[C::MI][2];
#pragma unroll
    for (int i = 0; i < C::MI; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) row[i][h] = x_factors[row0 + at.row(i, h)];
    float acc[C::MI][C::DI][4], sums[C::MI][2] = {}, values[C::MI][2] = {};
    clear(acc);
    for (int j = 0; j < tiles; j++) {
      const int col0 = j * C::BN, stage = j % C::stages, next = (j + 1) % C::stages;
      const uint32_t tile = y + stage * C::y_bytes;
      copies_wait<0>();
      __syncthreads();  // tile j is there for all warps, and all are done with tile j - 1 and its weights
      if (j + 1 < tiles)
        load_gradient_tile<C>(y + next * C::y_bytes, factors + next * C::factor_bytes, p.sides.y, y_factors, p.sides.y_stride,
                              col0 + C::BN, m, d);
      copies_commit();
      float s[C::MI][C::NI][4];
      clear(s);
#pragma unroll
      for (int k = 0; k < C::chunks; k++)
        if (k * C::width < d)
          multiply_chunk<T>(s, x + k * C::BM * chunk_bytes + x_lane, tile + k * C::BN * chunk_bytes + y_lane);
      float scale = pairs.scale, shift = pairs.shift;
      pairs.stage_cols(col0);
      if (pairs.terms) pairs.form(s), scale = 1.f, shift = 0.f;
      const float2* const column = reinterpret_cast<const float2*>(columns + stage * C::factor_bytes);
      if constexpr (Weights::valued)
        weights.weigh(s, scale, shift, row, column, at, pairs.partial(row0, col0) ? pairs.visited(row0, col0) : ~0u, values);
      else
        weights.weigh(s, scale, shift, row, column, at);
      if (pairs.partial(row0, col0)) pairs.mask(s, row0, col0, 0.f);
      if (p.w_rows != nullptr) add_row_sums<C>(sums, s, pairs.sqdist);
      if constexpr (C::exchange) multiply_exchanged<C>(acc, s, w, tile, d, at);
      else multiply_registers<C>(acc, s, tile, d, at);
    }
    store_gradient<C>(acc, static_cast<float*>(p.wy), row0, n, d, at);
    float *const w_rows = static_cast<float*>(p.w_rows), *const meeting = reinterpret_cast<float*>(shared);
    if (w_rows != nullptr) store_row_sums<C>(sums, w_rows, meeting, row0, n, at);
    if constexpr (Weights::valued) store_row_sums<C>(values, static_cast<float*>(p.values), meeting, row0, n, at);
  }
}

// r in units of log 2; a large one brought under what four roundings may have made of it: its own, two before it where there is a
// shift or an edge of the matrix, and that of z - r.
__device__ __forceinline__ float held(float log) {
  const float r = __fmul_rd(log, log2_e);
  return fabsf(log) < fused_large ? log * log2_e : __fmul_rd(r, r < 0.f ? 1.f + 0x1p-22f : 1.f - 0x1p-22f);
}

// Factors of one side: see fused.h. `own` and `log` are its g and r, or its h and c; either may be absent.
__device__ __forceinline__ float2 factor(const float* own, const float* log, const float* reference, bool shared_reference,
                                         int64_t k, int64_t count) {
  if (k >= count || own == nullptr) return make_float2(0.f, 0.f);
  if (log == nullptr) return make_float2(own[k], 0.f);
  if (log[k] == -INFINITY) return make_float2(0.f, 0.f);  // nothing was visited: no weight
  if (shared_reference) return make_float2(own[k] * ex2((reference[0] - log[k]) * log2_e), reference[0] * (0.5f * log2_e));
  return make_float2(own[k], held(log[k]));
}

template <class Pair>
__global__ void fused_factors_kernel(const FusedFactors p) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const float *g = static_cast<const float*>(p.weighting.g), *h = static_cast<const float*>(p.weighting.h);
  const float *r = static_cast<const float*>(p.weighting.r), *c = static_cast<const float*>(p.weighting.c);
  const float* reference = static_cast<const float*>(p.weighting.reference);
  const bool both = p.logsumexp && g != nullptr && h != nullptr;
  const bool close = both && reference != nullptr && reference[1] != 0.f && fabsf(reference[0]) < fused_large;
  if (!p.logsumexp) r = c = nullptr;
  const int64_t rows = (p.n + fused_tile - 1) / fused_tile * fused_tile, cols = (p.m + fused_tile - 1) / fused_tile * fused_tile;
  if (k < rows) static_cast<Pair*>(p.x_factors)[k] = factor(g, r, reference, close, k, p.n);
  if (k < cols) static_cast<Pair*>(p.y_factors)[k] = factor(h, c, reference, close, k, p.m);
  const auto large = [k](const float* log, int64_t count) {
    return log != nullptr && k < count && isfinite(log[k]) && fabsf(log[k]) >= fused_large;
  };
  if ((both && !close) || (!close && (large(r, p.n) || large(c, p.m)))) *static_cast<int*>(p.single) = 0;
}

// Rows padded with zeros; float32 rounded to what tf32 holds.
template <class T>
__global__ void fused_pack_kernel(const FusedPack p) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k >= p.rows * p.to_d) return;
  const int64_t row = k / p.to_d, col = k % p.to_d;
  T v = T(0.f);
  if (col < p.d) v = static_cast<const T*>(p.from)[row * p.from_stride + col];
  if constexpr (sizeof(T) == 4) v = to_tf32(v);
  static_cast<T*>(p.to)[k] = v;
}

}  // namespace fastcl::cuda
