// Float32 products on AMX, which multiplies bfloat16 alone and adds in float32.
//
// A float is the sum of three bfloat16, h + m + l, exactly but for what underflows; a product keeps the six of their nine
// products that float32 would notice (the dropped ml, lm and ll are below 2^-26 of it). 6 products at 16 times the rate of a
// fused multiply-add leave 2.7 times its speed, at its accuracy. Rows that came in bfloat16 have one part, float16 ones two.
#pragma once

#include "schedule.h"

namespace fastcl::cpu::FASTCL_ISA {

using Part = uint16_t;  // the bits of a bfloat16

// A tile register: 16 rows of 16 pairs. As a left operand a row is 32 elements along k, each of the first 16 beside the one
// that is 16 on; as a right one row p holds elements p and p + 16 along k of each of 16 columns.
inline constexpr int64_t tile_rows = 16, tile_depth = 32, tile_size = tile_rows * tile_depth;

// The accumulators 0 to 3 are a block of 32 x 32; 4 and 5 hold left operands, 6 and 7 right ones. torch's own libraries
// configure the registers of the same threads, and expect them released. A constant in memory: of one on the stack g++ 12's
// intrinsic reads 8 bytes as far as the optimiser knows, and the stores of the other 56 may go.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {tile_rows, tile_rows, tile_rows, tile_rows, tile_rows, tile_rows, tile_rows, tile_rows};
};
static_assert(sizeof(TileConfiguration) == 64);
constexpr TileConfiguration tile_configuration;

template <>
struct Registers<float> {
  static FASTCL_INLINE void take() { _tile_loadconfig(&tile_configuration); }
  static FASTCL_INLINE void release() { _tile_release(); }
};

FASTCL_INLINE void multiply_loaded() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// A block of operands' tiles, [16 rows or columns][along k][part]; next is from one group of 16 to the one beside it.
struct Operand16 {
  const Part* tiles;
  int64_t next;
};

FASTCL_INLINE void load_left(const Operand16& a, int64_t offset) {
  _tile_loadd(4, a.tiles + offset, 64);
  _tile_loadd(5, a.tiles + a.next + offset, 64);
}
FASTCL_INLINE void load_right(const Operand16& b, int64_t offset) {
  _tile_loadd(6, b.tiles + offset, 64);
  _tile_loadd(7, b.tiles + b.next + offset, 64);
}

// out (32 x 32) = a b over `depths` tiles along k. The products that are small beside h h come first, all of them, so that adding
// them costs the sum no digits: after h h each of five would round it once more. Accumulators stay in their registers: to keep a
// right operand in the first-level cache, part of its depth after part, cost more in storing them than it saved. After every four
// products between() has its turn, products_of(A, B) * depths times.
template <int A, int B, class Between>
FASTCL_INLINE void multiply_block(const Operand16& a, const Operand16& b, int64_t depths, float* out, const Between& between) {
  asm volatile("" ::: "memory");  // g++ 12's tile loads do not say that they read memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  constexpr int64_t h = 0, m = tile_size, l = 2 * tile_size;
  for (int64_t k = 0; k < depths && A > 1; k++) {
    const int64_t ka = k * A * tile_size, kb = k * B * tile_size;
    load_right(b, kb + h);
    if (A > 2) load_left(a, ka + l), multiply_loaded(), between();
    load_left(a, ka + m), multiply_loaded(), between();
    if (B == 1) continue;
    load_right(b, kb + m), multiply_loaded(), between();
    load_left(a, ka + h), multiply_loaded(), between();
    if (B > 2) load_right(b, kb + l), multiply_loaded(), between();
  }
  for (int64_t k = 0; k < depths; k++) {
    load_left(a, k * A * tile_size), load_right(b, k * B * tile_size);
    multiply_loaded(), between();
  }
  _tile_stored(0, out, 128);
  _tile_stored(1, out + 16, 128);
  _tile_stored(2, out + 16 * 32, 128);
  _tile_stored(3, out + 16 * 32 + 16, 128);
}

FASTCL_INLINE int products_of(int a_parts, int b_parts) { return a_parts == 3 ? 6 : a_parts * b_parts; }

// Of any numbers of parts: those of weights are two where two are as many as the result keeps.
template <class Between>
FASTCL_INLINE void multiply_block(int a_parts, int b_parts, const Operand16& a, const Operand16& b, int64_t depths, float* out,
                                  const Between& between) {
  if (a_parts == 3) multiply_block<3, 3>(a, b, depths, out, between);
  else if (b_parts == 2) multiply_block<2, 2>(a, b, depths, out, between);
  else if (a_parts == 2) multiply_block<2, 1>(a, b, depths, out, between);
  else multiply_block<1, 1>(a, b, depths, out, between);
}

// Calls body with a number of parts that the compiler knows.
template <class Body>
FASTCL_INLINE void with_parts(int parts, const Body& body) {
  if (parts == 3) body.template operator()<3>();
  else if (parts == 2) body.template operator()<2>();
  else body.template operator()<1>();
}

// Two registers' parts, each rounded to nearest of what the parts before it leave: of a first part cut off instead, the products
// that are dropped (m l, l m) would be eight times as large. Lane l of each is that of first_l and that of second_l, so that pairs
// take no permutation.
template <int parts>
struct Split {
  __m512i part[parts];

  FASTCL_INLINE Split(__m512 first, __m512 second) {
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int(0xffff0000));
    FASTCL_UNROLL for (int p = 0; p < parts; p++) {
      const __m512i f = _mm512_add_epi32((__m512i)first, half);
      const __m512i s = _mm512_and_si512(_mm512_add_epi32((__m512i)second, half), upper);
      part[p] = _mm512_or_si512(_mm512_maskz_srli_epi32(__mmask16(every), f, 16), s);
      first -= (__m512)_mm512_and_si512(f, upper), second -= (__m512)s;
    }
  }
};

// Of 16 x 16 pairs: the left operand's layout to the right one's, and back.
FASTCL_INLINE void transpose_pairs(__m512i (&r)[16]) {
  const __mmask16 all = __mmask16(every);
  const __mmask8 all_wide = __mmask8(every);
  __m512i t[16];
  FASTCL_UNROLL for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_maskz_unpacklo_epi32(all, r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_maskz_unpackhi_epi32(all, r[2 * i], r[2 * i + 1]);
  }
  FASTCL_UNROLL for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_maskz_unpacklo_epi64(all_wide, t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_maskz_unpackhi_epi64(all_wide, t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_maskz_unpacklo_epi64(all_wide, t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_maskz_unpackhi_epi64(all_wide, t[4 * i + 1], t[4 * i + 3]);
  }
  FASTCL_UNROLL for (int i = 0; i < 4; i++) {
    t[i] = _mm512_maskz_shuffle_i32x4(all, r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_maskz_shuffle_i32x4(all, r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_maskz_shuffle_i32x4(all, r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_maskz_shuffle_i32x4(all, r[8 + i], r[12 + i], 0xdd);
  }
  FASTCL_UNROLL for (int i = 0; i < 4; i++) {
    r[i] = _mm512_maskz_shuffle_i32x4(all, t[i], t[8 + i], 0x88);
    r[4 + i] = _mm512_maskz_shuffle_i32x4(all, t[4 + i], t[12 + i], 0x88);
    r[8 + i] = _mm512_maskz_shuffle_i32x4(all, t[i], t[8 + i], 0xdd);
    r[12 + i] = _mm512_maskz_shuffle_i32x4(all, t[4 + i], t[12 + i], 0xdd);
  }
}

// Count may be below 0 or above 16.
FASTCL_INLINE __mmask16 first_lanes(int64_t count) {
  const int lanes = count <= 0 ? 0 : count >= 16 ? 16 : int(count);
  return __mmask16((1u << lanes) - 1);
}

// The first `count` lanes from memory, zeros in the others.
FASTCL_INLINE __m512 load_first(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), from);
}

// The bits of the largest magnitude so far, so that NaN and infinity are larger than any number. Without the sign, one place up.
struct Largest {
  __m512i bits = _mm512_setzero_si512();
  FASTCL_INLINE void see(__m512 v) {
    const __m512i magnitude = _mm512_add_epi32((__m512i)v, (__m512i)v);
    bits = _mm512_mask_max_epu32(bits, __mmask16(every), bits, magnitude);
  }
  FASTCL_INLINE float value() const {
    // Stored first: of a pointer into the register's own type g++ 12 read zeros, so that every tile seemed to be one that AMX can hold.
    alignas(64) uint32_t lanes[16];
    _mm512_store_si512(lanes, bits);
    uint32_t largest = 0;
    for (int l = 0; l < 16; l++) largest = largest < lanes[l] ? lanes[l] : largest;
    return __builtin_bit_cast(float, largest >> 1);
  }
  FASTCL_INLINE bool is_zero_or_within(float least, float most) const {
    const float v = value();
    return v == 0 || (v >= least && v <= most);
  }
};

// One tile of each part, from 16 rows of 32 floats: `height` and `width` say how much there is, zeros are the rest.
// Left: a row for each row. Right, across: for a product along the columns of these rows.
template <int parts>
FASTCL_INLINE void pack_left(const float* rows, int64_t stride, int64_t height, int64_t width, Part* tile, Largest& largest) {
  for (int64_t r = 0; r < tile_rows; r++) {
    const float* row = rows + r * stride;
    const __m512 low = load_first(row, r < height ? width : 0), high = load_first(row + 16, r < height ? width - 16 : 0);
    largest.see(low), largest.see(high);
    const Split<parts> split(low, high);
    FASTCL_UNROLL for (int p = 0; p < parts; p++) _mm512_store_si512(tile + p * tile_size + r * tile_depth, split.part[p]);
  }
}

// From 32 rows of 16 floats, each row times its factor where factors are given. A product along the rows.
template <int parts>
FASTCL_INLINE void pack_right(const float* rows, int64_t stride, int64_t height, int64_t width, const float* factor, Part* tile,
                              Largest& largest) {
  for (int64_t r = 0; r < tile_rows; r++) {
    const float* row = rows + r * stride;
    __m512 first = load_first(row, r < height ? width : 0), second = load_first(row + 16 * stride, r + 16 < height ? width : 0);
    if (factor) {
      if (r < height) first *= factor[r];
      if (r + 16 < height) second *= factor[r + 16];
    }
    largest.see(first), largest.see(second);
    const Split<parts> split(first, second);
    FASTCL_UNROLL for (int p = 0; p < parts; p++) _mm512_store_si512(tile + p * tile_size + r * tile_depth, split.part[p]);
  }
}

// Left operand's tiles to right ones and back.
template <int parts>
FASTCL_INLINE void transpose_tiles(Part* tile) {
  for (int p = 0; p < parts; p++) {
    __m512i r[16];
    FASTCL_UNROLL for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(tile + p * tile_size + i * tile_depth);
    transpose_pairs(r);
    FASTCL_UNROLL for (int i = 0; i < 16; i++) _mm512_store_si512(tile + p * tile_size + i * tile_depth, r[i]);
  }
}

}  // namespace fastcl::cpu::FASTCL_ISA
