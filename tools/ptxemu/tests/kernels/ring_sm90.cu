// C = A B^T of 64 x 64 by a ring of two stages: one warp asks the copy engine for boxes, four warps multiply them by wgmma, and C
// leaves through shared memory by the copy engine. Each line that orders something is there to be left out by a test.
#include <cuda.h>
#include <cuda_bf16.h>
#include <stdint.h>

#define DEVICE static __device__ __forceinline__
DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
DEVICE void wait(uint32_t bar, uint32_t parity) {
  asm volatile("{ .reg .pred p; W: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra W; }" ::"r"(bar), "r"(parity) : "memory");
}
DEVICE void load_box(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(to), "l"(map), "r"(x), "r"(y), "r"(bar) : "memory");
}
DEVICE uint64_t descriptor(uint32_t a) { return (uint64_t)((a & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62; }
DEVICE void multiply(float (&c)[32], uint64_t a, uint64_t b) {
#define R4(k) "+f"(c[k]), "+f"(c[k + 1]), "+f"(c[k + 2]), "+f"(c[k + 3])
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1, 0, 0;"
               : R4(0), R4(4), R4(8), R4(12), R4(16), R4(20), R4(24), R4(28) : "l"(a), "l"(b));
}

extern "C" __global__ void __launch_bounds__(160) ring(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                                                       const __grid_constant__ CUtensorMap c_map, int chunks) {
  __shared__ __align__(1024) unsigned char stages[2][2][8192];
  __shared__ __align__(128) float out[64][64];
  __shared__ __align__(8) uint64_t bars[4];
  const uint32_t full = shared_address(bars), empty = full + 16;
  if (threadIdx.x == 0)
    for (int s = 0; s < 2; s++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * s) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 4;" ::"r"(empty + 8 * s) : "memory");
    }
  __syncthreads();
  if (threadIdx.x >= 128) {
    if (threadIdx.x > 128) return;
    for (int k = 0; k < chunks; k++) {
      const int s = k & 1;
      wait(empty + 8 * s, (k >> 1 & 1) ^ 1);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 16384;" ::"r"(full + 8 * s) : "memory");
      load_box(shared_address(stages[s][0]), &a_map, k * 64, 0, full + 8 * s);
      load_box(shared_address(stages[s][1]), &b_map, k * 64, 0, full + 8 * s);
    }
    return;
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float c[32] = {};
  for (int k = 0; k < chunks; k++) {
    const int s = k & 1;
    wait(full + 8 * s, k >> 1 & 1);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    const uint64_t a = descriptor(shared_address(stages[s][0])), b = descriptor(shared_address(stages[s][1]));
    for (int i = 0; i < 4; i++) multiply(c, a + 2 * i, b + 2 * i);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + 8 * s) : "memory");
  }
  for (int k = 0; k < 32; k++) out[warp * 16 + lane / 4 + k % 4 / 2 * 8][k / 4 * 8 + lane % 4 * 2 + k % 2] = c[k];
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("bar.sync 1, 128;" ::: "memory");
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %1}], [%2];" ::"l"(&c_map), "r"(0), "r"(shared_address(out)) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
}

extern "C" int launch(const CUtensorMap* maps, int chunks) {
  ring<<<1, 160>>>(maps[0], maps[1], maps[2], chunks);
  return (int)cudaGetLastError();
}
