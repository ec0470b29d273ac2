// What these kernels use of sm_90a, one PTX instruction a function: mbarriers, the copy engine's boxes, named barriers, registers.
#pragma once

#include <cuda.h>  // CUtensorMap, the type alone

#include "../tile.cuh"

namespace fastcl::cuda::hopper {

#define FASTCL_DEVICE static __device__ __forceinline__

// ---- mbarriers, by their address in shared memory --------------------------------------------------------------------
FASTCL_DEVICE void barrier_init(uint32_t at, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}
FASTCL_DEVICE void barriers_visible() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FASTCL_DEVICE void expect(uint32_t at, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
FASTCL_DEVICE void arrive(uint32_t at) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory"); }
FASTCL_DEVICE void wait(uint32_t at, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(at), "r"(parity)
                 : "memory");
  } while (!done);
}

// ---- clusters: CTAs that run together, each with its rank ---------------------------------------------------------------
FASTCL_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
  return rank;
}
FASTCL_DEVICE int cluster_size() {
  int size;
  asm("mov.u32 %0, %cluster_nctarank;" : "=r"(size));
  return size;
}
// All threads of the cluster that have not exited meet. At the start: before another CTA's barriers are used; at the end: before
// shared memory goes in which others still arrive.
FASTCL_DEVICE void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// An arrival at the barrier at this place in the shared memory of the CTA of this rank. It says that shared memory has been read:
// nothing that was written waits for it, and by .release.cluster ptxas puts a MEMBAR.ALL.GPU before every one.
FASTCL_DEVICE void arrive_at(uint32_t at, int rank) {
  asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(at), "r"(rank) : "memory");
}

// A warp has done with what lies in shared memory behind this barrier: every CTA of the cluster is told, by a lane each.
FASTCL_DEVICE void release(uint32_t at, int peers) {
  const int lane = threadIdx.x % 32;
  if (lane < peers) arrive_at(at, lane);
}

// ---- named barriers: turns and meetings of the consumers --------------------------------------------------------------
FASTCL_DEVICE void meet(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
FASTCL_DEVICE void pass(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

template <int N>
FASTCL_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
FASTCL_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- boxes of a map of rows: `column` and `row` of its first element ---------------------------------------------------
FASTCL_DEVICE void prefetch(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
FASTCL_DEVICE void load_box(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(map),
               "r"(column), "r"(row), "r"(barrier)
               : "memory");
}
// To the same place in both CTAs of a cluster, each told by its own barrier; read from the L2 cache once.
FASTCL_DEVICE void load_box_for(int peers, uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier) {
  if (peers == 1) return load_box(to, map, column, row, barrier);
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>(3))
      : "memory");
}
FASTCL_DEVICE void store_box(const CUtensorMap* map, int column, int row, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column), "r"(row), "r"(from)
               : "memory");
}
FASTCL_DEVICE void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the engine has read what it stores.
FASTCL_DEVICE void stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Ordinary stores to shared memory before what the engine and wgmma do with it.
FASTCL_DEVICE void stores_before_engine() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Four 8 x 8 matrices of two-byte pairs: lane l gives the address of row l % 8 of matrix l / 8.
FASTCL_DEVICE void store_matrices(uint32_t at, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

}  // namespace fastcl::cuda::hopper
