// Rows of y by panels for S = X Y^T, and columns of a tile's rows by panels for the gradients.
#pragma once

#include "schedule.h"

namespace fastcl::cpu::FASTCL_ISA {

// What the products X Y^T read: y by panels of `cols` rows, k-major, and x's last panel filled up with zero rows.
template <class T>
class PackedOperands {
  using G = Geometry<T>;
  const Task<T>& task_;
  T *panels_, *last_rows_;

 public:
  PackedOperands(const Task<T>& task, const Host& host) : task_(task) {
    const int64_t count = parts_of(task.y.count, G::cols);
    panels_ = allocate<T>(host, count * G::cols * task.d);
    last_rows_ = allocate<T>(host, G::rows * task.d);
    for (int64_t r = 0; r < G::rows; r++) {
      const int64_t i = task.x.count / G::rows * G::rows + r;
      for (int64_t k = 0; k < task.d; k++) last_rows_[r * task.d + k] = i < task.x.count ? task.x.rows[i * task.x.row_stride + k] : T(0);
    }
    const int chunks = int(smaller_of(host.threads, count));
    parallel(host, chunks, [&](int chunk) {
      for (int64_t p = count * chunk / chunks; p < count * (chunk + 1) / chunks; p++) pack(p);
    });
  }

  // u of a block: rows i.. and columns j...
  template <class Op>
  FASTCL_INLINE void operands(int64_t i, int64_t j, T* u) const {
    const bool whole = i + G::rows <= task_.x.count;
    const T* rows = whole ? task_.x.rows + i * task_.x.row_stride : last_rows_;
    operands_of<T, Op>(rows, whole ? task_.x.row_stride : task_.d, panels_ + j * task_.d, task_.d, task_.x.norm + i, task_.y.norm + j, u);
  }

 private:
  void pack(int64_t p) {
    constexpr int64_t block = 16;  // a cache line of each row at a time
    T* panel = panels_ + p * G::cols * task_.d;
    for (int64_t k0 = 0; k0 < task_.d; k0 += block) {
      const int64_t k1 = smaller_of(k0 + block, task_.d);
      for (int64_t c = 0; c < G::cols; c++) {
        const int64_t j = p * G::cols + c;
        if (j < task_.y.count) {
          const T* row = task_.y.rows + j * task_.y.row_stride;
          for (int64_t k = k0; k < k1; k++) panel[k * G::cols + c] = row[k];
        } else {
          for (int64_t k = k0; k < k1; k++) panel[k * G::cols + c] = T(0);
        }
      }
    }
  }
};

// Columns [offset, offset + V vectors) of `count` rows, each row times its factor where factors are given.
template <class T, int V>
void pack_columns(const Side<T>& side, int64_t begin, int64_t count, int64_t offset, int64_t d, const T* factor, T* panel) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t width = smaller_of(V * lanes, d - offset);
  for (int64_t k = 0; k < count; k++, panel += V * lanes) {
    const T* row = side.weighed + (begin + k) * side.weighed_stride + offset;
    const T f = factor ? factor[k] : T(1);
    if (width == V * lanes) {
      FASTCL_UNROLL for (int v = 0; v < V; v++) (Simd<T>::load(row + v * lanes) * f).store(panel + v * lanes);
    } else {
      for (int64_t c = 0; c < V * lanes; c++) panel[c] = c < width ? row[c] * f : T(0);
    }
  }
}

// A matrix of weights as the gradients' left operand: W itself, or its transpose.
template <class T>
struct Weights {
  const T* w;
  int64_t step, row;         // from one k to the next, from one row of the product to the next
  const T* factor = nullptr;  // of each k, if given: W diag(factor)
  static Weights plain(const T* w) { return {w, 1, Geometry<T>::w_stride}; }
  static Weights transposed(const T* w, const T* factor = nullptr) { return {w, Geometry<T>::w_stride, 1, factor}; }
};

// out[0, height) += W rows[begin, begin + count), panel by panel of d's columns; `panel` is scratch.
template <class T>
void add_product(T* out, int64_t height, Weights<T> w, const Side<T>& side, int64_t begin, int64_t count, int64_t d,
                 T* panel) {
  using G = Geometry<T>;
  auto sweep_panel = [&]<int V>(int64_t offset) {
    pack_columns<T, V>(side, begin, count, offset, d, w.factor, panel);
    for (int64_t r = 0; r < height; r += G::register_rows)
      accumulate<T, V>(w.w + r * w.row, w.step, w.row, panel, count, out + r * d + offset, d, height - r, d - offset);
  };
  int64_t left = parts_of(d, G::lanes);
  for (int64_t offset = 0; left > 0;) {
    // Never a last panel of one vector after one of three: one vector cannot keep the multipliers busy.
    const int64_t width = left == 4 ? 2 : smaller_of(left, G::register_vectors);
    if (width == 3) {
      if constexpr (G::register_vectors >= 3) sweep_panel.template operator()<3>(offset);
    } else if (width == 2) {
      sweep_panel.template operator()<2>(offset);
    } else {
      sweep_panel.template operator()<1>(offset);
    }
    offset += width * G::lanes;
    left -= width;
  }
}

}  // namespace fastcl::cpu::FASTCL_ISA
