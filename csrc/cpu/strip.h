// One direction in one sweep: value and both gradients of sum_i outer(r_i) with one exponential for each pair.
//
// A strip of rows keeps its exponentials E until its rows are complete and rho_i = d total / d (sum_j E_ij) is known:
//     W = diag(rho) E,   W Y = diag(rho) (E Y),   W^T X = E^T (diag(rho) X)
//
// Of few rows all are one strip, of a block or two: then columns may have weights too, and W = (rho 1^T + 1 sigma^T) o E is formed
// in memory.
// Where rho x would be too small for a row that counts, E is turned into W instead (range.h).
// Threads own columns, so that y's sums need no copies; x's are added up over threads, strip by strip.
#pragma once

#include "sweep.h"

namespace fastcl::cpu::FASTCL_ISA {

template <class T>
class Strip {
  using G = Geometry<T>;
  const Task<T>& task_;
  const RowWeights& weights_;
  const Host& host_;
  const PackedOperands<T> packed_;
  const PackedOperands<T>* const guides_;
  const bool both_ways_;  // columns have weights
  const bool keeps_;      // something needs E again once rho is known
  int threads_;
  int64_t height_, block_, blocks_, tiles_, tile_size_;  // a strip's rows are blocks, a block's columns tiles
  TileWorker<T>* workers_;
  T *exponentials_, *products_, *rho_, *sigma_;
  double *row_values_, *values_, *exact_rho_, *exact_sigma_;

 public:
  Strip(const Task<T>& task, const RowWeights& weights, const Host& host)
      : task_(task), weights_(weights), host_(host), packed_(task, host), guides_(packed_guides(task, host)),
        both_ways_(weights.of_columns), keeps_(both_ways_ || task.y.product || task.y.weight_sum) {
    const int64_t units = parts_of(task.y.count, G::unit);
    threads_ = int(smaller_of(threads_for(task, host.threads), units));
    threads_ = int(larger_of(1, threads_));
    // The strip is height x m elements. It may be as large as x and y, which no one notices, or half a tile high.
    height_ = smaller_of(G::tile, larger_of(G::tile / 2, 2 * task.d)) / G::rows * G::rows;
    if (both_ways_) height_ = parts_of(task.x.count, G::rows) * G::rows;
    blocks_ = parts_of(height_, G::tile);
    block_ = parts_of(parts_of(height_, blocks_), G::rows) * G::rows;
    tile_size_ = (block_ + G::rows) * G::w_stride;
    tiles_ = keeps_ ? parts_of(parts_of(units, threads_) * G::unit, G::tile) : 1;
    workers_ = allocate<TileWorker<T>>(host, threads_);
    for (int t = 0; t < threads_; t++) new (workers_ + t) TileWorker<T>(task, packed_, guides_, Step::both, host);
    exponentials_ = allocate<T>(host, threads_ * blocks_ * tiles_ * tile_size_);
    products_ = allocate<T>(host, threads_ * height_ * task.d);
    row_values_ = allocate<double>(host, threads_ * height_);
    values_ = allocate<double>(host, height_);
    exact_rho_ = allocate<double>(host, height_);
    rho_ = allocate<T>(host, height_ + slack);
    exact_sigma_ = both_ways_ ? allocate<double>(host, task.y.count) : nullptr;
    sigma_ = both_ways_ ? allocate<T>(host, task.y.count + slack) : nullptr;
  }

  bool run() {
    for (int64_t i0 = 0; i0 < task_.x.count; i0 += height_) {
      const int64_t i1 = smaller_of(i0 + height_, task_.x.count), height = i1 - i0;
      parallel_products<T>(host_, threads_, [&](int t) { exponentials(t, i0, i1); });
      for (int64_t r = 0; r < height; r++) {
        values_[r] = 0;
        for (int t = 0; t < threads_; t++) values_[r] += row_values_[t * height_ + r];
      }
      if (!weights_.of(weights_.self, i0, i1, values_, exact_rho_)) return false;
      for (int64_t r = 0; r < height; r++) {
        rho_[r] = T(exact_rho_[r]);
        if (task_.x.weight_sum) task_.x.weight_sum[i0 + r] += exact_rho_[r] * values_[r];
      }
      if (both_ways_) {
        if (!weights_.of_columns(weights_.self, task_.y.value, exact_sigma_)) return false;
        for (int64_t j = 0; j < task_.y.count + slack; j++) sigma_[j] = j < task_.y.count ? T(exact_sigma_[j]) : T(0);
        parallel_products<T>(host_, threads_, [&](int t) { gradients_both_ways(t, height); });
        parallel(host_, threads_, [&](int t) { add_rows(t, i0, height, false); });
        continue;
      }
      const bool finished = !weighs_rows(i0, i1);
      parallel_products<T>(host_, threads_, [&](int t) {
        gradients(t, i0, i1, finished);
        add_rows(t, i0, height, true);
      });
    }
    return true;
  }

 private:
  // Whether rho x keeps its digits.
  bool weighs_rows(int64_t i0, int64_t i1) const {
    constexpr double least = Range<T>::least_weighted_row * Range<T>::least_weighted_row;
    for (int64_t i = i0; i < i1; i++) {
      const double rho = exact_rho_[i - i0];
      if (!(rho == 0 || rho * rho * double(task_.x.norm[i]) >= least)) return false;
    }
    return true;
  }

  // E becomes W: its row times rho, whose power of two comes last, since E may be as large as rho is small.
  void finish_weights(T* e, int64_t height, int64_t width) const {
    constexpr int least = Constants<T>::min_exponent - Bits<T>::mantissa;
    for (int64_t r = 0; r < height; r++) {
      int exponent = 0;
      double mantissa = __builtin_frexp(exact_rho_[r], &exponent);
      if (exponent < least) mantissa = __builtin_ldexp(mantissa, exponent - least), exponent = least;
      const Simd<T> first = T(mantissa), second = T(__builtin_ldexp(1.0, exponent));
      for (int64_t c = 0; c < width; c += G::lanes) {
        T* at = e + r * G::w_stride + c;
        (Simd<T>::load(at) * first * second).store(at);
      }
    }
  }

  // Calls visit(E, j0, j1) for the thread's columns, of the block whose first row in the strip is r0.
  template <class Visit>
  void for_each_tile(int t, int64_t r0, const Visit& visit) const {
    const int64_t m = task_.y.count, end = cut(m, G::unit, t + 1, threads_);
    T* e = exponentials_ + (t * blocks_ + r0 / block_) * tiles_ * tile_size_;
    for (int64_t j = cut(m, G::unit, t, threads_); j < end && !host_.stopped(); j += G::tile) {
      visit(e, j, smaller_of(j + G::tile, end));
      if (keeps_) e += tile_size_;
    }
  }

  void exponentials(int t, int64_t i0, int64_t i1) {
    TileWorker<T>& worker = workers_[t];
    T* product = products_ + t * height_ * task_.d;
    for (int64_t k = 0; k < height_ * task_.d; k++) product[k] = T(0);
    for (int64_t r0 = 0; r0 < i1 - i0; r0 += block_) {
      const int64_t rows = smaller_of(block_, i1 - i0 - r0);
      worker.clear_rows(rows);
      for_each_tile(t, r0, [&](T* e, int64_t j0, int64_t j1) {
        worker.clear_cols(j1 - j0);
        worker.sweep(Tile{i0 + r0, i0 + r0 + rows, j0, j1}, e);
        if (both_ways_) worker.flush_cols(task_.y, j0, j1);
        else if (task_.x.product) add_product(product, rows, Weights<T>::plain(e), task_.y, j0, j1 - j0, task_.d, worker.panel());
      });
      for (int64_t r = 0; r < rows; r++) row_values_[t * height_ + r0 + r] = worker.row_value(r);
    }
  }

  void gradients(int t, int64_t i0, int64_t i1, bool finished) {
    const int64_t height = i1 - i0, d = task_.d;
    if (!keeps_) return;
    for_each_tile(t, 0, [&](T* e, int64_t j0, int64_t j1) {
      const T* rho = finished ? nullptr : rho_;
      if (finished) finish_weights(e, height, j1 - j0);
      if (task_.y.product)
        add_product(task_.y.product + j0 * d, j1 - j0, Weights<T>::transposed(e, rho), task_.x, i0, height, d, workers_[t].panel());
      if (task_.y.weight_sum) add_weight_sums(e, rho, height, j0, j1);
    });
  }

  void gradients_both_ways(int t, int64_t height) {
    const int64_t d = task_.d;
    for (int64_t r0 = 0; r0 < height; r0 += block_) {
      const int64_t rows = smaller_of(block_, height - r0);
      for_each_tile(t, r0, [&](T* e, int64_t j0, int64_t j1) {
        for (int64_t r = 0; r < rows; r++) {
          const Simd<T> rho = rho_[r0 + r];
          for (int64_t c = 0; c < j1 - j0; c += G::lanes) {
            T* at = e + r * G::w_stride + c;
            (Simd<T>::load(at) * (rho + Simd<T>::load(sigma_ + j0 + c))).store(at);
          }
        }
        if (task_.x.product)
          add_product(products_ + (t * height_ + r0) * d, rows, Weights<T>::plain(e), task_.y, j0, j1 - j0, d, workers_[t].panel());
        if (task_.y.product) add_product(task_.y.product + j0 * d, j1 - j0, Weights<T>::transposed(e), task_.x, r0, rows, d, workers_[t].panel());
      });
    }
  }

  // Adds up the threads' products of a part of x's rows, times rho where that is still to come.
  void add_rows(int t, int64_t i0, int64_t height, bool weighed) {
    const int64_t d = task_.d;
    if (task_.x.product)
      for (int64_t r = height * t / threads_; r < height * (t + 1) / threads_; r++) {
        T* out = task_.x.product + (i0 + r) * d;
        for (int64_t k = 0; k < d; k++) {
          T sum = 0;
          for (int s = 0; s < threads_; s++) sum += products_[(s * height_ + r) * d + k];
          out[k] += T((weighed ? exact_rho_[r] : 1.0) * double(sum));
        }
      }
  }

  void add_weight_sums(const T* e, const T* rho, int64_t height, int64_t j0, int64_t j1) {
    for (int64_t c = 0; c < j1 - j0; c += G::lanes) {
      Simd<T> sum = T(0);
      for (int64_t r = 0; r < height; r++) sum += Simd<T>::load(e + r * G::w_stride + c) * Simd<T>(rho ? rho[r] : T(1));
      for (int l = 0; l < G::lanes && c + l < j1 - j0; l++) task_.y.weight_sum[j0 + c + l] += sum.v[l];
    }
  }
};

template <class T>
bool strip(const Task<T>& task, const RowWeights& weights, const Host& host) {
  return Strip<T>(task, weights, host).run();
}

}  // namespace fastcl::cpu::FASTCL_ISA
