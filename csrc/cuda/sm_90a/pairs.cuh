// z and M on a warpgroup's tile: 64 rows of y along the accumulator's rows, NX rows of x along its columns.
//
// The streamed side lies along the ROWS: a tile's sums over x take four shuffles, and the sums over y stay in NX / 4 registers
// for the whole sweep. The other way round a tile would cost 28 to 56 shuffles and an exchange between warps.
#pragma once

#include "../diagonals.cuh"
#include "../special.cuh"
#include "launch.h"
#include "wgmma.cuh"

namespace fastcl::cuda::hopper {

// A launch with what the host derives from it: kernels read all of it from constant memory, which costs no registers.
struct Task : HopperTiles {
  int n, m, chunks;         // rows of x and of y, steps of 64 columns of d
  int blocks, tiles, each;  // blocks of x; tiles of y, and how many a split takes
  int stages, header;       // of the ring; bytes before x or the ring in shared memory: barriers, lines
  bool terms, groups;       // in the equation
};
// Barriers come first in shared memory, at places that are constants: full and empty of up to 16 stages, then x's.
inline constexpr int full_at = 0, empty_at = 128, x_full_at = 256, x_empty_at = 264, lines_at = 384;

// acc[4 * c + q] is the pair of x row 8 * c + 2 * t + q % 2 and y row 16 * warp + g + 8 * (q / 2) of the tile.
// Read anew for every tile, so that none of it stays in registers while products run.
struct Place {
  int lane, g, t, warp, me;

  __device__ __forceinline__ Place() {
    int thread;
    asm volatile("mov.u32 %0, %tid.x;" : "=r"(thread));
    lane = thread & 31, g = lane >> 2, t = lane & 3, warp = thread >> 5 & 3, me = thread / 128 - 1;
  }
};

// Shared memory for what the rows of a block bring: factor and reference, bias and norm, group.
inline int lines_bytes(const Equation& e, int rows, bool weights) { return rows * 8 * (weights + hopper_terms(e) + hopper_groups(e)); }

// What two neighbouring rows of x, and a thread's two rows of y, bring to their pairs.
struct Brought {
  float factor[2] = {}, reference[2] = {}, bias[2] = {}, norm[2] = {};
  int64_t group[2] = {};
};

// Which pairs count: x row 8 * c + q lies inside if it is under `left`, and is left out on the diagonal where it equals `self`.
struct Visited {
  int left, self;
  bool inside[2];
};

// GENERAL: biases, distances and groups may be in it.
template <int NX, bool LSE, bool WEIGHTS, bool GENERAL>
struct Pairs {
  static_assert(NX + 64 <= hopper_least_period, "");
  static constexpr float base = LSE ? log2_e : 1.f;
  static constexpr bool whole_shift = LSE && !WEIGHTS;  // an integer, added last

  float scale, shift;

  __device__ __forceinline__ explicit Pairs(const Task& p) {
    scale = *static_cast<const float*>(p.equation.scale) * base;
    // The reductions of a log-sum-exp leave the shift to the merge: what is added here is an integer, which rounds no digit away.
    shift = LSE && !WEIGHTS ? -*static_cast<const float*>(p.reference) : *static_cast<const float*>(p.equation.shift) * base;
  }

  // Brings the lines of x's rows from x0 on to shared memory; read after the consumers' barrier.
  __device__ __forceinline__ void stage(const Task& p, int x0) const {
    const int k = threadIdx.x - 128, row = min(x0 + k, p.n - 1);
    if (k >= NX) return;
    const Equation& e = p.equation;
    if (WEIGHTS) {
      const float2 f = x0 + k < p.n ? static_cast<const float2*>(p.x_factors)[p.x0 + row] : make_float2(0.f, 0.f);
      line<float>(lines_at)[k] = f.x, line<float>(lines_at)[NX + k] = f.y;
    }
    if (GENERAL && p.terms) line<float>(biases_at)[k] = term(e.bias_x, p.x0 + row) * base, line<float>(biases_at)[NX + k] = term(e.norm_x, p.x0 + row);
    if (GENERAL && p.groups) line<int64_t>(groups_at(p))[k] = e.group_x[p.x0 + row];
  }
  __device__ __forceinline__ Brought of_x(const Task& p, int c, const Place& at) const {
    Brought x;
    const int k = 8 * c + 2 * at.t;
    if (WEIGHTS) take(x.factor, lines_at, k), take(x.reference, lines_at, NX + k);
    if (GENERAL && p.terms) take(x.bias, biases_at, k), take(x.norm, biases_at, NX + k);
    if (GENERAL && p.groups) {
      const longlong2 v = *reinterpret_cast<const longlong2*>(line<int64_t>(groups_at(p)) + k);
      x.group[0] = v.x, x.group[1] = v.y;
    }
    return x;
  }
  // Of rows y and y + 8; bias with the shift.
  __device__ __forceinline__ Brought of_y(const Task& p, int y) const {
    Brought b;
    const Equation& e = p.equation;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int64_t row = p.y0 + min(y + 8 * h, p.m - 1);
      b.bias[h] = whole_shift ? 0.f : shift;
      if (GENERAL) b.bias[h] += term(e.bias_y, row) * base, b.norm[h] = term(e.norm_y, row);
      if (WEIGHTS) {
        const float2 f = y + 8 * h < p.m ? static_cast<const float2*>(p.y_factors)[row] : make_float2(0.f, 0.f);
        b.factor[h] = f.x, b.reference[h] = f.y;
      }
      if (GENERAL && p.groups) b.group[h] = e.group_y[row];
    }
    return b;
  }

  // The block's row of x that row y leaves out, on the diagonal that may meet 64 rows from y on.
  static __device__ __forceinline__ int64_t left_out(const Task& p, int x0, int y) {
    return nearest_diagonal<64, NX>(p.y0 + y - (p.x0 + x0 + p.equation.diff), p.equation.period);
  }
  // Whether every pair of the tile counts; the same for the whole warpgroup.
  __device__ __forceinline__ bool whole(const Task& p, int x0, int y0) const {
    if (x0 + NX > p.n || y0 + 64 > p.m || (GENERAL && p.groups)) return false;
    const int64_t met = left_out(p, x0, y0);
    return p.equation.mask != MaskKind::off_diagonal || met >= NX || met <= -64;
  }
  __device__ __forceinline__ Visited visited(const Task& p, int x0, int y, const Place& at) const {
    const int64_t met = left_out(p, x0, y), far = 1 << 20;
    Visited v{p.n - x0 - 2 * at.t, static_cast<int>(p.equation.mask == MaskKind::off_diagonal ? min(max(met, -far), far) : far) - 2 * at.t,
              {y < p.m, y + 8 < p.m}};
    asm volatile("" : "+r"(v.left), "+r"(v.self));  // else NX / 4 comparisons move out of the loop over tiles, into registers
    return v;
  }
  // `c`: 8 * its group of columns + q % 2; h: which of the thread's rows of y.
  __device__ __forceinline__ bool visits(const Task& p, const Visited& v, int c, int h, int64_t x, int64_t y) const {
    const bool met = GENERAL && p.groups && (x == y) != (p.equation.mask == MaskKind::within_groups);
    return c < v.left && c != v.self + 8 * h && v.inside[h] && !met;
  }

  // z of a dot product where only scale and shift are to it, and where there is more.
  __device__ __forceinline__ float plain(float dot) const { return fmaf(dot, scale, shift); }
  __device__ __forceinline__ float form(const Task& p, float dot, const Brought& x, int q, const Brought& y, int h) const {
    if (!GENERAL) return fmaf(dot, scale, x.bias[q] + y.bias[h]);
    const bool sqdist = p.equation.operand == Operand::sqdist;
    const float u = larger(fmaf(sqdist ? -2.f : 1.f, dot, x.norm[q] + y.norm[h]), sqdist ? 0.f : -INFINITY);
    const float z = fmaf(u, scale, x.bias[q] + y.bias[h]);
    return whole_shift ? z + shift : z;
  }

 private:
  // Lines in shared memory: [NX] factors and references from lines_at on, [NX] biases and norms, [NX] groups.
  static constexpr uint32_t biases_at = lines_at + (WEIGHTS ? 8 * NX : 0);
  static __device__ __forceinline__ uint32_t groups_at(const Task& p) { return biases_at + (p.terms ? 8 * NX : 0); }

  static __device__ __forceinline__ float term(const void* vector, int64_t k) { return vector == nullptr ? 0.f : static_cast<const float*>(vector)[k]; }
  template <class V>
  static __device__ __forceinline__ V* line(uint32_t at) {
    extern __shared__ __align__(1024) unsigned char shared[];
    return reinterpret_cast<V*>(shared + at);
  }
  static __device__ __forceinline__ void take(float (&to)[2], uint32_t at, int k) {
    const float2 v = *reinterpret_cast<const float2*>(line<float>(at) + k);
    to[0] = v.x, to[1] = v.y;
  }
};

// Running sums of a consumer: over y for each of the thread's rows of x, kept for a whole sweep, and over x for its two rows of y.
template <int NX>
struct Sums {
  float across[NX / 4 + (NX == 0)];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < NX / 4; k++) across[k] = 0.f;
  }
  // A tile's sums over x into this CTA's line of `parts`: the same thread each time.
  static __device__ __forceinline__ void put(float (&down)[2], float* line, int y, int m, bool first, const Place& at) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float v = row_sum(down[h]);
      float* const to = line + y + 8 * h;
      if (at.t == 0 && y + 8 * h < m) *to = first ? v : *to + v;
    }
  }
  // The sums over y, joined over a warp's g and over eight warps in `scratch` [8][NX].
  __device__ __forceinline__ void finish(float* line, int x0, int n, float* scratch) const {
    const Place at;
#pragma unroll
    for (int k = 0; k < NX / 4; k++) {
      float v = across[k];
#pragma unroll
      for (int o = 4; o < 32; o *= 2) v += __shfl_xor_sync(~0u, v, o);
      if (at.g == 0) scratch[(at.me * 4 + at.warp) * NX + k / 2 * 8 + 2 * at.t + k % 2] = v;
    }
    meet(3, 256);
    const int k = threadIdx.x - 128;
    if (k >= NX || x0 + k >= n) return;
    float v = 0.f;
#pragma unroll
    for (int w = 0; w < 8; w++) v += scratch[w * NX + k];
    line[x0 + k] = v;
  }
};

}  // namespace fastcl::cuda::hopper
