// Products of warpgroups: c (64 x N, float32) += A B, a k-step of 16 at a time, both operands in shared memory.
//
// Operands lie as the copy engine brings boxes of 64 two-byte columns, in rows of 128 bytes with the 128-byte swizzle.
//     k_major    a row of the box is a row of the operand, 64 values of k; a further k-step is 32 bytes on
//     mn_major   a row of the box is a value of k, 64 rows of the operand; a further k-step is 2048 bytes on
// c[4 * i + q] is row 16 * warp + lane / 4 + 8 * (q / 2) and column 8 * i + 2 * (lane % 4) + q % 2.
#pragma once

#include "instructions.cuh"

namespace fastcl::cuda::hopper {

inline constexpr int box_bytes = 64 * 128;  // 64 rows of a box

FASTCL_DEVICE uint64_t k_major(uint32_t at) { return (uint64_t)((at & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62; }
// `next`: bytes to the next 64 rows of the operand.
FASTCL_DEVICE uint64_t mn_major(uint32_t at, uint32_t next) {
  return (uint64_t)((at & 0x3ffff) >> 4) | (uint64_t)(next >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

// The fence stands before each batch, inside the loop: once before it, ptxas serialises every product (notes C7519, C7520).
FASTCL_DEVICE void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FASTCL_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
FASTCL_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// The compiler moves no use of accumulators up over the wait.
template <int K>
FASTCL_DEVICE void settle(float (&c)[K]) {
#pragma unroll
  for (int k = 0; k < K; k++) asm volatile("" : "+f"(c[k])::"memory");
}

#define FASTCL_R4(k) "+f"(c[k]), "+f"(c[k + 1]), "+f"(c[k + 2]), "+f"(c[k + 3])
#define FASTCL_R32(k) \
  FASTCL_R4(k), FASTCL_R4(k + 4), FASTCL_R4(k + 8), FASTCL_R4(k + 12), FASTCL_R4(k + 16), FASTCL_R4(k + 20), FASTCL_R4(k + 24), FASTCL_R4(k + 28)
#define FASTCL_T64                                                                                                                \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"        \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define FASTCL_T96 \
  FASTCL_T64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define FASTCL_T128                                                                                                               \
  FASTCL_T96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118," \
             "%119,%120,%121,%122,%123,%124,%125,%126,%127"
// The operands after R registers: a, b, whether to add, and the two major orders.
#define FASTCL_WGMMA(N, kind, text, A, B, ADD, TA, TB, ...)                                                                       \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #ADD ", 0;\n wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." kind "." kind " {" text "}, %" #A  \
               ", %" #B ", p, 1, 1, %" #TA ", %" #TB "; }"                                                                        \
               : __VA_ARGS__                                                                                                      \
               : "l"(a), "l"(b), "r"(add), "n"(TRANSPOSED_A), "n"(TRANSPOSED_B))

// c = A B, or c += A B where add is not 0. TRANSPOSED: that operand is MN-major.
template <class T, int N, int TRANSPOSED_A, int TRANSPOSED_B>
FASTCL_DEVICE void multiply(float (&c)[N / 2], uint64_t a, uint64_t b, int add) {
  static_assert(N == 128 || N == 192 || N == 256, "");
  constexpr bool half = __is_same(T, f16);
  if constexpr (N == 128 && half) FASTCL_WGMMA(128, "f16", FASTCL_T64, 64, 65, 66, 67, 68, FASTCL_R32(0), FASTCL_R32(32));
  else if constexpr (N == 128) FASTCL_WGMMA(128, "bf16", FASTCL_T64, 64, 65, 66, 67, 68, FASTCL_R32(0), FASTCL_R32(32));
  else if constexpr (N == 192 && half) FASTCL_WGMMA(192, "f16", FASTCL_T96, 96, 97, 98, 99, 100, FASTCL_R32(0), FASTCL_R32(32), FASTCL_R32(64));
  else if constexpr (N == 192) FASTCL_WGMMA(192, "bf16", FASTCL_T96, 96, 97, 98, 99, 100, FASTCL_R32(0), FASTCL_R32(32), FASTCL_R32(64));
  else if constexpr (half)
    FASTCL_WGMMA(256, "f16", FASTCL_T128, 128, 129, 130, 131, 132, FASTCL_R32(0), FASTCL_R32(32), FASTCL_R32(64), FASTCL_R32(96));
  else FASTCL_WGMMA(256, "bf16", FASTCL_T128, 128, 129, 130, 131, 132, FASTCL_R32(0), FASTCL_R32(32), FASTCL_R32(64), FASTCL_R32(96));
}

#undef FASTCL_WGMMA
#undef FASTCL_T64
#undef FASTCL_T96
#undef FASTCL_T128
#undef FASTCL_R4
#undef FASTCL_R32

}  // namespace fastcl::cuda::hopper
