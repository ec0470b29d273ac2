// Gradients from a strip of weights: out (rows, columns) += unit A Z in float32, A the strip's transpose (W Y) or the strip (W^T X).
//
// Tiles of 128 rows and N columns of d; a step is 64 values of k, of which each consumer multiplies its own 64 rows of A and both the
// same Z. Two CTAs one above the other are a cluster: each brings half of Z to both. Where tiles are fewer than multiprocessors, k is
// cut into splits, and each writes a part of its own: no atomics, the same bits each time.
#pragma once

#include "start.cuh"

namespace fastcl::cuda::hopper {

template <int N>
struct ProductLayout {
  static constexpr int boxes = N / 64, stages = 4, a_bytes = 2 * box_bytes, stage = a_bytes + boxes * box_bytes;
  static constexpr int header = 1024, shared = header + stages * stage;
};

template <class T, int N, bool TRANSPOSED>
__global__ void __launch_bounds__(384, 1)
product(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap z_map, const __grid_constant__ HopperProduct p) {
  using L = ProductLayout<N>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t bars = shared_address(shared), ring = bars + L::header;
  const int peers = cluster_size(), row0 = blockIdx.x * 128, column0 = blockIdx.y * N;
  const int rows = static_cast<int>(TRANSPOSED ? p.n : p.m), chunks = (static_cast<int>(TRANSPOSED ? p.m : p.n) + 63) / 64;
  const int each = (chunks + gridDim.z - 1) / gridDim.z, first = blockIdx.z * each, end = min(chunks, first + each);
  if (threadIdx.x == 0) {
    for (int s = 0; s < L::stages; s++) barrier_init(bars + full_at + 8 * s, 1), barrier_init(bars + empty_at + 8 * s, 8 * peers);
    barriers_visible();
  }
  meet_cluster();
  int slot = 0, phase = 0;

  if (threadIdx.x < 128) {
    fewer_registers<24>();
    if (threadIdx.x != 0) return;
    prefetch(&w_map), prefetch(&z_map);
    const int rank = cluster_rank();
    for (int c = first; c < end; c++) {
      const uint32_t at = ring + slot * L::stage, full = bars + full_at + 8 * slot;
      wait(bars + empty_at + 8 * slot, phase ^ 1);
      expect(full, L::stage);
      for (int k = 0; k < 2; k++) {
        const int row = row0 + 64 * k;
        load_box(at + k * box_bytes, &w_map, TRANSPOSED ? row : c * 64, TRANSPOSED ? c * 64 : row, full);
      }
      for (int k = rank; k < L::boxes; k += peers) load_box_for(peers, at + L::a_bytes + k * box_bytes, &z_map, column0 + 64 * k, c * 64, full);
      if (++slot == L::stages) slot = 0, phase ^= 1;
    }
    return;
  }
  more_registers<240>();
  const Place at;
  float acc[N / 2];
#pragma unroll
  for (int k = 0; k < N / 2; k++) acc[k] = 0.f;
  int before = 0;
  for (int c = first; c < end; c++) {
    const uint32_t stage = ring + slot * L::stage;
    wait(bars + full_at + 8 * slot, phase);
    products_fence();
    const uint32_t mine = stage + at.me * box_bytes;
    const uint64_t a = TRANSPOSED ? mn_major(mine, box_bytes) : k_major(mine), z = mn_major(stage + L::a_bytes, box_bytes);
#pragma unroll
    for (int k = 0; k < 4; k++) multiply<T, N, TRANSPOSED, 1>(acc, a + (TRANSPOSED ? 128 : 2) * k, z + 128 * k, 1);
    products_commit();
    if (c > first) {
      products_wait<1>();
      release(bars + empty_at + 8 * before, peers);
    }
    before = slot;
    if (++slot == L::stages) slot = 0, phase ^= 1;
  }
  products_wait<0>();
  settle(acc);
  // This CTA alone has these elements, and launches follow one another. Four lanes have a whole sector of one row.
  const float unit = p.unit != nullptr ? *static_cast<const float*>(p.unit) : 1.f;
  float* const out = static_cast<float*>(p.out) + int64_t(blockIdx.z) * rows * p.columns;
  const bool adds = gridDim.z == 1;
#pragma unroll
  for (int k = 0; k < N / 2; k++) {
    const int row = row0 + at.me * 64 + at.warp * 16 + at.g + k % 4 / 2 * 8, column = column0 + k / 4 * 8 + 2 * at.t + k % 2;
    if (row >= rows || column >= p.columns) continue;
    float& to = out[row * p.columns + column];
    to = adds ? fmaf(acc[k], unit, to) : acc[k] * unit;
  }
  meet_cluster();
}

inline bool plausible(const HopperProduct& p) {
  const int64_t rows = p.transposed ? p.n : p.m;
  return p.m >= 1 && p.n >= 1 && p.m <= most_rows && p.n <= most_rows && p.d >= 1 && p.d <= 1 << 20 && p.columns >= 1 &&
         p.columns <= p.d && readable(p.weights, p.pitch, p.n) && readable(p.z, p.z_stride, p.d) && two_bytes(p.dtype) &&
         p.splits >= 1 && p.splits <= 65535 && rows * p.splits <= int64_t{1} << 40;
}

template <class T, int N, bool TRANSPOSED>
int start_product(const HopperProduct& p, void* stream) {
  using L = ProductLayout<N>;
  CUtensorMap w, z;
  if (!plausible(p) || !make_map(&w, p.dtype, p.weights, p.m, p.n, p.pitch, 64) || !make_map(&z, p.dtype, p.z, TRANSPOSED ? p.m : p.n, p.d, p.z_stride, 64))
    return cudaErrorInvalidValue;
  const auto over = [](int64_t a, int64_t b) { return static_cast<unsigned>(ceil_div(a, b)); };
  const unsigned blocks = over(TRANSPOSED ? p.n : p.m, 128), peers = blocks > 1 ? 2 : 1;
  const dim3 grid(over(blocks, peers) * peers, over(p.columns, N), static_cast<unsigned>(p.splits));
  return start(product<T, N, TRANSPOSED>, grid, dim3(peers), L::shared, stream, w, z, p);
}

template <class T>
int start_product(const HopperProduct& p, void* stream) {
  if (p.columns > 128) return p.transposed ? start_product<T, 256, true>(p, stream) : start_product<T, 256, false>(p, stream);
  return p.transposed ? start_product<T, 128, true>(p, stream) : start_product<T, 128, false>(p, stream);
}

}  // namespace fastcl::cuda::hopper
