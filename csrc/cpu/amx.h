// What packing.h does for the register tile, done for AMX: operands of X Y^T, and the gradients' products.
#pragma once

#include "amx_tiles.h"
#include "packing.h"

namespace fastcl::cpu::FASTCL_ISA {

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

  static constexpr int64_t height = G::tile;

  // u of rows [i, end) and columns j.., pane under pane.
  template <class Op>
  void operands(int64_t i, int64_t end, int64_t j, float* u) const {
    const int parts = task_.x.parts;
    const int64_t panes = parts_of(end - i, G::rows);
    multiply_column(parts, parts, {x_ + i / tile_rows * group_, group_}, {y_ + j / tile_rows * group_, group_}, depths_, panes, u);
    if constexpr (Op::kind == Operand::sqdist)
      for (int64_t r = 0; r < panes * G::rows; r++) FASTCL_UNROLL for (int v = 0; v < G::vectors; v++) {
        float* at = u + r * G::cols + v * G::lanes;
        const Simd<float> nx = task_.x.norm[i + r], ny = Simd<float>::load(task_.y.norm + j + v * G::lanes);
        Op::of(Simd<float>::load(at), nx, ny).store(at);
      }
  }

 private:
  Part* pack(const Side<float>& side, const Host& host, bool right) {
    const int64_t groups = parts_of(side.count, G::rows) * (G::rows / tile_rows);
    Part* packed = allocate<Part>(host, groups * group_);
    const int chunks = int(smaller_of(host.threads, groups));
    parallel(host, chunks, [&](int chunk) {
      Largest unused;
      for (int64_t g = groups * chunk / chunks; g < groups * (chunk + 1) / chunks; g++)
        for (int64_t k = 0; k < depths_; k++) {
          Part* tile = packed + g * group_ + k * side.parts * tile_size;
          pack_left(side.rows + g * tile_rows * side.row_stride + k * tile_depth, side.row_stride, side.count - g * tile_rows,
                    task_.d - k * tile_depth, side.parts, tile, unused);
          if (right) transpose_tiles(tile, side.parts);
        }
    });
    return packed;
  }
};

// Magnitudes whose parts, and the products of them, AMX neither flushes to zero nor lets overflow.
inline constexpr float least_weight = 0x1p-100f, most_weight = 0x1p100f;

FASTCL_INLINE bool in_range(const Largest& largest) {
  const float most = largest.value();
  return most == 0 || (most >= least_weight && most <= most_weight);
}

// Adds a block of 32 x 32, or what exists of it.
FASTCL_INLINE void add_block(const float* block, float* out, int64_t stride, int64_t height, int64_t width) {
  for (int64_t r = 0; r < smaller_of(height, 32); r++)
    for (int64_t c = 0; c < smaller_of(width, 32); c += 16) {
      const int64_t lanes = smaller_of(width - c, 16);
      const __mmask16 mask = __mmask16((1u << lanes) - 1);
      float* at = out + r * stride + c;
      _mm512_mask_storeu_ps(at, mask, _mm512_maskz_loadu_ps(mask, at) + _mm512_load_ps(block + r * 32 + c));
    }
}

// The weights of a tile as left operands: W, or its transpose, read row by row. Whether AMX can hold them.
FASTCL_INLINE bool pack_weights(const Weights<float>& w, int64_t groups, int64_t depths, int parts, Part* tiles) {
  Largest largest;
  const bool transposed = w.step != 1;
  for (int64_t n = 0; n < groups * depths; n++) {
    const int64_t r = transposed ? n % groups : n / depths, k = transposed ? n / groups : n % depths;
    const float* at = w.w + r * tile_rows * w.row + k * tile_depth * w.step;
    Part* tile = tiles + (r * depths + k) * parts * tile_size;
    if (transposed) {
      pack_right(at, w.step, tile_depth, tile_rows, nullptr, parts, tile, largest);
      transpose_tiles(tile, parts);
    } else {
      pack_left(at, w.row, tile_rows, tile_depth, parts, tile, largest);
    }
  }
  return in_range(largest);
}

// What a factor of rows may be for their products to stay in range.
FASTCL_INLINE bool factors_hold(const float* factor, int64_t count) {
  Largest largest;
  for (int64_t k = 0; k < count; k += 16) largest.see(load_first(factor + k, count - k));
  return largest.value() <= 0x1p60f;
}

// out[0, height) += W rows[begin, begin + count); what AMX cannot hold goes through the register tile.
inline void add_product(float* out, int64_t height, Weights<float> w, const Side<float>& side, int64_t begin, int64_t count,
                        int64_t d, float* scratch) {
  using G = Geometry<float>;
  constexpr int64_t block = 32;
  const int64_t depths = parts_of(count, tile_depth), blocks = parts_of(height, block);
  // Two parts of a weight are 2^-17 of it, which the rounding of a gradient to 16 bits hides. Rows times a factor have all parts.
  const int w_parts = side.parts == 3 ? 3 : 2, row_parts = w.factor ? w_parts : side.parts;
  const int64_t w_group = depths * w_parts * tile_size, row_group = depths * row_parts * tile_size;
  Part *weights = reinterpret_cast<Part*>(scratch), *panels = weights + 3 * G::tile * G::tile;
  float* sums = reinterpret_cast<float*>(panels + 3 * G::tile * panel_columns);
  if (!pack_weights(w, blocks * block / tile_rows, depths, w_parts, weights) || (w.factor && !factors_hold(w.factor, count)))
    return add_product<float>(out, height, w, side, begin, count, d, scratch);
  for (int64_t c0 = 0; c0 < d; c0 += panel_columns) {
    const int64_t columns = smaller_of(panel_columns, parts_of(d - c0, block) * block);
    Largest unseen;
    for (int64_t k = 0; k < depths; k++)
      for (int64_t c = 0; c < columns; c += tile_rows) {
        const int64_t row = k * tile_depth;
        // The rows lie in memory; what comes next arrives while this is packed.
        for (int64_t i = 0; i < tile_depth; i++)
          __builtin_prefetch(side.rows + (begin + row + tile_depth + i) * side.row_stride + c0 + c, 0, 2);
        pack_right(side.rows + (begin + row) * side.row_stride + c0 + c, side.row_stride, count - row, d - c0 - c,
                   w.factor ? w.factor + row : nullptr, row_parts, panels + c / tile_rows * row_group + k * row_parts * tile_size, unseen);
      }
    for (int64_t c = 0; c < columns; c += block) {
      multiply_column(w_parts, row_parts, {weights, w_group}, {panels + c / tile_rows * row_group, row_group}, depths, blocks, sums);
      for (int64_t r = 0; r < blocks; r++)
        add_block(sums + r * block * block, out + r * block * d + c0 + c, d, height - r * block, d - c0 - c);
    }
  }
}

}  // namespace fastcl::cpu::FASTCL_ISA
