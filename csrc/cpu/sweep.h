// The sweep over all pairs, tile by tile: every reduction and every gradient but the strip's (strip.h).
#pragma once

#include "tile.h"

namespace fastcl::cpu::FASTCL_ISA {

// Even parts of [begin, end), each at most a tile and whole units but for the last.
struct EvenTiles {
  int64_t begin, end, size;
  EvenTiles(int64_t begin_, int64_t end_, int64_t tile, int64_t unit) : begin(begin_), end(end_), size(unit) {
    const int64_t length = end - begin;
    if (length > 0) size = parts_of(parts_of(length, parts_of(length, tile)), unit) * unit;
  }
};

template <class T>
class BlockSweep {
  using G = Geometry<T>;
  const Task<T>& task_;
  TileWorker<T>& worker_;
  const Host& host_;
  const int64_t tile_;

 public:
  BlockSweep(const Task<T>& task, TileWorker<T>& worker, const Host& host)
      : task_(task), worker_(worker), host_(host), tile_(worker.w() ? G::tile : G::tile_without_w) {}

  void operator()(const Block& b) {
    if (b.triangle) triangle(b.row_begin, b.row_end);
    else rectangle(b.row_begin, b.row_end, b.col_begin, b.col_end);
  }

 private:
  // x's rows [begin, end) with themselves: two triangles and the rectangle between them. The smallest hold both orders
  // of their pairs, so that their rows tell all.
  void triangle(int64_t begin, int64_t end) {
    if (end - begin <= G::diagonal_tile) return strip_of_tiles(begin, end, EvenTiles(begin, end, tile_, G::unit), true);
    const int64_t middle = begin + parts_of(parts_of(end - begin, 2), G::unit) * G::unit;
    triangle(begin, middle);
    rectangle(begin, middle, middle, end);
    triangle(middle, end);
  }

  void rectangle(int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) {
    const EvenTiles rows(row_begin, row_end, tile_, task_.self ? G::unit : G::rows);
    const EvenTiles cols(col_begin, col_end, tile_, G::unit);
    for (int64_t i = rows.begin; i < rows.end && !host_.stopped(); i += rows.size) strip_of_tiles(i, smaller_of(i + rows.size, rows.end), cols, false);
  }

  void strip_of_tiles(int64_t i0, int64_t i1, const EvenTiles& cols, bool rows_only) {
    worker_.clear_rows(i1 - i0);
    for (int64_t j = cols.begin; j < cols.end && !host_.stopped(); j += cols.size) {
      const Tile tile{i0, i1, j, smaller_of(j + cols.size, cols.end)};
      worker_.clear_cols(tile.j1 - tile.j0);
      worker_.sweep(tile, worker_.w());
      worker_.add_products(tile, task_.x.product, rows_only ? nullptr : task_.y.product);
      if (!rows_only) worker_.flush_cols(task_.y, tile.j0, tile.j1);
    }
    worker_.flush_rows(task_.x, i0, i1);
  }
};

template <class T>
void sweep(const Task<T>& task, Step step, const Host& host) {
  if (task.x.count == 0 || task.y.count == 0) return;
  const PackedOperands<T> packed(task, host);
  const PackedOperands<T>* guides = packed_guides(task, host);
  const bool shared_columns = task.y.value || task.y.weight_sum || task.y.product;
  const Schedule<T> schedule(task, threads_for(task, host.threads), shared_columns);
  TileWorker<T>* workers = allocate<TileWorker<T>>(host, schedule.threads());
  for (int t = 0; t < schedule.threads(); t++) new (workers + t) TileWorker<T>(task, packed, guides, step, host);
  for (int s = 0; s < schedule.steps(); s++)
    parallel_products<T>(host, schedule.threads(), [&](int t) {
      schedule.visit(s, t, BlockSweep<T>(task, workers[t], host));
    });
}

template <class T>
void squared_norms(const Side<T>& side, int64_t d, T* norms, const Host& host) {
  const int chunks = int(smaller_of(host.threads, larger_of(1, side.count * d >> 15)));
  parallel(host, chunks, [&](int chunk) {
    for (int64_t i = side.count * chunk / chunks; i < side.count * (chunk + 1) / chunks; i++) {
      const T* row = side.rows + i * side.row_stride;
      Simd<T> sum = T(0);
      int64_t k = 0;
      for (; k + Simd<T>::lanes <= d; k += Simd<T>::lanes) sum += Simd<T>::load(row + k) * Simd<T>::load(row + k);
      double norm = sum_of_lanes(sum);
      for (; k < d; k++) norm += double(row[k]) * double(row[k]);
      norms[i] = T(norm);
    }
  });
}

}  // namespace fastcl::cpu::FASTCL_ISA
