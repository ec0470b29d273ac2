// What a sweep makes of each tile of S: row and column reductions, one exponential for each element of a log-sum-exp.
//
// Column results go to this CTA's own row of a workspace, read and written by the same thread each time: no atomics, and
// merge_parts joins the CTAs in order, so that no bit depends on the schedule.
#pragma once

#include "fused_equation.cuh"

namespace fastcl::cuda {

// (top, sum) stands for sum * 2^top; (-inf, 0) is nothing. A NaN stays in the sum.
__device__ __forceinline__ float2 join(float2 a, float2 b) {
  const float top = fmaxf(a.x, b.x);
  if (top == -INFINITY) return make_float2(top, a.y + b.y);
  return make_float2(top, a.y * ex2(a.x - top) + b.y * ex2(b.x - top));
}
__device__ __forceinline__ float join(float a, float b) { return a + b; }

// Where partial results of a tile's rows and columns meet: one line for each warp along the other side.
template <class C, class Part>
struct Meeting {
  Part* cols;  // shared [WM][BN]
  Part* rows;  // shared [WN][BM]

  __device__ __forceinline__ explicit Meeting(unsigned char* shared)
      : cols(reinterpret_cast<Part*>(shared)), rows(cols + C::WM * C::BN) {}

  // Join the warps' columns into this CTA's row of the workspace. cols is written again after the next tile's barriers.
  __device__ __forceinline__ void flush_columns(Part* out, int col0, int m, bool first) const {
    __syncthreads();
    for (int c = threadIdx.x; c < C::BN && col0 + c < m; c += C::threads) {
      Part v = cols[c];
#pragma unroll
      for (int k = 1; k < C::WM; k++) v = join(v, cols[k * C::BN + c]);
      out[col0 + c] = first ? v : join(out[col0 + c], v);
    }
  }
  __device__ __forceinline__ void flush_rows(Part* out, int row0, int n) const {
    __syncthreads();
    for (int r = threadIdx.x; r < C::BM && row0 + r < n; r += C::threads) {
      Part v = rows[r];
#pragma unroll
      for (int k = 1; k < C::WN; k++) v = join(v, rows[k * C::BM + r]);
      out[row0 + r] = v;
    }
  }
};

// Log-sum-exp. All elements of a warp's tile share one reference, the largest z that the warp has seen, so that one
// exponential serves row and column. What lies more than 126 below it vanishes: where a row's or column's sum in this tile
// falls under 2^-84, what vanished could matter, and the warp does the tile again with a reference for each row and column.
// That path keeps its row state in shared memory, so that it costs the other one no registers.
template <class C, bool COLUMNS>
struct LogSumExp {
  using Part = float2;
  static constexpr int MI = C::MI, NI = C::NI;
  static constexpr bool logsumexp = true;

  Pairs<C, true> p;
  Meeting<C, Part> meet;
  float reference = -INFINITY, sums[MI][2];

  __device__ __forceinline__ LogSumExp(const Pairs<C, true>& pairs, unsigned char* shared) : p(pairs), meet(shared) {
#pragma unroll
    for (int i = 0; i < MI; i++) sums[i][0] = sums[i][1] = 0.f;
    // A warp's lanes write and read this: each row of a line belongs to one warp.
    for (int i = threadIdx.x; i < C::WN * C::BM; i += C::threads) meet.rows[i] = make_float2(-INFINITY, 0.f);
  }

  __device__ __forceinline__ void tile(float (&s)[MI][NI][4], int row0, int col0, bool columns, Part* out, bool first) {
    const bool partial = p.partial(row0, col0);
    float scale = p.scale, shift = p.shift;
    if (partial || p.terms) {
      p.stage_cols(col0);
      if (p.terms) p.form(s);
      else p.form_plain(s);
      if (partial) p.mask(s, row0, col0, -INFINITY);
      scale = 1.f, shift = 0.f;
    }
    if (!shared_reference(s, scale, shift, columns)) exact(s, scale, shift, columns);
    if constexpr (COLUMNS)
      if (columns) meet.flush_columns(out, col0, p.m, first);
  }

  // False, and nothing done, where one reference is not enough.
  __device__ __forceinline__ bool shared_reference(float (&s)[MI][NI][4], float scale, float shift, bool columns) {
    float top = s[0][0][0];
    const bool rising = scale >= 0.f;
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int j = 0; j < NI; j++)
#pragma unroll
        for (int q = 0; q < 4; q++) top = rising ? fmaxf(top, s[i][j][q]) : fminf(top, s[i][j][q]);
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
      const float other = __shfl_xor_sync(~0u, top, o);
      top = rising ? fmaxf(top, other) : fminf(top, other);
    }
    // The difference is rounded, and what it says of the maximum is kept: beside a large shift it would be another number.
    const float offset = shift - fmaxf(reference, fmaf(top, scale, shift)), next = shift - offset;
    float row[MI][2] = {}, col[NI * 2] = {}, least = INFINITY;
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int j = 0; j < NI; j++)
#pragma unroll
        for (int q = 0; q < 4; q++) {
          const float v = ex2(fmaf(s[i][j][q], scale, offset));
          row[i][q >> 1] += v;
          if (COLUMNS) col[j * 2 + (q & 1)] += v;
        }
#pragma unroll
    for (int i = 0; i < MI; i++) least = fminf(least, fminf(row[i][0], row[i][1]));
#pragma unroll
    for (int j = 0; j < NI * 2; j++)
      if (COLUMNS) least = fminf(least, col[j]);
    if (!__all_sync(~0u, least >= 0x1p-84f && next > -INFINITY)) return false;
    const float factor = next > reference ? ex2(reference - next) : 1.f;
    reference = next;
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) sums[i][h] = fmaf(sums[i][h], factor, row[i][h]);
    if constexpr (COLUMNS)
      if (columns) keep_columns(col, next);
    return true;
  }

  __device__ __forceinline__ void keep_columns(float (&col)[NI * 2], float top) const {
    scatter_sums(col);
    static_assert(NI % 4 == 0, "");
    if constexpr (NI % 8 == 0) {
#pragma unroll
      for (int k = 0; k < NI / 4; k += 2)  // two neighbours in one 16-byte store: no bank conflict
        *reinterpret_cast<float4*>(meet.cols + p.at.wm * C::BN + p.at.scattered(k)) = make_float4(top, col[k], top, col[k + 1]);
    } else {
      meet.cols[p.at.wm * C::BN + p.at.scattered(0)] = make_float2(top, col[0]);
    }
  }

  // A reference for each row and each column: right for any z.
  __device__ __forceinline__ void exact(float (&s)[MI][NI][4], float scale, float shift, bool columns) {
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int j = 0; j < NI; j++)
#pragma unroll
        for (int q = 0; q < 4; q++) s[i][j][q] = fmaf(s[i][j][q], scale, shift);
    exact_rows(s);
    if constexpr (COLUMNS)
      if (columns) exact_columns(s);
  }
  __device__ __forceinline__ void exact_rows(const float (&s)[MI][NI][4]) {
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float top = -INFINITY, sum = 0.f;
#pragma unroll
        for (int j = 0; j < NI; j++) top = fmaxf(top, fmaxf(s[i][j][h * 2], s[i][j][h * 2 + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float from = top == -INFINITY ? 0.f : top;
#pragma unroll
        for (int j = 0; j < NI; j++) sum += ex2(s[i][j][h * 2] - from) + ex2(s[i][j][h * 2 + 1] - from);
        sum = row_sum(sum);
        float2& state = meet.rows[p.at.wn * C::BM + p.at.row(i, h)];
        if (p.at.t == 0) state = join(state, make_float2(top, sum));
      }
  }
  __device__ __forceinline__ void exact_columns(const float (&s)[MI][NI][4]) const {
#pragma unroll
    for (int j = 0; j < NI; j++)
#pragma unroll
      for (int q = 0; q < 2; q++) {
        float top = -INFINITY, sum = 0.f;
#pragma unroll
        for (int i = 0; i < MI; i++) top = fmaxf(top, fmaxf(s[i][j][q], s[i][j][q + 2]));
#pragma unroll
        for (int o = 4; o < 32; o *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
        const float from = top == -INFINITY ? 0.f : top;
#pragma unroll
        for (int i = 0; i < MI; i++) sum += ex2(s[i][j][q] - from) + ex2(s[i][j][q + 2] - from);
#pragma unroll
        for (int o = 4; o < 32; o *= 2) sum += __shfl_xor_sync(~0u, sum, o);
        if (p.at.g == 0) meet.cols[p.at.wm * C::BN + p.at.col(j, q)] = make_float2(top, sum);
      }
  }

  __device__ __forceinline__ void finish(Part* out, int row0) {
    __syncthreads();  // a block without tiles comes here from the constructor
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float sum = row_sum(sums[i][h]);
        float2& state = meet.rows[p.at.wn * C::BM + p.at.row(i, h)];
        if (p.at.t == 0) state = join(state, make_float2(sum == 0.f ? -INFINITY : reference, sum));
      }
    meet.flush_rows(out, row0, p.n);
  }
};

// Sums of f. Row sums stay in registers, f in place of z.
template <class C, class F>
struct Sum {
  using Part = float;
  static constexpr int MI = C::MI, NI = C::NI;
  static constexpr bool logsumexp = false;

  Pairs<C, false> p;
  Meeting<C, Part> meet;
  Fast k[2];
  float sums[MI][2];

  __device__ __forceinline__ Sum(const Pairs<C, false>& pairs, unsigned char* shared) : p(pairs), meet(shared) {
    k[0] = Fast::of(p.constants[0]), k[1] = Fast::of(p.constants[1]);
#pragma unroll
    for (int i = 0; i < MI; i++) sums[i][0] = sums[i][1] = 0.f;
  }

  __device__ __forceinline__ void tile(float (&s)[MI][NI][4], int row0, int col0, bool columns, Part* out, bool first) {
    p.stage_cols(col0);
    if (p.terms) p.form(s);
    else p.form_plain(s);
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int j = 0; j < NI; j++) {
        __syncwarp();  // nothing moves over this: left to itself, ptxas takes a tile at once and runs out of registers
#pragma unroll
        for (int q = 0; q < 4; q++) s[i][j][q] = F::value(Fast::of(s[i][j][q]), k).v;
      }
    if (p.partial(row0, col0)) p.mask(s, row0, col0, 0.f);
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float row = 0.f;  // the tile's own sum first: shorter chains of additions, smaller errors
#pragma unroll
        for (int j = 0; j < NI; j++) row += s[i][j][h * 2] + s[i][j][h * 2 + 1];
        sums[i][h] += row;
      }
    if (!columns) return;
    float col[NI * 2] = {};
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int j = 0; j < NI; j++)
#pragma unroll
        for (int q = 0; q < 4; q++) col[j * 2 + (q & 1)] += s[i][j][q];
    scatter_sums(col);
#pragma unroll
    for (int c = 0; c < NI / 4; c++) meet.cols[p.at.wm * C::BN + p.at.scattered(c)] = col[c];
    meet.flush_columns(out, col0, p.m, first);
  }

  __device__ __forceinline__ void finish(Part* out, int row0) {
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float sum = row_sum(sums[i][h]);
        if (p.at.t == 0) meet.rows[p.at.wn * C::BM + p.at.row(i, h)] = sum;
      }
    meet.flush_rows(out, row0, p.n);
  }
};

}  // namespace fastcl::cuda
