// From a tile of S to weights, and from weights to W Y: the second product of the gradient.
#pragma once

#include "fused_equation.cuh"

namespace fastcl::cuda {

// A CTA keeps 128 rows of x and of W Y, KC chunks wide. Two-byte weights pass through shared memory, so that warps may split
// the columns of both products: each fragment of Y then feeds two or more multiplications. tf32 weights stay in registers.
template <class T, int KC>
struct GradientLayout : Layout<T, 128, sizeof(T) == 2 ? 64 : 32, sizeof(T) == 2 ? 4 : 8, sizeof(T) == 2 ? 2 : 1> {
  using Base = Layout<T, 128, sizeof(T) == 2 ? 64 : 32, sizeof(T) == 2 ? 4 : 8, sizeof(T) == 2 ? 2 : 1>;
  static constexpr bool exchange = sizeof(T) == 2;
  static constexpr int chunks = KC, most = KC * Base::width, DI = most / 8 / Base::WN, stages = 2;
  static constexpr int x_bytes = KC * Base::BM * chunk_bytes, y_bytes = KC * Base::BN * chunk_bytes;
  static constexpr int w_bytes = exchange ? Base::BM * chunk_bytes : 0, factor_bytes = Base::BN * sizeof(float2);
  static constexpr int shared = x_bytes + stages * (y_bytes + factor_bytes) + w_bytes + line_bytes<Base>;

  // The column of W Y that acc[.][j] starts at: pairs of units are dealt to the warps in turn, so that all have the same
  // work where d is less than `most`.
  __device__ __forceinline__ int out(int j) const {
    return ((j / 2 * Base::WN + this->wn) * 2 + j % 2) * 8 + this->t * 2;
  }
};

// Weights of a log-sum-exp; factors are described in fused.h.
//
// z and r are rounded where they are large, apart from each other: z - r, which is at most 0, would be off by all their units in
// the last place, and 2^ that be of any size. Where they are, each term has an exponential of its own, held at 1: r is brought
// under its roundings (`held`), and shift above its own, so that what is 1 comes out as 1.
template <class C>
struct SoftmaxWeights {
  static constexpr bool logsumexp = true, valued = false;
  bool single;

  __device__ __forceinline__ SoftmaxWeights(const Pairs<C, true>& p, const int* single_)
      : single(*single_ != 0 && fabsf(p.shift) < fused_large) {}

  __device__ __forceinline__ void weigh(float (&s)[C::MI][C::NI][4], float scale, float shift,
                                        const float2 (&row)[C::MI][2], const float2* cols, const C& at) const {
    const float above = fabsf(shift) < fused_large ? shift : shift + fabsf(shift) * 0x1p-22f;
#pragma unroll
    for (int j = 0; j < C::NI; j++) {
      const float4 col = *reinterpret_cast<const float4*>(cols + at.col(j, 0));
#pragma unroll
      for (int i = 0; i < C::MI; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float2 a = row[i][e >> 1], b = e & 1 ? make_float2(col.z, col.w) : make_float2(col.x, col.y);
          const float z = s[i][j][e];
          if (single) s[i][j][e] = (a.x + b.x) * ex2(fmaf(z, scale, shift - a.y) - b.y);
          else
            s[i][j][e] =
                a.x * ex2(smaller(fmaf(z, scale, above - a.y), 0.f)) + b.x * ex2(smaller(fmaf(z, scale, above - b.y), 0.f));
        }
    }
  }
};

template <class C, class F>
struct SlopeWeights {
  static constexpr bool logsumexp = false, valued = false;
  Fast k[2];

  __device__ __forceinline__ SlopeWeights(const Pairs<C, false>& p, const int*) {
    k[0] = Fast::of(p.constants[0]), k[1] = Fast::of(p.constants[1]);
  }
  __device__ __forceinline__ void weigh(float (&s)[C::MI][C::NI][4], float scale, float shift,
                                        const float2 (&row)[C::MI][2], const float2* cols, const C& at) const {
#pragma unroll
    for (int j = 0; j < C::NI; j++) {
      const float4 col = *reinterpret_cast<const float4*>(cols + at.col(j, 0));
#pragma unroll
      for (int i = 0; i < C::MI; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const Fast z = Fast::of(fmaf(s[i][j][e], scale, shift));
          s[i][j][e] = F::slope(z, k).v * (row[i][e >> 1].x + (e & 1 ? col.z : col.x));
        }
    }
  }
};

// The same, and f of every visited pair added to the sum of its row; in kernels of their own, since the sums take registers.
template <class C, class F>
struct ValuesAndSlopes : SlopeWeights<C, F> {
  static constexpr bool valued = true;
  using SlopeWeights<C, F>::SlopeWeights;

  // visited: Pairs::visited, every bit of a whole tile.
  __device__ __forceinline__ void weigh(float (&s)[C::MI][C::NI][4], float scale, float shift, const float2 (&row)[C::MI][2],
                                        const float2* cols, const C& at, uint32_t visited, float (&values)[C::MI][2]) const {
#pragma unroll
    for (int i = 0; i < C::MI; i++)
#pragma unroll
      for (int j = 0; j < C::NI; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float value = F::value(Fast::of(fmaf(s[i][j][e], scale, shift)), this->k).v;
          values[i][e >> 1] += visited >> ((i * C::NI + j) * 4 + e) & 1 ? value : 0.f;
        }
    SlopeWeights<C, F>::weigh(s, scale, shift, row, cols, at);
  }
};

// acc += W Y through shared memory: the warps of a row share its weights. w and y: where tile and weights lie.
template <class C>
__device__ __forceinline__ void multiply_exchanged(float (&acc)[C::MI][C::DI][4], const float (&s)[C::MI][C::NI][4],
                                                   uint32_t w, uint32_t y, int d, const C& at) {
  using T = typename C::T;
#pragma unroll
  for (int i = 0; i < C::MI; i++)
#pragma unroll
    for (int j = 0; j < C::NI; j++)
#pragma unroll
      for (int h = 0; h < 2; h++)  // eight rows differ in swizzle and four lanes fill a unit: no bank conflict
        store_shared(w + swizzled(at.row(i, h), at.wn * C::NI + j) + at.t * 4, pack<T>(s[i][j][2 * h], s[i][j][2 * h + 1]));
  __syncthreads();
  const uint32_t left = w + left_lane(at.wm * C::MI * 16), right = y + (transposed_lane() ^ at.wn * 32);
#pragma unroll
  for (int k = 0; k < C::BN / 16; k++) {
    uint32_t a[C::MI][4];
#pragma unroll
    for (int i = 0; i < C::MI; i++) load_matrices(a[i], (left ^ k * 32) + i * 16 * chunk_bytes);
#pragma unroll
    for (int q = 0; q < C::DI / 2; q++) {
      if (q * C::WN * 16 >= d) continue;
      uint32_t b[4];
      load_matrices_transposed(b, (right ^ q % 2 * 64) + q / 2 * (C::BN * chunk_bytes) + k * 16 * chunk_bytes);
#pragma unroll
      for (int i = 0; i < C::MI; i++) {
        multiply_add<T>(acc[i][2 * q], a[i], b[0], b[1]);
        multiply_add<T>(acc[i][2 * q + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// acc += W Y from registers, in tf32. A fragment of W wants columns t and t + 4 of a k-step, where the accumulator holds 2t
// and 2t + 1: the sum over k may run in any order, so k is renamed, and Y read in rows 2t and 2t + 1. No shuffles; the four t
// read rows 0, 2, 4, 6, whose swizzles differ: no bank conflict.
template <class C>
__device__ __forceinline__ void multiply_registers(float (&acc)[C::MI][C::DI][4], const float (&s)[C::MI][C::NI][4],
                                                   uint32_t y, int d, const C& at) {
  const uint32_t even = swizzled(2 * at.t, at.g >> 2) + at.g % 4 * 4, odd = swizzled(2 * at.t + 1, at.g >> 2) + at.g % 4 * 4;
#pragma unroll
  for (int k = 0; k < C::NI; k++) {
    uint32_t a[C::MI][4];
#pragma unroll
    for (int i = 0; i < C::MI; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) a[i][e] = __float_as_uint(to_tf32(s[i][k][e % 2 * 2 + e / 2]));
#pragma unroll
    for (int j = 0; j < C::DI; j++) {
      if (j * 8 >= d) continue;
      const uint32_t at_k = y + j / 4 * (C::BN * chunk_bytes) + k * 8 * chunk_bytes;
      const uint32_t b0 = load_shared(at_k + (even ^ j % 4 * 32)), b1 = load_shared(at_k + (odd ^ j % 4 * 32));
#pragma unroll
      for (int i = 0; i < C::MI; i++) multiply_add<float>(acc[i][j], a[i], b0, b1);
    }
  }
}

}  // namespace fastcl::cuda
