// One thread's work on one tile of pairs: S by register tiles, their epilogue, and the sums that they leave.
#pragma once

#include <new>

#include "epilogue.h"
#include "packing.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace fastcl::cpu::FASTCL_ISA {

// Rows [i0, i1) against columns [j0, j1); at most Geometry::tile of each.
struct Tile {
  int64_t i0, i1, j0, j1;
};

// The product of guides, by code of its own: a second caller of the operand's would take its products out of line.
struct Guide : Dot {};

// What it reads, packed; null where no limits are on it.
template <class T>
const PackedOperands<T>* packed_guides(const Task<T>& task, const Host& host) {
  return task.guide ? new (allocate<PackedOperands<T>>(host, 1)) PackedOperands<T>(*task.guide, host) : nullptr;
}

template <class T>
class TileWorker {
  using G = Geometry<T>;
  using Int = typename Bits<T>::type;

  const Task<T>& task_;
  const PackedOperands<T>& packed_;
  const PackedOperands<T>* guides_;
  Step step_;
  Epilogue<T> epilogue_;

  T *u_, *guided_, *w_, *panel_;
  Int* keep_;
  Simd<T> *row_value_, *row_maximum_, *row_weight_sum_;
  T *col_value_, *col_maximum_, *col_weight_sum_;

 public:
  TileWorker(const Task<T>& task, const PackedOperands<T>& packed, const PackedOperands<T>* guides, Step step, const Host& host)
      : task_(task), packed_(packed), guides_(guides), step_(step), epilogue_(epilogue_of(task, step)) {
    constexpr int64_t lanes = G::lanes, tile = G::tile;
    u_ = allocate<T>(host, 2 * G::rows * G::cols);
    guided_ = guides ? allocate<T>(host, G::rows * G::cols) : nullptr;
    keep_ = allocate<Int>(host, G::pane_rows * G::cols);
    w_ = step == Step::push || step == Step::push_maxima ? nullptr : allocate<T>(host, (G::tile + G::rows) * G::w_stride);
    panel_ = w_ ? allocate<T>(host, G::scratch) : nullptr;
    T* row_lanes = allocate<T>(host, 3 * (tile + G::rows) * lanes);
    row_value_ = reinterpret_cast<Simd<T>*>(row_lanes);
    row_maximum_ = row_value_ + tile + G::rows;
    row_weight_sum_ = row_maximum_ + tile + G::rows;
    col_value_ = allocate<T>(host, 3 * (tile + G::cols));
    col_maximum_ = col_value_ + tile + G::cols;
    col_weight_sum_ = col_maximum_ + tile + G::cols;
  }

  T* w() const { return w_; }
  T* panel() const { return panel_; }

  // As many as are to be swept: for a few rows to write zeros for a whole tile drove all else out of the first-level cache.
  void clear_rows(int64_t count) {
    for (int64_t r = 0; r < count + G::rows; r++) {
      row_value_[r] = row_weight_sum_[r] = Simd<T>(T(0));
      row_maximum_[r] = Simd<T>(Constants<T>::lowest);
    }
  }

  void clear_cols(int64_t count) {
    for (int64_t c = 0; c < count + G::cols; c++) {
      col_value_[c] = col_weight_sum_[c] = T(0);
      col_maximum_[c] = Constants<T>::lowest;
    }
  }

  // All register tiles of the tile; weights go to w (w_stride apart).
  void sweep(const Tile& t, T* w) {
    if (task_.operand == Operand::dot) sweep_of<Dot>(t, w);
    else sweep_of<Sqdist>(t, w);
  }

  // x.product += W Y, y.product += W^T X, where they are wanted.
  void add_products(const Tile& t, T* x_product, T* y_product) {
    if (x_product)
      add_product(x_product + t.i0 * task_.d, t.i1 - t.i0, Weights<T>::plain(w_), task_.y, t.j0, t.j1 - t.j0, task_.d, panel_);
    if (y_product)
      add_product(y_product + t.j0 * task_.d, t.j1 - t.j0, Weights<T>::transposed(w_), task_.x, t.i0, t.i1 - t.i0, task_.d, panel_);
  }

  double row_value(int64_t r) const { return sum_of_lanes(row_value_[r]); }

  // Hand the sums of rows [i0, i1) and columns [j0, j1) to their sides.
  void flush_rows(const Side<T>& side, int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; i++) {
      const int64_t r = i - i0;
      if (step_ == Step::push_maxima) {
        for (int l = 0; l < G::lanes; l++) merge(side, i, row_maximum_[r].v[l], row_value_[r].v[l]);
        continue;
      }
      if (side.value) side.value[i] += sum_of_lanes(row_value_[r]);
      if (side.weight_sum) side.weight_sum[i] += sum_of_lanes(row_weight_sum_[r]);
    }
  }

  void flush_cols(const Side<T>& side, int64_t j0, int64_t j1) {
    for (int64_t j = j0; j < j1; j++) {
      const int64_t c = j - j0;
      if (step_ == Step::push_maxima) {
        if (side.value) merge(side, j, col_maximum_[c], col_value_[c]);
        continue;
      }
      if (side.value) side.value[j] += col_value_[c];
      if (side.weight_sum) side.weight_sum[j] += col_weight_sum_[c];
    }
  }

 private:
  // The operand is known here, so that the products are in line: a call for each register tile cost 2% at d = 128.
  template <class Op>
  void sweep_of(const Tile& t, T* w) {
    if constexpr (G::on_amx) {
      sweep_between_products<Op>(t, w);
    } else {
      for (int64_t j = t.j0; j < t.j1; j += G::cols)
        for (int64_t i = t.i0; i < t.i1; i += G::rows) {
          packed_.template operands<Op>(i, j, u_);
          if (guides_) multiply_guides(i, j);
          visit_pane(t, i, j, u_, w, guided_);
        }
    }
  }

  // AMX multiplies beside the vector units: each block's epilogue runs between the next one's products.
  template <class Op>
  void sweep_between_products(const Tile& t, T* w) {
    T *next = u_, *last = u_ + G::rows * G::cols;
    int64_t last_i = 0, last_j = 0, row = G::rows;  // the block before, and its first row that waits
    const auto visit = [&](int64_t panes) {
      for (; panes > 0 && row < G::rows; panes--, row += G::pane_rows)
        visit_pane(t, last_i + row, last_j, last + row * G::cols, w, guides_ ? guided_ + row * G::cols : nullptr);
    };
    for (int64_t j = t.j0; j < t.j1; j += G::cols)
      for (int64_t i = t.i0; i < t.i1; i += G::rows) {
        packed_.template operands<Op>(i, j, next, visit);
        visit(G::rows);
        if (guides_) multiply_guides(i, j);
        T* const visited = last;
        last = next, next = visited, last_i = i, last_j = j, row = 0;
      }
    visit(G::rows);
  }

  __attribute__((noinline)) void multiply_guides(int64_t i, int64_t j) {
    if constexpr (G::on_amx) guides_->template operands<Guide>(i, j, guided_, [](int64_t) {});
    else guides_->template operands<Guide>(i, j, guided_);
  }

  FASTCL_INLINE void visit_pane(const Tile& t, int64_t i, int64_t j, const T* u, T* w, const T* guided) {
    const Side<T>&x = task_.x, &y = task_.y;
    const int64_t r = i - t.i0, c = j - t.j0;
    const Pane<T> pane{u, keep_,
                       x.term + i, x.weight + i, x.reference + i, y.term + j, y.weight + j, y.reference + j,
                       row_value_ + r, row_maximum_ + r, row_weight_sum_ + r,
                       col_value_ + c, col_maximum_ + c, col_weight_sum_ + c, w + r * G::w_stride + c};
    const bool masked = set_keep(i, j);
    if (task_.limited) leave_out_above(pane, x.limit + i, y.limit + j, Simd<T>(task_.scale), guided);
    (masked ? epilogue_.masked : epilogue_.plain)(pane, task_);
  }

  void merge(const Side<T>& side, int64_t i, T maximum, T sum) const {
    T& kept = side.maximum[i];
    const double difference = task_.unit * (double(kept) - double(maximum));
    if (maximum > kept) {
      side.value[i] *= __builtin_exp2(difference);
      side.value[i] += sum;
      kept = maximum;
    } else {
      side.value[i] += sum * __builtin_exp2(-difference);
    }
  }

  // Writes the mask of the pane at (i, j), if it needs one.
  bool set_keep(int64_t i, int64_t j) {
    const int64_t height = task_.x.count - i, width = task_.y.count - j;
    const bool ragged = height < G::pane_rows || width < G::cols;
    // In row r of this pane, column (diagonal + r) is the row's own, and so are those a period from there.
    const int64_t diagonal = (i + task_.row_offset) - (j + task_.col_offset);
    const int64_t left_out[] = {diagonal, diagonal - task_.period, diagonal + task_.period};
    const auto crosses = [](int64_t d) { return d > -G::pane_rows && d < G::cols; };
    const bool by_groups = task_.mask == MaskKind::across_groups || task_.mask == MaskKind::within_groups;
    const bool on_diagonal = task_.mask == MaskKind::off_diagonal && (crosses(left_out[0]) || crosses(left_out[1]) || crosses(left_out[2]));
    if (!ragged && !by_groups && !on_diagonal && !task_.limited) return false;

    for (int64_t r = 0; r < G::pane_rows; r++) {
      Int* keep = keep_ + r * G::cols;
      if (by_groups && r < height) {
        const int64_t* others = task_.y.group + j;
        const int64_t own = task_.x.group[i + r];
        const Int same = task_.mask == MaskKind::within_groups ? -1 : 0;
        for (int c = 0; c < G::cols; c++) keep[c] = others[c] == own ? same : ~same;
      } else {
        for (int c = 0; c < G::cols; c++) keep[c] = -1;
      }
      if (on_diagonal)
        for (const int64_t d : left_out)
          if (d + r >= 0 && d + r < G::cols) keep[d + r] = 0;
      if (ragged)
        for (int c = 0; c < G::cols; c++) keep[c] = r < height && c < width ? keep[c] : 0;
    }
    return true;
  }
};

}  // namespace fastcl::cpu::FASTCL_ISA
