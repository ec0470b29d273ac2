// What packing.h does for the register tile, done for AMX: operands of X Y^T, and the gradients' products.
#pragma once

#include "amx_tiles.h"
#include "packing.h"

namespace fastcl::cpu::FASTCL_ISA {

inline void rows_beyond(const Side<float>& side, int64_t d, int32_t* beyond, const Host& host) {
  const int chunks = int(smaller_of(host.threads, larger_of(1, side.count * d >> 15)));
  parallel(host, chunks, [&](int chunk) {
    for (int64_t i = side.count * chunk / chunks; i < side.count * (chunk + 1) / chunks; i++) {
      Largest largest;
      for (int64_t k = 0; k < d; k += 16) largest.see(load_first(side.rows + i * side.row_stride + k, d - k));
      beyond[i + 1] = !largest.is_zero_or_within(amx_least_row, amx_largest_row);
    }
  });
  for (int64_t i = 0; i < side.count; i++) beyond[i + 1] += beyond[i];
}

FASTCL_INLINE bool are_held(const Side<float>& side, int64_t begin, int64_t count) {
  return side.beyond[smaller_of(begin + count, side.count)] == side.beyond[begin];
}

// The parts of x as left and of y as right operands: 6 bytes for each float.
template <>
class PackedOperands<float> {
  using G = Geometry<float>;
  const Task<float>& task_;
  const int64_t depths_, group_;  // tiles along d; elements of a group of 16 rows
  Part *x_, *y_;

 public:
  PackedOperands(const Task<float>& task, const Host& host)
      : task_(task), depths_(parts_of(task.d, tile_depth)), group_(depths_ * task.x.parts * tile_size) {
    x_ = pack(task.x, host, false);
    y_ = pack(task.y, host, true);
  }

  // u of a block: rows i.. and columns j... Between products visit(panes) is called, in all for as many panes as a block has or more.
  template <class Op, class Visit>
  //
  // In x with itself, u_ij and u_ji must be one number: one of them is in r_j, and the other's weight takes r_j off. The products of
  // parts come in another order for (j, i), so that what lies below the diagonal is taken from above it.
  FASTCL_INLINE void operands(int64_t i, int64_t j, float* u, const Visit& visit) const {
    const bool below = task_.self && i > j;
    const int64_t upper = below ? j : i, right = below ? i : j;
    if (are_held(task_.x, upper, G::rows) && are_held(task_.y, right, G::cols)) {
      const int parts = task_.x.parts;
      const int64_t panes = parts_of(G::rows / G::pane_rows, larger_of(1, products_of(parts, parts) * depths_));
      multiply_block(parts, parts, {x_ + upper / tile_rows * group_, group_}, {y_ + right / tile_rows * group_, group_}, depths_, u,
                     [&] { visit(panes); });
    } else {
      dot_products(upper, right, u);
    }
    add_norms<Op>(upper, right, u);
    if (task_.self && i >= j) mirror(u, below);
  }

 private:
  template <class Op>
  FASTCL_INLINE void add_norms(int64_t i, int64_t j, float* u) const {
    if constexpr (Op::kind == Operand::sqdist)
      for (int64_t r = 0; r < G::rows; r++) FASTCL_UNROLL for (int v = 0; v < G::vectors; v++) {
        float* at = u + r * G::cols + v * G::lanes;
        const Simd<float> nx = task_.x.norm[i + r], ny = Simd<float>::load(task_.y.norm + j + v * G::lanes);
        Op::of(Simd<float>::load(at), nx, ny).store(at);
      }
  }

  // In float arithmetic, for rows that AMX cannot hold.
  __attribute__((noinline)) void dot_products(int64_t i, int64_t j, float* u) const {
    const Side<float>&x = task_.x, &y = task_.y;
    for (int64_t r = 0; r < G::rows; r++)
      for (int64_t c = 0; c < G::cols; c++)
        u[r * G::cols + c] = i + r < x.count && j + c < y.count ? dot(x.rows + (i + r) * x.row_stride, y.rows + (j + c) * y.row_stride) : 0;
  }
  float dot(const float* x, const float* y) const {
    Simd<float> sums = 0.0f;
    for (int64_t k = 0; k < task_.d; k += 16) sums += Simd<float>(load_first(x + k, task_.d - k)) * Simd<float>(load_first(y + k, task_.d - k));
    return float(sum_of_lanes(sums));
  }

  // Of a block on the diagonal the upper half to the lower one; else the transpose.
  static void mirror(float* u, bool exchange) {
    for (int64_t r = 0; r < G::rows; r++)
      for (int64_t c = r + 1; c < G::cols; c++) {
        const float upper = u[r * G::cols + c];
        if (exchange) u[r * G::cols + c] = u[c * G::cols + r];
        u[c * G::cols + r] = upper;
      }
  }

  Part* pack(const Side<float>& side, const Host& host, bool right) {
    const int64_t groups = parts_of(side.count, G::rows) * (G::rows / tile_rows);
    Part* packed = allocate<Part>(host, groups * group_);
    const int chunks = int(smaller_of(host.threads, groups));
    parallel(host, chunks, [&](int chunk) {
      with_parts(side.parts, [&]<int parts>() {
        Largest unused;
        for (int64_t g = groups * chunk / chunks; g < groups * (chunk + 1) / chunks; g++)
          for (int64_t k = 0; k < depths_; k++) {
            Part* tile = packed + g * group_ + k * parts * tile_size;
            pack_left<parts>(side.rows + g * tile_rows * side.row_stride + k * tile_depth, side.row_stride, side.count - g * tile_rows,
                             task_.d - k * tile_depth, tile, unused);
            if (right) transpose_tiles<parts>(tile);
          }
      });
    });
    return packed;
  }
};

// A block of 32 x 32 on its way into out, a few rows at a time; height and width say how much of it exists.
class AddedBlock {
  const float* block_ = nullptr;
  float* out_ = nullptr;
  int64_t stride_ = 0, height_ = 0, row_ = 0;
  __mmask16 low_ = 0, high_ = 0;

 public:
  AddedBlock() = default;
  FASTCL_INLINE AddedBlock(const float* block, float* out, int64_t stride, int64_t height, int64_t width)
      : block_(block), out_(out), stride_(stride), height_(smaller_of(height, 32)), low_(first_lanes(width)), high_(first_lanes(width - 16)) {}

  FASTCL_INLINE void add(int64_t rows) {
    for (; rows > 0 && row_ < height_; rows--, row_++) {
      add(low_, out_ + row_ * stride_, block_ + row_ * 32);
      add(high_, out_ + row_ * stride_ + 16, block_ + row_ * 32 + 16);
    }
  }

 private:
  static FASTCL_INLINE void add(__mmask16 lanes, float* out, const float* block) {
    _mm512_mask_storeu_ps(out, lanes, _mm512_maskz_loadu_ps(lanes, out) + _mm512_load_ps(block));
  }
};

// The weights of a tile as left operands: W, or its transpose, read row by row. Whether AMX can hold them.
template <int parts>
bool pack_weights(const Weights<float>& w, int64_t groups, int64_t depths, Part* tiles) {
  Largest largest;
  const bool transposed = w.step != 1;
  for (int64_t n = 0; n < groups * depths; n++) {
    const int64_t r = transposed ? n % groups : n / depths, k = transposed ? n / groups : n % depths;
    const float* at = w.w + r * tile_rows * w.row + k * tile_depth * w.step;
    Part* tile = tiles + (r * depths + k) * parts * tile_size;
    if (transposed) {
      pack_right<parts>(at, w.step, tile_depth, tile_rows, nullptr, tile, largest);
      transpose_tiles<parts>(tile);
    } else {
      pack_left<parts>(at, w.row, tile_rows, tile_depth, tile, largest);
    }
  }
  return largest.is_zero_or_within(amx_least_weight, amx_largest_weight);
}

// Columns [offset, offset + columns) of `count` rows from row `begin` on as right operands, each row times its factor where
// factors are given.
template <int parts>
void pack_panels(const Side<float>& side, int64_t begin, int64_t count, int64_t offset, int64_t columns, int64_t d, const float* factor,
                 Part* panels) {
  const int64_t depths = parts_of(count, tile_depth), group = depths * parts * tile_size;
  Largest unseen;
  for (int64_t k = 0; k < depths; k++)
    for (int64_t c = 0; c < columns; c += tile_rows) {
      const int64_t row = k * tile_depth;
      const float* rows = side.weighed + (begin + row) * side.weighed_stride + offset + c;
      // The rows lie in memory; what comes next arrives while this is packed.
      for (int64_t i = 0; i < tile_depth; i++) __builtin_prefetch(rows + (tile_depth + i) * side.weighed_stride, 0, 2);
      pack_right<parts>(rows, side.weighed_stride, count - row, d - offset - c, factor ? factor + row : nullptr,
                        panels + c / tile_rows * group + k * parts * tile_size, unseen);
    }
}

// out[0, height) += W rows[begin, begin + count); what AMX cannot hold goes through the register tile.
inline void add_product(float* out, int64_t height, Weights<float> w, const Side<float>& side, int64_t begin, int64_t count,
                        int64_t d, float* scratch) {
  using G = Geometry<float>;
  constexpr int64_t block = 32;
  const int64_t depths = parts_of(count, tile_depth), blocks = parts_of(height, block), groups = blocks * block / tile_rows;
  // Two parts of a weight are 2^-17 of it, which the rounding of a gradient to 16 bits hides. Rows times a factor have all parts.
  const int w_parts = side.parts == 3 ? 3 : 2, row_parts = w.factor ? w_parts : side.parts;
  const int64_t w_group = depths * w_parts * tile_size, row_group = depths * row_parts * tile_size;
  Part *weights = reinterpret_cast<Part*>(scratch), *panels = weights + 3 * G::tile * G::tile;
  float *first = reinterpret_cast<float*>(panels + 3 * G::tile * panel_columns), *sums = first;  // two blocks, in turns
  const bool held = w_parts == 3 ? pack_weights<3>(w, groups, depths, weights) : pack_weights<2>(w, groups, depths, weights);
  if (!held || !are_held(side, begin, count)) return add_product<float>(out, height, w, side, begin, count, d, scratch);
  const int64_t rows_between = parts_of(block, products_of(w_parts, row_parts) * depths);
  AddedBlock last;
  for (int64_t c0 = 0; c0 < d; c0 += panel_columns) {
    const int64_t columns = smaller_of(panel_columns, parts_of(d - c0, block) * block);
    with_parts(row_parts, [&]<int parts>() { pack_panels<parts>(side, begin, count, c0, columns, d, w.factor, panels); });
    for (int64_t c = 0; c < columns; c += block)
      for (int64_t r = 0; r < blocks; r++) {
        multiply_block(w_parts, row_parts, {weights + 2 * r * w_group, w_group}, {panels + c / tile_rows * row_group, row_group}, depths,
                       sums, [&] { last.add(rows_between); });
        last.add(block);
        last = AddedBlock(sums, out + r * block * d + c0 + c, d, height - r * block, d - c0 - c);
        sums = sums == first ? first + block * block : first;
      }
  }
  last.add(block);
}

}  // namespace fastcl::cpu::FASTCL_ISA
