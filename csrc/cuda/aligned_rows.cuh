// What the kernels around the fused sweeps share: a warp's row, its length, and sums over a warp and over a block.
#pragma once

#include "aligned.h"
#include "tile.cuh"

namespace fastcl::cuda {

template <class V, class Join>
__device__ __forceinline__ V over_warp(V v, Join join) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v = join(v, __shfl_xor_sync(~0u, v, o));
  return v;
}
__device__ __forceinline__ float warp_sum(float v) {
  return over_warp(v, [](float a, float b) { return a + b; });
}

// The same for all threads of a block of whole warps, in one order; `meeting` has 32 places. Every thread receives it.
template <class V, class Join>
__device__ __forceinline__ V over_block(V v, V nothing, V* meeting, Join join) {
  v = over_warp(v, join);
  __syncthreads();  // of an earlier call all is read
  if (threadIdx.x % 32 == 0) meeting[threadIdx.x / 32] = v;
  __syncthreads();
  const unsigned lane = threadIdx.x % 32;
  return over_warp(lane < blockDim.x / 32 ? meeting[lane] : nothing, join);
}

// A power of two that brings the largest entry of a row near 1, so that no square and no product leaves float32.
__device__ __forceinline__ float power_for(float largest) {
  const int exponent = __float_as_int(largest) >> 23;  // biased; 0 below the normal numbers, 255 where it is no number
  return __int_as_float(max(1, min(254, 254 - exponent)) << 23);
}

// A row as it was given, read by a warp.
template <class T>
struct GivenRow {
  const T* at;
  int64_t step;

  __device__ __forceinline__ GivenRow(const AlignedView& view, int64_t i)
      : at(static_cast<const T*>(view.rows) + i * view.stride), step(view.step) {}
  __device__ __forceinline__ float operator[](int k) const { return static_cast<float>(at[k * step]); }
};

// x / max(|x|, 1e-12) of such a row, entry by entry; or the row itself. A row with an infinity has no direction: NaN.
template <class T>
struct UnitRow {
  GivenRow<T> row;
  float power = 1.f, divisor = 1.f;
  bool along = false;  // longer than 1e-12: its gradient has no radial part

  __device__ __forceinline__ UnitRow(const AlignedView& view, int64_t i, int d, bool normalize) : row(view, i) {
    if (!normalize) return;
    const int lane = threadIdx.x % 32;
    float largest = 0.f, squares = 0.f;
    for (int k = lane; k < d; k += 32) largest = larger(largest, fabsf(row[k]));
    largest = over_warp(largest, [](float a, float b) { return larger(a, b); });
    power = power_for(largest);
    for (int k = lane; k < d; k += 32) {
      const float v = row[k] * power;
      squares = fmaf(v, v, squares);
    }
    const float length = sqrtf(warp_sum(squares)), least = 1e-12f * power;
    along = length > least;
    divisor = largest < INFINITY ? (along ? length : least) : NAN;
  }
  __device__ __forceinline__ float operator[](int k) const { return row[k] * power / divisor; }
};

// weight * number, where a weight that has gone to 0 takes nothing from an infinite number.
__device__ __forceinline__ float weighed(float weight, float number) {
  return weight == 0.f && isinf(number) ? 0.f : weight * number;
}

}  // namespace fastcl::cuda
