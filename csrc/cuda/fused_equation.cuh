// z, M and f on the tile of S that a CTA holds in registers.
#pragma once

#include <climits>

#include "fused.h"
#include "special.cuh"
#include "tile.cuh"

namespace fastcl::cuda {

// The equation of one sweep. A log-sum-exp has z in units of log 2, so that ex2 serves.
template <class C, bool LSE>
struct Pairs {
  static constexpr int MI = C::MI, NI = C::NI;

  C at;
  int n, m;
  float scale, shift, constants[2];
  bool sqdist, diagonal, grouped, within, terms;
  int64_t diff;
  const float *norm_x, *norm_y, *bias_x, *bias_y;
  const int64_t *group_x, *group_y;

  // Field by field: where this object held a copy of the whole Equation, nvcc 13.0 took its other fields from the kernel's
  // parameter too, at the same offsets (the emulator saw the addresses).
  __device__ __forceinline__ Pairs(const Equation& e, const FusedSides& sides)
      : n(static_cast<int>(sides.n)), m(static_cast<int>(sides.m)), diff(e.diff) {
    const float unit = LSE ? log2_e : 1.f;
    scale = *static_cast<const float*>(e.scale) * unit;
    shift = *static_cast<const float*>(e.shift) * unit;
    norm_x = static_cast<const float*>(e.norm_x), norm_y = static_cast<const float*>(e.norm_y);
    bias_x = static_cast<const float*>(e.bias_x), bias_y = static_cast<const float*>(e.bias_y);
    group_x = e.group_x, group_y = e.group_y;
    constants[0] = static_cast<float>(e.constants[0]), constants[1] = static_cast<float>(e.constants[1]);
    sqdist = e.operand == Operand::sqdist;
    diagonal = e.mask == MaskKind::off_diagonal;
    within = e.mask == MaskKind::within_groups;
    grouped = within || e.mask == MaskKind::across_groups;
    terms = sqdist || bias_x != nullptr || bias_y != nullptr;
  }

  // Whether some element of the tile may be outside the matrix or left out by the mask; the same for the whole CTA.
  __device__ __forceinline__ bool partial(int row0, int col0) const {
    const int64_t low = static_cast<int64_t>(col0) - row0 - (C::BM - 1), high = static_cast<int64_t>(col0) - row0 + C::BN - 1;
    const bool crossed = diagonal && diff >= low && diff <= high;
    return grouped || crossed || row0 + C::BM > n || col0 + C::BN > m;
  }

  // Where elements of a partial tile are not visited, put `nothing`.
  __device__ __forceinline__ void mask(float (&s)[MI][NI][4], int row0, int col0, float nothing) const {
    const int last_row = n - 1 - row0, last_col = m - 1 - col0;
    const int64_t here = diff + row0 - col0;
    const int met = diagonal && here > -C::BM && here < C::BN ? static_cast<int>(here) : INT_MIN / 2;
#pragma unroll
    for (int j = 0; j < NI; j++)
#pragma unroll
      for (int q = 0; q < 2; q++)
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int row = at.row(i, h), col = at.col(j, q);
            if (row > last_row || col > last_col || col - row == met) s[i][j][h * 2 + q] = nothing;
          }
    if (grouped) mask_groups(s, row0, col0, nothing);
  }
  __device__ __forceinline__ void mask_groups(float (&s)[MI][NI][4], int row0, int col0, float nothing) const {
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        __syncwarp();  // see form
        const int64_t group = load(group_x, min(row0 + at.row(i, h), n - 1));
#pragma unroll
        for (int j = 0; j < NI; j++)
#pragma unroll
          for (int q = 0; q < 2; q++)
            if ((load(group_y, min(col0 + at.col(j, q), m - 1)) == group) != within) s[i][j][h * 2 + q] = nothing;
      }
  }

  // The dot products of a tile become z, where distances or biases make them more than scale * s + shift.
  __device__ __forceinline__ void form(float (&s)[MI][NI][4], int row0, int col0) const {
    const float twice = sqdist ? -2.f : 1.f, least = sqdist ? 0.f : -INFINITY;
#pragma unroll
    for (int j = 0; j < NI; j++)
#pragma unroll
      for (int q = 0; q < 2; q++) {
        // Nothing moves over this: left to itself, ptxas starts all loads of a tile at once and runs out of registers.
        __syncwarp();
        const int col = min(col0 + at.col(j, q), m - 1);
        const float norm = term(norm_y, col), added = bias(bias_y, col) + shift;
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int row = min(row0 + at.row(i, h), n - 1);
            float& z = s[i][j][h * 2 + q];
            z = fmaf(larger(fmaf(twice, z, norm + term(norm_x, row)), least), scale, added + bias(bias_x, row));
          }
      }
  }

  // The same where nothing more is to it.
  __device__ __forceinline__ void form_plain(float (&s)[MI][NI][4]) const {
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int j = 0; j < NI; j++)
#pragma unroll
        for (int q = 0; q < 4; q++) s[i][j][q] = fmaf(s[i][j][q], scale, shift);
  }

 private:
  // Volatile: these loads hit the first-level cache, and the compiler shall not hold a tile's worth of them in registers.
  template <class V>
  static __device__ __forceinline__ V load(const V* values, int k) {
    V v;
    if constexpr (sizeof(V) == 8) asm volatile("ld.global.nc.b64 %0, [%1];" : "=l"(v) : "l"(values + k));
    else asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(values + k));
    return v;
  }
  static __device__ __forceinline__ float term(const float* values, int k) {
    return values == nullptr ? 0.f : load(values, k);
  }
  static __device__ __forceinline__ float bias(const float* values, int k) {
    return term(values, k) * (LSE ? log2_e : 1.f);
  }
};

}  // namespace fastcl::cuda
