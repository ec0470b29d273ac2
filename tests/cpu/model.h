// AVX-512's and AMX's instructions in plain loops, so that their kernels run wherever AVX2 does: included before everything else in
// the instruction sets avx512_model and amx_model, which setup.py builds where FASTCL_BUILD_MODELS=1 asks for them. For tests alone.
//
// The kernels are written over the compiler's vectors, which g++ lowers to two of AVX2's; here is what they take by name. AMX is as
// Intel's manual defines TDPBF16PS: even and odd elements along k in a chain of fused multiply-adds each, the two chains' sum added
// to the accumulator, subnormal numbers 0 on the way in and out, ties to even.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#if defined(FASTCL_MODEL_AMX)
#define __AMX_BF16__ 1
#endif

#define FASTCL_MODEL static inline __attribute__((always_inline))

namespace {
namespace model {

typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Unsigned __attribute__((vector_size(64)));

FASTCL_MODEL float power_of_two_times(float a, double n) {
  if (n != n) return a + float(n);
  const double floor = __builtin_floor(n < -400 ? -400 : n > 400 ? 400 : n);
  return float(double(a) * __builtin_bit_cast(double, (int64_t(floor) + 1023) << 52));  // 2^400 a float's product survives in double
}
FASTCL_MODEL double power_of_two_times(double a, double n) {
  if (n != n) return a + n;
  return __builtin_ldexp(a, int(__builtin_floor(n < -4000 ? -4000 : n > 4000 ? 4000 : n)));
}
template <class V>
FASTCL_MODEL V scalef(V a, V n) {
  for (size_t l = 0; l < sizeof(V) / sizeof(a[0]); l++) a[l] = power_of_two_times(a[l], n[l]);
  return a;
}
template <class V>
FASTCL_MODEL V rounded(V a) {
  for (size_t l = 0; l < sizeof(V) / sizeof(a[0]); l++) a[l] = decltype(+a[l])(__builtin_rint(double(a[l])));
  return a;
}
template <class V>
FASTCL_MODEL V square_root(V a) {
  for (size_t l = 0; l < sizeof(V) / sizeof(a[0]); l++) a[l] = decltype(+a[l])(__builtin_sqrt(double(a[l])));
  return a;
}
template <class V>
FASTCL_MODEL V larger(V a, V b) {
  return a > b ? a : b;
}
FASTCL_MODEL __m512i larger_unsigned(__m512i a, __m512i b) {
  return (__m512i)((Unsigned)a > (Unsigned)b ? (Unsigned)a : (Unsigned)b);
}

FASTCL_MODEL __m512 load_lanes(unsigned lanes, const float* from) {
  __m512 v = {};
  for (int l = 0; l < 16; l++) if (lanes >> l & 1) v[l] = from[l];
  return v;
}
FASTCL_MODEL void store_lanes(float* to, unsigned lanes, __m512 v) {
  for (int l = 0; l < 16; l++) if (lanes >> l & 1) to[l] = v[l];
}

// Halves of each 16 bytes in turns, and choices of 16 bytes, of elements of E.
template <class E, int high>
FASTCL_MODEL __m512i unpacked(__m512i a, __m512i b) {
  constexpr int per_lane = 16 / sizeof(E);
  E x[64 / sizeof(E)], y[64 / sizeof(E)], out[64 / sizeof(E)];
  std::memcpy(x, &a, 64), std::memcpy(y, &b, 64);
  for (int lane = 0; lane < 4; lane++)
    for (int k = 0; k < per_lane; k++) out[lane * per_lane + k] = (k % 2 ? y : x)[lane * per_lane + high * per_lane / 2 + k / 2];
  std::memcpy(&a, out, 64);
  return a;
}
FASTCL_MODEL __m512i chosen(__m512i a, __m512i b, int choice) {
  __int128 x[4], y[4], out[4];
  std::memcpy(x, &a, 64), std::memcpy(y, &b, 64);
  for (int lane = 0; lane < 4; lane++) out[lane] = (lane < 2 ? x : y)[choice >> 2 * lane & 3];
  std::memcpy(&a, out, 64);
  return a;
}

// The tile registers of a thread. As on the processor, who has not configured them may not touch them.
struct Tiles {
  alignas(64) uint8_t bytes[8][16][64];
  uint8_t rows[8];
  uint16_t row_bytes[8];
  bool configured;
};
static thread_local Tiles tiles;

FASTCL_MODEL void check_tile(int t) {
  if (!tiles.configured || tiles.rows[t] > 16 || tiles.row_bytes[t] > 64) __builtin_trap();
}
FASTCL_MODEL void configure(const void* from) {
  const auto* c = static_cast<const uint8_t*>(from);
  if (c[0] != 1) __builtin_trap();
  std::memcpy(tiles.row_bytes, c + 16, 16), std::memcpy(tiles.rows, c + 48, 8);
  std::memset(tiles.bytes, 0, sizeof(tiles.bytes));
  tiles.configured = true;
}
FASTCL_MODEL void release() { tiles.configured = false; }
FASTCL_MODEL void zero(int t) {
  check_tile(t);
  std::memset(tiles.bytes[t], 0, 1024);
}
FASTCL_MODEL void load(int t, const void* from, int64_t stride) {
  zero(t);
  for (int r = 0; r < tiles.rows[t]; r++) std::memcpy(tiles.bytes[t][r], static_cast<const uint8_t*>(from) + r * stride, tiles.row_bytes[t]);
}
FASTCL_MODEL void store(int t, void* to, int64_t stride) {
  check_tile(t);
  for (int r = 0; r < tiles.rows[t]; r++) std::memcpy(static_cast<uint8_t*>(to) + r * stride, tiles.bytes[t][r], tiles.row_bytes[t]);
}

FASTCL_MODEL __m512 flushed(__m512 v) {
  const Ints bits = (Ints)v;
  return (__m512)((bits & 0x7f800000) != 0 ? bits : bits & int32_t(0x80000000));
}
// A bfloat16 of each pair as a float: the even one lies in the lower bits.
FASTCL_MODEL __m512 even(Ints pairs) { return flushed((__m512)(pairs << 16)); }
FASTCL_MODEL __m512 odd(Ints pairs) { return flushed((__m512)(pairs & int32_t(0xffff0000))); }

static __attribute__((noinline, unused)) void multiply(int c, int a, int b) {
  check_tile(a), check_tile(b), check_tile(c);
  if (tiles.row_bytes[a] / 4 != tiles.rows[b] || tiles.rows[a] != tiles.rows[c] || tiles.row_bytes[b] != tiles.row_bytes[c]) __builtin_trap();
  for (int m = 0; m < tiles.rows[c]; m++) {
    __m512 evens = {}, odds = {}, sum;
    for (int k = 0; k < tiles.row_bytes[a] / 4; k++) {
      Ints left, right;
      int32_t pair;
      std::memcpy(&pair, tiles.bytes[a][m] + 4 * k, 4), std::memcpy(&right, tiles.bytes[b][k], 64);
      left = pair - Ints{};
      const __m512 even_products = even(left), odd_products = odd(left), even_right = even(right), odd_right = odd(right);
      for (int n = 0; n < 16; n++) evens[n] = __builtin_fmaf(even_products[n], even_right[n], evens[n]);
      for (int n = 0; n < 16; n++) odds[n] = __builtin_fmaf(odd_products[n], odd_right[n], odds[n]);
      evens = flushed(evens), odds = flushed(odds);
    }
    std::memcpy(&sum, tiles.bytes[c][m], 64);
    sum = flushed(flushed(sum) + flushed(evens + odds));
    std::memcpy(tiles.bytes[c][m], &sum, tiles.row_bytes[c]);
  }
}

}  // namespace model
}  // namespace

#undef _mm512_maskz_roundscale_ps
#undef _mm512_maskz_roundscale_pd
#undef _mm512_maskz_scalef_ps
#undef _mm512_maskz_scalef_pd
#undef _mm512_maskz_srli_epi32
#undef _mm512_maskz_shuffle_i32x4
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

#define _mm512_maskz_max_ps(all, a, b) model::larger<__m512>(a, b)
#define _mm512_maskz_max_pd(all, a, b) model::larger<__m512d>(a, b)
#define _mm512_maskz_roundscale_ps(all, a, nearest) model::rounded<__m512>(a)
#define _mm512_maskz_roundscale_pd(all, a, nearest) model::rounded<__m512d>(a)
#define _mm512_maskz_scalef_ps(all, a, n) model::scalef<__m512>(a, n)
#define _mm512_maskz_scalef_pd(all, a, n) model::scalef<__m512d>(a, n)
#define _mm512_maskz_sqrt_ps(all, a) model::square_root<__m512>(a)
#define _mm512_maskz_sqrt_pd(all, a) model::square_root<__m512d>(a)
#define _mm512_mask_max_epu32(kept, all, a, b) model::larger_unsigned(a, b)
#define _mm512_setzero_si512() (__m512i{})
#define _mm512_set1_epi32(i) ((__m512i)(int32_t(i) - model::Ints{}))
#define _mm512_add_epi32(a, b) ((__m512i)((model::Unsigned)(a) + (model::Unsigned)(b)))
#define _mm512_and_si512(a, b) ((__m512i)((model::Unsigned)(a) & (model::Unsigned)(b)))
#define _mm512_or_si512(a, b) ((__m512i)((model::Unsigned)(a) | (model::Unsigned)(b)))
#define _mm512_maskz_srli_epi32(all, a, places) ((__m512i)((model::Unsigned)(a) >> (places)))
#define _mm512_maskz_unpacklo_epi32(all, a, b) model::unpacked<uint32_t, 0>(a, b)
#define _mm512_maskz_unpackhi_epi32(all, a, b) model::unpacked<uint32_t, 1>(a, b)
#define _mm512_maskz_unpacklo_epi64(all, a, b) model::unpacked<uint64_t, 0>(a, b)
#define _mm512_maskz_unpackhi_epi64(all, a, b) model::unpacked<uint64_t, 1>(a, b)
#define _mm512_maskz_shuffle_i32x4(all, a, b, choice) model::chosen(a, b, choice)
#define _mm512_load_ps(from) (*(const __m512*)(from))
#define _mm512_load_si512(from) (*(const __m512i*)(from))
#define _mm512_store_si512(to, v) (*(__m512i*)(to) = (v))
#define _mm512_maskz_loadu_ps(lanes, from) model::load_lanes(lanes, from)
#define _mm512_mask_storeu_ps(to, lanes, v) model::store_lanes(to, lanes, v)
#define _tile_loadconfig(from) model::configure(from)
#define _tile_release() model::release()
#define _tile_zero(t) model::zero(t)
#define _tile_loadd(t, from, stride) model::load(t, from, stride)
#define _tile_stored(t, to, stride) model::store(t, to, stride)
#define _tile_dpbf16ps(c, a, b) model::multiply(c, a, b)
