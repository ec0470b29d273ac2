// The sweep over all pairs, tile by tile: every reduction and every gradient but the strip's (strip.h).
#pragma once

#include <new>

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
void sweep_block(const Task<T>& task, const Block& block, TileWorker<T>& worker) {
  using G = Geometry<T>;
  const EvenTiles rows(block.row_begin, block.row_end, G::tile, task.self ? G::unit : G::rows);
  const EvenTiles cols(block.col_begin, block.col_end, G::tile, G::unit);
  for (int64_t i = rows.begin; i < rows.end; i += rows.size) {
    worker.clear_rows();
    Tile tile{i, smaller_of(i + rows.size, rows.end), 0, 0};
    for (int64_t j = block.triangle ? i : cols.begin; j < cols.end; j += cols.size) {
      tile.j0 = j, tile.j1 = smaller_of(j + cols.size, cols.end);
      // A tile on the diagonal of x with itself holds both orders of its pairs: its rows tell all.
      const bool rows_only = block.triangle && i == j;
      worker.clear_cols();
      worker.sweep(tile, worker.w());
      worker.add_products(tile, task.x.product, rows_only ? nullptr : task.y.product);
      if (!rows_only) worker.flush_cols(task.y, tile.j0, tile.j1);
    }
    worker.flush_rows(task.x, tile.i0, tile.i1);
  }
}

template <class T>
void sweep(const Task<T>& task, Step step, const Host& host) {
  if (task.x.count == 0 || task.y.count == 0) return;
  const PackedOperands<T> packed(task, host);
  const bool shared_columns = task.y.value || task.y.weight_sum || task.y.product;
  const Schedule<T> schedule(task, threads_for(task, host.threads), shared_columns);
  TileWorker<T>* workers = allocate<TileWorker<T>>(host, schedule.threads());
  for (int t = 0; t < schedule.threads(); t++) new (workers + t) TileWorker<T>(task, packed, step, host);
  for (int s = 0; s < schedule.steps(); s++)
    parallel(host, schedule.threads(), [&](int t) {
      schedule.visit(s, t, [&](const Block& block) { sweep_block(task, block, workers[t]); });
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
