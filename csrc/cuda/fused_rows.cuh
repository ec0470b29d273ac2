// The forward sweep. A CTA takes blocks of 128 rows, one after another, and for each a run of column tiles; the loop over
// chunks of d runs on over tile borders, so that the next tile's first chunks are in flight while one is reduced.
#pragma once

#include "fused_reductions.cuh"

namespace fastcl::cuda {

template <class T>
using RowsLayout = Layout<T, 128, 128, 2, 4>;

// The t-th row block of a CTA. In the triangle the first blocks have the most tiles: deal them there and back.
__device__ __forceinline__ int dealt_block(int t, bool triangle) {
  const int cta = blockIdx.x, ctas = gridDim.x;
  return t * ctas + (triangle && t % 2 ? ctas - 1 - cta : cta);
}

// What is loaded next: chunks of one row block in the order in which they are multiplied.
template <class C>
struct Loader {
  using T = typename C::T;
  static constexpr int x_bytes = C::BM * chunk_bytes, y_bytes = C::BN * chunk_bytes;

  const T *x, *y;  // field by field, as in Pairs
  const int64_t x_stride, y_stride;
  const int n, m, d, stages, chunks;
  const bool resident;
  const uint32_t ring, kept;  // ring: [stages] of y's chunk and, unless resident, x's; kept: [chunks] of x
  int row0 = 0, first_tile = 0, tile = 0, chunk = 0, stage = 0;

  __device__ __forceinline__ Loader(const FusedRows& p, uint32_t shared)
      : x(static_cast<const T*>(p.sides.x)), y(static_cast<const T*>(p.sides.y)), x_stride(p.sides.x_stride),
        y_stride(p.sides.y_stride), n(static_cast<int>(p.sides.n)), m(static_cast<int>(p.sides.m)),
        d(static_cast<int>(p.sides.d)), stages(p.stages), chunks((d + C::width - 1) / C::width),
        resident(p.resident), ring(shared), kept(shared + p.stages * (p.resident ? y_bytes : x_bytes + y_bytes)) {}

  __device__ __forceinline__ uint32_t y_at(int s) const { return ring + s * (resident ? y_bytes : x_bytes + y_bytes); }
  __device__ __forceinline__ uint32_t x_at(int s, int c) const { return resident ? kept + c * x_bytes : y_at(s) + y_bytes; }
  __device__ __forceinline__ uint32_t end() const { return kept + (resident ? chunks * x_bytes : 0); }

  __device__ __forceinline__ void start(int row0_, int first) {
    row0 = row0_, first_tile = tile = first, chunk = stage = 0;
  }
  __device__ __forceinline__ void next() {
    if (!resident || tile == first_tile)
      load_chunk<T, C::BM, C::threads>(x_at(stage, chunk), x, x_stride, row0, n, chunk, d);
    load_chunk<T, C::BN, C::threads>(y_at(stage), y, y_stride, tile * C::BN, m, chunk, d);
    if (++chunk == chunks) chunk = 0, ++tile;
    if (++stage == stages) stage = 0;
  }
};

template <class C, class Reduce>
__device__ __forceinline__ void fused_rows_sweep(const FusedRows& p) {
  using T = typename C::T;
  using Part = typename Reduce::Part;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int n = static_cast<int>(p.sides.n), m = static_cast<int>(p.sides.m);
  const int tiles = (m + C::BN - 1) / C::BN, blocks = (n + C::BM - 1) / C::BM;
  const int per_split = (tiles + gridDim.y - 1) / gridDim.y;
  const int split_first = blockIdx.y * per_split, split_end = min(tiles, split_first + per_split);
  const int64_t row_line = blockIdx.y, col_line = blockIdx.x;
  Part* row_parts = static_cast<Part*>(p.row_parts) + row_line * n;
  Part* col_parts = static_cast<Part*>(p.col_parts) + col_line * m;

  Loader<C> load(p, shared_address(shared));
  unsigned char* const lines = shared + (load.end() - load.ring);
  const Pairs<C, Reduce::logsumexp> pairs(p.equation, p.sides, lines);
  const uint32_t x_lane = left_lane(pairs.at.wm * C::MI * 16), y_lane = right_lane(pairs.at.wn * C::NI * 8);

  for (int t = 0;; t++) {
    const int block = dealt_block(t, p.triangle), row0 = block * C::BM;
    if (t * static_cast<int>(gridDim.x) >= blocks) break;
    if (block >= blocks) continue;
    const int first = p.triangle ? max(split_first, block) : split_first;
    const int count = max(0, split_end - first) * load.chunks;
    load.start(row0, first);
    for (int k = 0; k < p.stages - 1; k++) {
      if (k < count) load.next();
      copies_commit();
    }
    pairs.stage_rows(row0);
    Reduce reduce(pairs, lines + line_bytes<C>);
    float s[C::MI][C::NI][4];
    clear(s);
    int chunk = 0, stage = 0, col0 = first * C::BN;
    for (int k = 0; k < count; k++) {
      copies_wait_for(p.stages);
      __syncthreads();  // chunk k is there for all warps, and all are done with chunk k - 1, whose stage is free
      if (k + p.stages - 1 < count) load.next();
      copies_commit();
      multiply_chunk<T>(s, load.x_at(stage, chunk) + x_lane, load.y_at(stage) + y_lane);
      if (++stage == p.stages) stage = 0;
      if (++chunk < load.chunks) continue;
      // The tile on the diagonal of the triangle holds its pairs in both orders: its columns are its rows.
      const bool columns = p.col_parts != nullptr && !(p.triangle && col0 == row0);
      reduce.tile(s, row0, col0, columns, col_parts, t == 0);
      clear(s);
      chunk = 0, col0 += C::BN;
    }
    reduce.finish(row_parts, row0);
    __syncthreads();
  }
}
template <class C, class Reduce>
__global__ void __launch_bounds__(C::threads, 1) fused_rows_kernel(const FusedRows p) {
  fused_rows_sweep<C, Reduce>(p);
}

// Joins the partial results in order: row parts of every split, then, in the triangle or where they are all there is, column
// parts of every CTA. In the triangle a CTA has seen only the columns right of its first block.
template <class Part>
__device__ __forceinline__ float fused_merged(const FusedMerge& p, int64_t k) {
  Part all{};
  if constexpr (sizeof(Part) == 8) all.x = -INFINITY;
  if (p.row_parts != nullptr)
    for (int64_t s = 0; s < p.splits; s++) all = join(all, static_cast<const Part*>(p.row_parts)[s * p.size + k]);
  if (p.col_parts != nullptr) {
    const int64_t ctas = p.triangle ? min(p.ctas, k / fused_tile) : p.ctas;
    for (int64_t c = 0; c < ctas; c++) all = join(all, static_cast<const Part*>(p.col_parts)[c * p.size + k]);
  }
  // In float64, so that r is rounded once: what its weights are off by where it is large.
  if constexpr (sizeof(Part) == 8) return static_cast<float>((double{all.x} + double{log2f(all.y)}) * (1.0 / double{log2_e}));
  else return all;
}
template <class Part>
__global__ void fused_merge_kernel(const FusedMerge p) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k < p.size) static_cast<float*>(p.out)[k] = fused_merged<Part>(p, k);
}

}  // namespace fastcl::cuda
