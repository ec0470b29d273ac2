// The tile engine of sm_80: S = X Y^T on tensor cores, asynchronous copies and swizzled shared memory, no library.
//
// A chunk is 128 bytes of each row: 64 two-byte values or 32 tf32 values. Everything counts in BYTES along d: a k-step is
// 32 bytes, and ldmatrix hands lane l the 32-bit word l % 4 of row l / 4, which is the fragment of m16n8k16 (two halves)
// and of m16n8k8 (one tf32) alike. One loader, one swizzle and one inner loop serve all three types.
//
// A lane holds of a 16 x 8 tile of S, with g = lane / 4 and t = lane % 4:
//     c[0], c[1] = S[g][2t], S[g][2t + 1]        c[2], c[3] = S[g + 8][2t], S[g + 8][2t + 1]
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastcl::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

inline constexpr int chunk_bytes = 128;

// ---- instructions ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The larger and the smaller value; NaN if either is, unlike fmaxf and fminf: NaN in z must come out.
__device__ __forceinline__ float larger(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

__device__ __forceinline__ float smaller(float a, float b) {
  float c;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// 16 bytes from global to shared memory, or 16 zero bytes (nothing is read) when !inside.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// Wait until all but the last stages - 2 groups have landed; stages is 2, 3 or 4.
__device__ __forceinline__ void copies_wait_for(int stages) {
  if (stages == 2) copies_wait<0>();
  else if (stages == 3) copies_wait<1>();
  else copies_wait<2>();
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ uint32_t load_shared(uint32_t at) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared(uint32_t at, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}

// c += a b on one 16 x 8 tile, T's own k-step.
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define FASTCL_MMA(kind)                                                                                       \
  asm volatile("mma.sync.aligned." kind " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"              \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (sizeof(T) == 4) FASTCL_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  else if constexpr (__is_same(T, f16)) FASTCL_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  else FASTCL_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
#undef FASTCL_MMA
}

// Two floats, rounded to T and packed, the first one low.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t r;
  if constexpr (__is_same(T, f16)) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// x as the tensor cores hold tf32, rounded to nearest: they would truncate.
__device__ __forceinline__ float to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return __uint_as_float(r);
}
// x as the second product multiplies it.
template <class T>
__device__ __forceinline__ float rounded(float x) {
  if constexpr (sizeof(T) == 4) return to_tf32(x);
  else if constexpr (__is_same(T, f16)) return __half2float(__float2half_rn(x));
  else return __bfloat162float(__float2bfloat16_rn(x));
}

// ---- shared memory --------------------------------------------------------------------------------------------------

// Where 16-byte unit u of row r lies in a chunk. Eight neighbouring rows of one unit, which is what a phase of ldmatrix
// reads, fall on eight different groups of four banks.
__device__ __forceinline__ uint32_t swizzled(int r, int u) { return r * chunk_bytes + ((u ^ (r & 7)) << 4); }

// Bring chunk `chunk` of rows row0 .. row0 + ROWS of a (rows, d) matrix; what lies outside becomes zero. Rows are `stride`
// values apart and start at multiples of 16 bytes; so is d a multiple of 16 bytes.
template <class T, int ROWS, int THREADS>
__device__ __forceinline__ void load_chunk(uint32_t to, const T* from, int64_t stride, int row0, int rows, int chunk,
                                           int d) {
  constexpr int step = THREADS / 8, values = 16 / sizeof(T), width = chunk_bytes / sizeof(T);
  static_assert(step % 8 == 0 && ROWS % step == 0, "the swizzle of a thread's rows must be one constant");
  const int u = threadIdx.x % 8, r0 = threadIdx.x / 8, k = chunk * width + u * values;
  to += swizzled(r0, u);
  if (row0 + ROWS <= rows && (chunk + 1) * width <= d) {  // no predicates: a fifth of all integer instructions less
    const T* p = from + (row0 + r0) * stride + k;
#pragma unroll
    for (int i = 0; i < ROWS / step; i++, p += step * stride) copy_async(to + i * step * chunk_bytes, p, true);
    return;
  }
#pragma unroll
  for (int i = 0; i < ROWS / step; i++) {
    const int r = row0 + r0 + i * step;
    const bool inside = r < rows && k < d;
    copy_async(to + i * step * chunk_bytes, from + (inside ? r * stride + k : 0), inside);
  }
}

// A lane's address within a chunk: as the left operand, as the right one (both along d), and as the right one of W Y,
// transposed while loading. A lane's rows differ by multiples of 8, so its swizzle is constant: a k-step is an XOR of
// k * 32, and the tiles of a warp lie at immediate offsets.
__device__ __forceinline__ uint32_t left_lane(int row0) {
  const int l = threadIdx.x & 31;
  return swizzled(row0 + (l & 15), l >> 4);
}
__device__ __forceinline__ uint32_t right_lane(int row0) {
  const int l = threadIdx.x & 31;
  return swizzled(row0 + (l & 7) + (l >> 4 << 3), l >> 3 & 1);
}
__device__ __forceinline__ uint32_t transposed_lane() {
  const int l = threadIdx.x & 31;
  return swizzled(l & 15, l >> 4);
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

template <int MI, int NI>
__device__ __forceinline__ void clear(float (&s)[MI][NI][4]) {
#pragma unroll
  for (int i = 0; i < MI; i++)
#pragma unroll
    for (int j = 0; j < NI; j++) s[i][j][0] = s[i][j][1] = s[i][j][2] = s[i][j][3] = 0.f;
}

// s += X Y^T over one chunk of both; x and y with the lane's offset in them.
template <class T, int MI, int NI>
__device__ __forceinline__ void multiply_chunk(float (&s)[MI][NI][4], uint32_t x, uint32_t y) {
#pragma unroll
  for (int k = 0; k < chunk_bytes / 32; k++) {
    uint32_t a[MI][4], b[NI / 2][4];
#pragma unroll
    for (int i = 0; i < MI; i++) load_matrices(a[i], (x ^ k * 32) + i * 16 * chunk_bytes);
#pragma unroll
    for (int j = 0; j < NI / 2; j++) load_matrices(b[j], (y ^ k * 32) + j * 16 * chunk_bytes);
#pragma unroll
    for (int j = 0; j < NI; j++)
#pragma unroll
      for (int i = 0; i < MI; i++) multiply_add<T>(s[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }
}

// How a CTA of WM x WN warps shares a BM x BN tile, and which of its elements a thread holds.
template <class T_, int BM_, int BN_, int WM_, int WN_>
struct Layout {
  using T = T_;
  static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_, threads = WM * WN * 32;
  static constexpr int MI = BM / WM / 16, NI = BN / WN / 8, width = chunk_bytes / sizeof(T);
  static_assert(BM % (WM * 16) == 0 && BN % (WN * 16) == 0, "");

  int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3, wm = (threadIdx.x >> 5) / WN, wn = (threadIdx.x >> 5) % WN;

  __device__ __forceinline__ int row(int i, int h) const { return (wm * MI + i) * 16 + h * 8 + g; }
  __device__ __forceinline__ int col(int j, int q) const { return (wn * NI + j) * 8 + t * 2 + q; }
  // The column of the i-th value that scatter_sums over 2 NI columns leaves with this thread.
  __device__ __forceinline__ int scattered(int i) const {
    const int k = g * (2 * NI) / 8 + i;
    return col(k >> 1, k & 1);
  }
};

// Sum N values over the eight lanes of equal t, scattered: sums g * N / 8 .. of them stay with each lane, in v[0] ..
// 7 shuffles for 8 values, where butterflies take 24.
template <int N>
__device__ __forceinline__ void scatter_sums(float (&v)[N]) {
  static_assert(N % 8 == 0, "");
  int n = N;
#pragma unroll
  for (int o = 16; o >= 4; o >>= 1) {
    n /= 2;
    const bool up = threadIdx.x & o;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      if (i >= n) continue;
      const float give = up ? v[i] : v[i + n], keep = up ? v[i + n] : v[i];
      v[i] = keep + __shfl_xor_sync(~0u, give, o);
    }
  }
}

// The sum over the four lanes of one row.
__device__ __forceinline__ float row_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

}  // namespace fastcl::cuda
