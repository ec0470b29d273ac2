// What numbers may be: the bound of every intermediate of the CPU kernels, derived here once. Past a bound the careful form is
// taken, for the rows, the tile or the call concerned, as said beside it; nothing is left to overflow on its way to a finite result.
//
// A float holds 2^-126 to 2^128 (what is smaller loses digits), a double 2^-1022 to 2^1024. Exponents are to base 2.
#pragma once

#include <cstdint>

namespace fastcl::cpu {

inline constexpr double ln_2 = 0.69314718055994530942, log2_e = 1.4426950408889634074;

template <class T>
struct Range;

template <>
struct Range<float> {
  static constexpr double epsilon = 0x1p-23;
  // u = <x, y> in rows as they are, while the largest |x| |y| is below; else both sides are scaled down by powers of two, which the
  // scale takes back. Sums of u, and 4 |x| |y| for sqdist, have the rest of the range.
  static constexpr double largest_u = 0x1p120;
  // A side whose longest row is beyond `longest` is scaled down too, as far as the scale allows: its products with weights have the
  // rest of the range, 2^48 of the weights' sum. Scaled down are rows to 2^58, whose 4 |x| |y| are 2^118: u and weights have room.
  static constexpr double longest = 0x1p80, shortened = 0x1p58;
  // A side whose longest row is below is scaled up to 1, or as far as leaves the scale, which takes it back, above 2^-120: a weight of
  // 2^-40 of a row of 2^-60 is 2^-100, whose digits are there; of one of 2^-125 it would be nothing, where the scale may be 2^127.
  static constexpr double shortest = 0x1p-60, least_scale = 0x1p-120;
  // Where the scale itself is beyond this, a side whose longest row is below 1 is: what products with weights lose below 2^-126, the
  // scale would make 2^-116 of (rows of 2^-33 with weights of 2^-102 and a scale of 2^66: 2^-58, of gradients of 2^-69).
  static constexpr double large_scale = 0x1p10;
  // z in units of log 2 while |z| is below, in units of 16 log 2 beyond: 1.44 z in the other unit would overflow where z does not.
  static constexpr double largest_z = 0x1p126;
  // exp2(z - M), z <= bound, M an integer (which float arithmetic leaves exact) so far below the bound: 2^90 leaves 2^37 terms of
  // one lane's sum. Terms below 2^-126 are lost: `terms` of them are 2^-26 of a sum of 2^-100 terms.
  static constexpr double shared_bound = 1 << 20, headroom = 90, smallest = 0x1p-100;
  // So also where E Y is summed before it is normalised: 2^70 times a row of 2^30 leaves 2^27 columns; 2^-90 times one of 2^-6 is
  // 2^-96, whose digits are there. A side whose largest row is beyond these takes two sweeps, the second one with finished weights.
  static constexpr double headroom_of_product = 70, smallest_of_product = 0x1p-90, least_row = 0x1p-6, largest_row = 0x1p30;
  // W = diag(rho) E multiplies X as E and rho x. rho = g / value is 2^90 g at most, so that rho x does not overflow, and 2^-70 g / m
  // at least: where rho |x| is less than this for a row that counts, the strip's E becomes W in memory.
  static constexpr double least_weighted_row = 0x1p-100;
  // Of few rows all E become W = (rho + sigma) E in memory. rho and sigma are 2^90 at most; one that is less than 2^-120 would lose its
  // digits, and of a row of g = 2^-80 the weights that count, g / m and a millionth of that, are far above 2^-126.
  static constexpr double least_kept = 0x1p-80, least_kept_factor = 0x1p-120;
  // One reference M for all rows' and columns' weights g exp2(M - r), in the middle of the r's, whose spread is at most this: exp2(z - M)
  // is then 2^61 at most, and 2^-126 is 2^-66 of a row's largest. Beyond, or where a weight leaves the range below, each row has its own.
  static constexpr double shared_spread = 120, least_weight = 0x1p-100, largest_weight = 0x1p126;
  // exp(z - r) from r itself, whose rounding is 2^-24 |r| of every weight of its row: no more than z's own, in PyTorch as here, where
  // several terms are alike (1.2e-5 at a z of 100). Where one term towers over the rest PyTorch's r is that z bit for bit, and its
  // weights are right to 1e-6; here z is in units of log 2, and r is not. So weights may be off by half a unit of numbers below
  // 128, 4e-6; a temperature of 0.01 on unit rows still does without the sweep that forms the sums anew beyond it.
  static constexpr double exact_r = 128;
};

template <>
struct Range<double> {
  static constexpr double epsilon = 0x1p-52;
  static constexpr double largest_u = 0x1p1000;
  static constexpr double longest = 0x1p600, shortened = 0x1p490;
  static constexpr double shortest = 0x1p-500, least_scale = 0x1p-1000;
  static constexpr double large_scale = 0x1p10;
  static constexpr double largest_z = 0x1p1020;
  static constexpr double shared_bound = 1 << 20, headroom = 900, smallest = 0x1p-960;
  static constexpr double headroom_of_product = 500, smallest_of_product = 0x1p-900, least_row = 0x1p-60, largest_row = 0x1p480;
  static constexpr double least_weighted_row = 0x1p-980;
  static constexpr double least_kept = 0x1p-400, least_kept_factor = 0x1p-1000;
  static constexpr double shared_spread = 900, least_weight = 0x1p-900, largest_weight = 0x1p1022;
  static constexpr double exact_r = 1 << 20;
};

// z is in units of this times log 2 where it is beyond largest_z: 3 terms of up to 2^128 / ln 2 are below 2^127 of it.
inline constexpr double coarse_unit = 16;

// AMX multiplies bfloat16 parts (2^0, 2^-9 and 2^-18 of a float), takes and gives 0 for what is below 2^-126, and makes NaN of
// infinities of either sign. Rows whose largest element is within these, or which are 0, it holds: of the smallest products, 2^-80,
// what is lost is 2^-46, and the largest leave room for sums. Blocks with other rows take float arithmetic.
inline constexpr float amx_least_row = 0x1p-40f, amx_largest_row = 0x1p40f;
// A tile of weights whose largest is within these, for products with such rows: 2^-60 2^-40 is 2^26 times what is lost, and 2^75 2^40
// leaves room for sums. Exponentials of a strip are 2^70 at most. Tiles with other weights take float arithmetic.
inline constexpr float amx_least_weight = 0x1p-60f, amx_largest_weight = 0x1p75f;

}  // namespace fastcl::cpu
