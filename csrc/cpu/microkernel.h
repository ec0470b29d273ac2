// The register tile: rows x (V vectors) of accumulators, fed by V loads and `rows` broadcasts for each k.
//
// One kernel serves the three products. What is broadcast is read where it lies, by two strides:
//     S   = X Y^T    a = x's rows                 b = y packed by panels of `cols` rows, k-major
//     W Y            a = W's rows                 b = a panel of y's columns
//     W^T X          a = W's columns              b = a panel of x's columns
// Measured on Zen 4, x read in place costs nothing against a packed copy of it, and saves n d floats.
#pragma once

#include "../operands.h"
#include "simd.h"

namespace fastcl::cpu::FASTCL_ISA {

constexpr int greatest_common_divisor(int a, int b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }

// Columns of rows that AMX's gradients pack at once: 32 at a time read two lines of each row, and took as long as the products.
inline constexpr int64_t panel_columns = 128;

template <class T>
struct Geometry {
  static constexpr int lanes = Simd<T>::lanes;
  // Of 32 registers 8 x 3 accumulators, 3 of b and one broadcast (9 x 3 is no faster, and ends with `cols` only every
  // 144 rows); of 16, 4 x 3; and 4 x 2 where a product needs a register of its own, without a fused multiply-add.
  static constexpr int register_rows = register_count == 32 ? 8 : 4;
  static constexpr int register_vectors = register_bytes == 16 && register_count == 16 ? 2 : 3;
  // The block of pairs that one product gives: the register tile, or two by two of AMX's.
  static constexpr bool on_amx = has_amx && sizeof(T) == 4;
  static constexpr int rows = on_amx ? 32 : register_rows;
  static constexpr int vectors = on_amx ? 2 : register_vectors;
  // Of it an epilogue takes so many rows at a time: on AMX few, which fit between the products of the next block.
  static constexpr int pane_rows = on_amx ? 4 : register_rows;
  static constexpr int cols = vectors * lanes;
  // Where both a panel of rows and one of columns end.
  static constexpr int unit = rows * cols / greatest_common_divisor(rows, cols);
  // The tile of W stays in the second-level cache (384 x 400 floats are 600 KiB), and is what the gradients' products
  // sum over: on Zen 4, 288 cost 2 to 5% of a backward pass and 192 cost 5 to 8%. Without W, smaller tiles leave the
  // first-level cache to y's panel: 384 cost 12% of a forward pass at d = 128, 288 cost 2%.
  static constexpr int tile = on_amx ? 256 : 384, tile_without_w = 192;
  // What is left of x with itself along the diagonal is swept twice, so it is small.
  static constexpr int diagonal_tile = 96;
  static constexpr int w_stride = tile + 16;  // not a power of two, so that W's rows do not share cache sets
  // What a product of the gradients packs: a panel of rows; on AMX the parts of W and of panel_columns of the rows, and two blocks.
  static constexpr int64_t scratch =
      on_amx ? int64_t(tile) * (tile + panel_columns) * 3 / 2 + 2 * rows * cols : int64_t(tile) * register_vectors * lanes;
  static_assert(tile % unit == 0 && tile_without_w % unit == 0 && diagonal_tile % unit == 0);
};

// c[r][v] += sum_k a[k * a_step + r * a_row] * b[k][v], b's rows V vectors apart.
template <class T, int V>
FASTCL_INLINE void multiply(typename Simd<T>::Raw (&c)[Geometry<T>::register_rows][V], const T* a, int64_t a_step, int64_t a_row,
                            const T* b, int64_t K) {
  constexpr int rows = Geometry<T>::register_rows, lanes = Simd<T>::lanes;
  for (int64_t k = 0; k < K; k++) {
    typename Simd<T>::Raw row_of_b[V];
    FASTCL_UNROLL for (int v = 0; v < V; v++) row_of_b[v] = Simd<T>::load(b + v * lanes).v;
    FASTCL_UNROLL for (int r = 0; r < rows; r++) {
      const T broadcast = a[r * a_row];
      FASTCL_UNROLL for (int v = 0; v < V; v++) c[r][v] += row_of_b[v] * broadcast;
    }
    a += a_step;
    b += V * lanes;
  }
}

// u of rows x cols pairs, into memory that stays in the first-level cache until the epilogue reads it.
template <class T, class Op>
void operands_of(const T* x, int64_t x_stride, const T* y_panel, int64_t d, const T* norm_x, const T* norm_y, T* u) {
  using G = Geometry<T>;
  typename Simd<T>::Raw c[G::register_rows][G::register_vectors] = {};
  multiply<T, G::register_vectors>(c, x, 1, x_stride, y_panel, d);
  FASTCL_UNROLL for (int r = 0; r < G::register_rows; r++) FASTCL_UNROLL for (int v = 0; v < G::register_vectors; v++) {
    Simd<T> nx = T(0), ny = T(0);
    if constexpr (Op::kind == Operand::sqdist) nx = norm_x[r], ny = Simd<T>::load(norm_y + v * G::lanes);
    Op::of(Simd<T>(c[r][v]), nx, ny).store(u + r * G::cols + v * G::lanes);
  }
}

// out (rows x V vectors, out_stride apart) += a b; height and width say how much of it exists.
template <class T, int V>
void accumulate(const T* a, int64_t a_step, int64_t a_row, const T* b, int64_t K, T* out, int64_t out_stride,
                int64_t height, int64_t width) {
  using G = Geometry<T>;
  typename Simd<T>::Raw c[G::register_rows][V];
  if (height >= G::register_rows && width >= V * G::lanes) {
    FASTCL_UNROLL for (int r = 0; r < G::register_rows; r++) FASTCL_UNROLL for (int v = 0; v < V; v++)
      c[r][v] = Simd<T>::load(out + r * out_stride + v * G::lanes).v;
    multiply<T, V>(c, a, a_step, a_row, b, K);
    FASTCL_UNROLL for (int r = 0; r < G::register_rows; r++) FASTCL_UNROLL for (int v = 0; v < V; v++)
      Simd<T>(c[r][v]).store(out + r * out_stride + v * G::lanes);
    return;
  }
  alignas(64) T edge[G::register_rows * V * G::lanes];
  FASTCL_UNROLL for (int r = 0; r < G::register_rows; r++) FASTCL_UNROLL for (int v = 0; v < V; v++) c[r][v] = typename Simd<T>::Raw{};
  multiply<T, V>(c, a, a_step, a_row, b, K);
  FASTCL_UNROLL for (int r = 0; r < G::register_rows; r++) FASTCL_UNROLL for (int v = 0; v < V; v++)
    Simd<T>(c[r][v]).store(edge + (r * V + v) * G::lanes);
  for (int64_t r = 0; r < height && r < G::register_rows; r++)
    for (int64_t k = 0; k < width && k < V * G::lanes; k++) out[r * out_stride + k] += edge[r * V * G::lanes + k];
}

// Rounds of one fused multiply-add on each of 16 registers (10 where there are but 16): the machine's limit, for
// benchmarks to stand beside their figures. Returns the flops done.
template <class T>
double fma_flops(int64_t rounds) {
  constexpr int chains = register_count == 32 ? 16 : 10;
  typename Simd<T>::Raw c[chains], a = Simd<T>(T(0.5)).v, b = Simd<T>(T(0.25)).v;
  FASTCL_UNROLL for (int i = 0; i < chains; i++) c[i] = Simd<T>(T(i)).v;
  for (int64_t k = 0; k < rounds; k++) {
    FASTCL_UNROLL for (int i = 0; i < chains; i++) c[i] = c[i] * a + b;
#if defined(__x86_64__) && !defined(FASTCL_MODEL)
    FASTCL_UNROLL for (int i = 0; i < chains; i++) asm volatile("" : "+x"(c[i]));
#endif
  }
  return 2.0 * rounds * chains * Simd<T>::lanes;
}

}  // namespace fastcl::cpu::FASTCL_ISA
