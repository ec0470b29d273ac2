// What a tile of S adds to the reductions: one exponential a pair and no maximum, or f.
#pragma once

#include "pairs.cuh"

namespace fastcl::cuda::hopper {

// 2^(z - reference), z in units of log 2 and without the shift.
struct Exponential {
  static __device__ __forceinline__ float of(float z, const Task&) { return ex2(z); }
};
template <class F>
struct PairFunction {
  static __device__ __forceinline__ float of(float z, const Task& p) {
    const Fast k[2] = {Fast(p.equation.constants[0]), Fast(p.equation.constants[1])};
    return F::value(Fast::of(z), k).v;
  }
};

template <int NX, class Term, bool GENERAL>
struct Rows {
  static constexpr int boxes = 0;  // of weights
  static constexpr bool logsumexp = __is_same(Term, Exponential);

  Pairs<NX, logsumexp, false, GENERAL> pairs;
  Sums<NX> sums;

  __device__ __forceinline__ explicit Rows(const Task& p) : pairs(p) {}
  static __host__ __device__ __forceinline__ bool has_sums(const HopperTiles&) { return true; }

  // At the beginning of a block of x; `first`: of this CTA.
  __device__ __forceinline__ void begin(const Task& p, int x0, bool first) {
    sums.clear();
    if (!GENERAL || (!p.terms && !p.groups)) return;
    if (!first) meet(3, 256);  // nobody reads the last block's lines any more
    pairs.stage(p, x0);
    meet(3, 256);
  }

  template <bool TERMS, bool MASKED>
  __device__ __forceinline__ void add(const Task& p, const float (&acc)[NX / 2], int x0, int y, bool first, bool columns, const Place& at) {
    const Visited visited = MASKED ? pairs.visited(p, x0, y, at) : Visited{};
    const Brought of_y = TERMS ? pairs.of_y(p, y) : Brought{};
    float down[2] = {0.f, 0.f};
#pragma unroll
    for (int c = 0; c < NX / 8; c++) {
      const Brought x = TERMS ? pairs.of_x(p, c, at) : Brought{};
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const float z = TERMS ? pairs.form(p, acc[4 * c + q], x, q % 2, of_y, q / 2) : pairs.plain(acc[4 * c + q]);
        float v = Term::of(z, p);
        if (MASKED && !pairs.visits(p, visited, 8 * c + q % 2, q / 2, x.group[q % 2], of_y.group[q / 2])) v = 0.f;
        down[q / 2] += v;
        sums.across[2 * c + q % 2] += v;
      }
    }
    if (columns) Sums<NX>::put(down, static_cast<float*>(p.col_parts) + int64_t(blockIdx.x) * p.m, y, p.m, first, at);
  }

  // Two straight ways and not one with conditions: changed in place under a condition the accumulators would be copied.
  __device__ __forceinline__ void tile(const Task& p, const float (&acc)[NX / 2], int x0, int y0, bool first, bool columns, uint32_t,
                                       const CUtensorMap*) {
    const Place at;
    const int y = y0 + at.warp * 16 + at.g;
    columns = columns && p.col_parts != nullptr;
    const bool whole = pairs.whole(p, x0, y0);
    if (whole && !(GENERAL && p.terms)) add<false, false>(p, acc, x0, y, first, columns, at);
    else if (whole) add<GENERAL, false>(p, acc, x0, y, first, columns, at);
    else add<GENERAL, true>(p, acc, x0, y, first, columns, at);
  }
  __device__ __forceinline__ void end(const Task&) const {}
  __device__ __forceinline__ void finish(const Task& p, int x0, float* scratch) const {
    sums.finish(static_cast<float*>(p.row_parts) + int64_t(blockIdx.y) * p.n, x0, p.n, scratch);
  }
};

}  // namespace fastcl::cuda::hopper
