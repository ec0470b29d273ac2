// z, M and f on the tile of S that a CTA holds in registers.
#pragma once

#include <climits>

#include "diagonals.cuh"
#include "fused.h"
#include "special.cuh"
#include "tile.cuh"

namespace fastcl::cuda {

// What a row or column brings to its elements besides the dot product.
struct alignas(16) Line {
  float norm, bias;
  int64_t group;
};

template <class C>
inline constexpr int line_bytes = (C::BM + C::BN) * sizeof(Line);

// The equation of one sweep. A log-sum-exp has z in units of log 2, so that ex2 serves.
template <class C, bool LSE>
struct Pairs {
  static constexpr int MI = C::MI, NI = C::NI;
  static_assert(C::BM + C::BN <= fused_least_period, "");

  C at;
  int n, m;
  float scale, shift, constants[2];
  bool sqdist, diagonal, grouped, within, terms;
  Diagonals diagonals;
  const float *norm_x, *norm_y, *bias_x, *bias_y;
  const int64_t *group_x, *group_y;
  Line *rows, *cols;  // shared [BM] and [BN]

  // Field by field: where this object held a copy of the whole Equation, nvcc 13.0 took its other fields from the kernel's
  // parameter too, at the same offsets (the emulator saw the addresses).
  __device__ __forceinline__ Pairs(const Equation& e, const FusedSides& sides, unsigned char* lines)
      : n(static_cast<int>(sides.n)), m(static_cast<int>(sides.m)), diagonals(e),
        rows(reinterpret_cast<Line*>(lines)), cols(rows + C::BM) {
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

  // Bring the lines of a row block to shared memory, to be read after a barrier; each with half of the shift, so that z of a pair
  // is one number whichever of its rows is x. Read where they are needed, from global memory, they cost so many registers that some
  // architectures spill.
  __device__ __forceinline__ void stage_rows(int row0) const {
    if (!terms && !grouped) return;
    for (int r = threadIdx.x; r < C::BM; r += C::threads) {
      const int row = min(row0 + r, n - 1);
      put(rows + r, term(norm_x, row), term(bias_x, row) * unit + 0.5f * shift, grouped ? group_x[row] : 0);
    }
  }
  // The same for the columns of a tile, and the barrier.
  __device__ __forceinline__ void stage_cols(int col0) const {
    if (!terms && !grouped) return;
    for (int c = threadIdx.x; c < C::BN; c += C::threads) {
      const int col = min(col0 + c, m - 1);
      put(cols + c, term(norm_y, col), term(bias_y, col) * unit + 0.5f * shift, grouped ? group_y[col] : 0);
    }
    __syncthreads();
  }

  // Whether some element of the tile may be outside the matrix or left out by the mask; the same for the whole CTA.
  __device__ __forceinline__ bool partial(int row0, int col0) const {
    return grouped || met(row0, col0) != Diagonals::nowhere || row0 + C::BM > n || col0 + C::BN > m;
  }

  // Where elements of a partial tile are not visited, put `nothing`.
  __device__ __forceinline__ void mask(float (&s)[MI][NI][4], int row0, int col0, float nothing) const {
    const int last_row = n - 1 - row0, last_col = m - 1 - col0;
    const int left_out = met(row0, col0);
#pragma unroll
    for (int j = 0; j < NI; j++)
#pragma unroll
      for (int q = 0; q < 2; q++)
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int row = at.row(i, h), col = at.col(j, q);
            if (row > last_row || col > last_col || col - row == left_out) s[i][j][h * 2 + q] = nothing;
          }
    if (grouped) mask_groups(s, nothing);
  }
  // The same as bits, one for each element in their order: where it is set, the element is visited.
  __device__ __forceinline__ uint32_t visited(int row0, int col0) const {
    static_assert(MI * NI * 4 <= 32, "");
    float s[MI][NI][4];
    uint32_t bits = 0;
#pragma unroll
    for (int k = 0; k < MI * NI * 4; k++) s[k / (NI * 4)][k / 4 % NI][k % 4] = 1.f;
    mask(s, row0, col0, 0.f);
#pragma unroll
    for (int k = 0; k < MI * NI * 4; k++) bits |= s[k / (NI * 4)][k / 4 % NI][k % 4] != 0.f ? 1u << k : 0u;
    return bits;
  }
  __device__ __forceinline__ void mask_groups(float (&s)[MI][NI][4], float nothing) const {
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int64_t group = rows[at.row(i, h)].group;
#pragma unroll
        for (int j = 0; j < NI; j++)
#pragma unroll
          for (int q = 0; q < 2; q++)
            if ((cols[at.col(j, q)].group == group) != within) s[i][j][h * 2 + q] = nothing;
      }
  }

  // The dot products of a tile become z, where distances or biases make them more than scale * s + shift.
  __device__ __forceinline__ void form(float (&s)[MI][NI][4]) const {
    const float twice = sqdist ? -2.f : 1.f, least = sqdist ? 0.f : -INFINITY;
#pragma unroll
    for (int j = 0; j < NI; j++)
#pragma unroll
      for (int q = 0; q < 2; q++) {
        const Line& y = cols[at.col(j, q)];
        const float norm = y.norm, bias = y.bias;
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const Line& x = rows[at.row(i, h)];
            float& z = s[i][j][h * 2 + q];
            z = fmaf(larger(fmaf(twice, z, x.norm + norm), least), scale, x.bias + bias);
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
  static constexpr float unit = LSE ? log2_e : 1.f;

  __device__ __forceinline__ int met(int row0, int col0) const {
    return diagonal ? diagonals.met<C::BM, C::BN>(row0, col0) : Diagonals::nowhere;
  }

  // In one 16-byte store: in three, lanes 16 bytes apart would meet in the banks.
  static __device__ __forceinline__ void put(Line* to, float norm, float bias, int64_t group) {
    *reinterpret_cast<int4*>(to) = make_int4(__float_as_int(norm), __float_as_int(bias), static_cast<int>(group), static_cast<int>(group >> 32));
  }
  static __device__ __forceinline__ float term(const float* values, int k) { return values == nullptr ? 0.f : values[k]; }
};

}  // namespace fastcl::cuda
