// Float32 products on AMX, which multiplies bfloat16 alone and adds in float32.
//
// A float is the sum of three bfloat16, h + m + l, exactly but for what underflows; a product keeps the six of their nine
// products that float32 would notice (the dropped ml, lm and ll are below 2^-26 of it). 6 products at 16 times the rate of a
// fused multiply-add leave 2.7 times its speed, at its accuracy. Rows that came in bfloat16 have one part, float16 ones two.
#pragma once

#include "schedule.h"

namespace fastcl::cpu::FASTCL_ISA {

using Part = uint16_t;  // the bits of a bfloat16

// A tile register: 16 rows of 16 pairs. As a left operand a row is 32 elements along k; as a right one row p holds elements 2p
// and 2p + 1 along k of each of 16 columns.
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

// Which of the products of parts: those that are small beside h h, it alone, or all. Small ones come first, so that adding them
// costs the sum no digits: after h h each of five would round it once more.
enum Products { small = 1, high = 2, every_product = 3 };

// out (32 x 32, 32 apart) = a b over `depths` tiles along k, or is added to.
template <int A, int B, int products>
FASTCL_INLINE void multiply_block(const Operand16& a, const Operand16& b, int64_t depths, float* out, bool adds) {
  if (adds) {
    _tile_loadd(0, out, 128);
    _tile_loadd(1, out + 16, 128);
    _tile_loadd(2, out + 16 * 32, 128);
    _tile_loadd(3, out + 16 * 32 + 16, 128);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  constexpr int64_t h = 0, m = tile_size, l = 2 * tile_size;
  for (int64_t k = 0; k < depths && (products & small); k++) {
    const int64_t ka = k * A * tile_size, kb = k * B * tile_size;
    load_right(b, kb + h);
    if (A > 2) load_left(a, ka + l), multiply_loaded();
    load_left(a, ka + m), multiply_loaded();
    if (B == 1) continue;
    load_right(b, kb + m), multiply_loaded();
    load_left(a, ka + h), multiply_loaded();
    if (B > 2) load_right(b, kb + l), multiply_loaded();
  }
  for (int64_t k = 0; k < depths && (products & high); k++) {
    load_left(a, k * A * tile_size), load_right(b, k * B * tile_size);
    multiply_loaded();
  }
  _tile_stored(0, out, 128);
  _tile_stored(1, out + 16, 128);
  _tile_stored(2, out + 16 * 32, 128);
  _tile_stored(3, out + 16 * 32 + 16, 128);
}

// Tiles along k between which a right operand's three parts stay in the first-level cache (24 of 48 KB) while left ones pass.
inline constexpr int64_t cached_depths = 4;

// `blocks` products of 32 x 32, one under the other: left operands of 32 * blocks rows, one right operand of 32 columns.
template <int A, int B>
void multiply_column(Operand16 a, Operand16 b, int64_t depths, int64_t blocks, float* out) {
  auto pass = [&]<int products>(int64_t cached, bool adds) {
    for (int64_t k = 0; k < depths; k += cached)
      for (int64_t r = 0; r < blocks; r++)
        multiply_block<A, B, products>({a.tiles + 2 * r * a.next + k * A * tile_size, a.next}, {b.tiles + k * B * tile_size, b.next},
                                       cached < depths - k ? cached : depths - k, out + r * 32 * 32, adds || k > 0);
  };
  if (A == 1) return pass.template operator()<high>(3 * cached_depths, false);
  if (depths <= cached_depths) return pass.template operator()<every_product>(cached_depths, false);
  pass.template operator()<small>(cached_depths, false);
  pass.template operator()<high>(3 * cached_depths, true);
}

// Of any numbers of parts: those of weights are two where two are as many as the result keeps.
FASTCL_INLINE void multiply_column(int a_parts, int b_parts, Operand16 a, Operand16 b, int64_t depths, int64_t blocks, float* out) {
  if (a_parts == 3) multiply_column<3, 3>(a, b, depths, blocks, out);
  else if (b_parts == 2) multiply_column<2, 2>(a, b, depths, blocks, out);
  else if (a_parts == 2) multiply_column<2, 1>(a, b, depths, blocks, out);
  else multiply_column<1, 1>(a, b, depths, blocks, out);
}

// 16 bfloat16 as floats. (Masked intrinsics, of every lane, here and below: see `every`.)
FASTCL_INLINE __m512 widened(__m256i parts) {
  const __mmask16 all = __mmask16(every);
  return (__m512)_mm512_maskz_slli_epi32(all, _mm512_maskz_cvtepu16_epi32(all, parts), 16);
}

// Two registers' parts: of each part 32 bfloat16, those of `first` and then those of `second`.
struct Split {
  struct Halves {
    __m256i first, second;
  };
  __m512i part[3];

  FASTCL_INLINE Split(__m512 first, __m512 second) {
    for (int p = 0; p < 3; p++) {
      part[p] = (__m512i)_mm512_cvtne2ps_pbh(second, first);
      if (p == 2) break;
      const auto half = __builtin_bit_cast(Halves, part[p]);
      first -= widened(half.first), second -= widened(half.second);
    }
  }
};

// first_0 second_0 first_1 second_1 ... of [first | second]
FASTCL_INLINE __m512i in_pairs(__m512i v) {
  const __m512i from = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                        19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_maskz_permutexvar_epi16(__mmask32(every), from, v);
}

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

// The first `count` lanes from memory, zeros in the others; count may be below 0 or above 16.
FASTCL_INLINE __m512 load_first(const float* from, int64_t count) {
  const int lanes = count <= 0 ? 0 : count >= 16 ? 16 : int(count);
  return _mm512_maskz_loadu_ps(__mmask16((1u << lanes) - 1), from);
}

// The bits of the largest magnitude so far, so that NaN and infinity are larger than any number.
struct Largest {
  __m512i bits = _mm512_setzero_si512();
  FASTCL_INLINE void see(__m512 v) {
    const __m512i magnitude = _mm512_and_si512((__m512i)v, _mm512_set1_epi32(0x7fffffff));
    bits = _mm512_mask_max_epi32(bits, __mmask16(every), bits, magnitude);
  }
  FASTCL_INLINE float value() const {
    uint32_t largest = 0;
    for (int l = 0; l < 16; l++) largest = largest < ((const uint32_t*)&bits)[l] ? ((const uint32_t*)&bits)[l] : largest;
    float f;
    __builtin_memcpy(&f, &largest, sizeof f);
    return f;
  }
};

// One tile of each of `parts` parts, from 16 rows of 32 floats: `height` and `width` say how much there is, zeros are the rest.
// Left: a row for each row. Right, across: for a product along the columns of these rows.
FASTCL_INLINE void pack_left(const float* rows, int64_t stride, int64_t height, int64_t width, int parts, Part* tile, Largest& largest) {
  for (int64_t r = 0; r < tile_rows; r++) {
    const float* row = rows + r * stride;
    const __m512 low = load_first(row, r < height ? width : 0), high = load_first(row + 16, r < height ? width - 16 : 0);
    largest.see(low), largest.see(high);
    const Split split(low, high);
    for (int p = 0; p < parts; p++) _mm512_store_si512(tile + p * tile_size + r * tile_depth, split.part[p]);
  }
}

// From 32 rows of 16 floats, each row times its factor where factors are given: pairs of rows. A product along the rows.
FASTCL_INLINE void pack_right(const float* rows, int64_t stride, int64_t height, int64_t width, const float* factor, int parts, Part* tile,
                              Largest& largest) {
  for (int64_t r = 0; r < tile_rows; r++) {
    const float* row = rows + 2 * r * stride;
    __m512 first = load_first(row, 2 * r < height ? width : 0), second = load_first(row + stride, 2 * r + 1 < height ? width : 0);
    if (factor) {
      if (2 * r < height) first *= factor[2 * r];
      if (2 * r + 1 < height) second *= factor[2 * r + 1];
    }
    largest.see(first), largest.see(second);
    const Split split(first, second);
    for (int p = 0; p < parts; p++) _mm512_store_si512(tile + p * tile_size + r * tile_depth, in_pairs(split.part[p]));
  }
}

// Left operand's tiles to right ones and back.
FASTCL_INLINE void transpose_tiles(Part* tile, int parts) {
  for (int p = 0; p < parts; p++) {
    __m512i r[16];
    FASTCL_UNROLL for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(tile + p * tile_size + i * tile_depth);
    transpose_pairs(r);
    FASTCL_UNROLL for (int i = 0; i < 16; i++) _mm512_store_si512(tile + p * tile_size + i * tile_depth, r[i]);
  }
}

}  // namespace fastcl::cpu::FASTCL_ISA
