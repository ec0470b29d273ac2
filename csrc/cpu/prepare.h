// From the op's tensors to what the kernels read: O(n d) work, once for each call.
#pragma once

#include <vector>

#include "../arguments.h"
#include "kernels.h"

namespace fastcl::cpu {

// torch's intra-op threads and torch's allocator, as the kernels see them. Memory lives as long as this object.
class TorchHost {
  std::vector<Tensor> memory_;

 public:
  Host host();
  void* allocate(size_t bytes);
  // Elements [0, count) for use and `slack` more that may be read, all zero.
  template <class U>
  U* vector(int64_t count) {
    auto* v = static_cast<U*>(allocate((count + slack) * sizeof(U)));
    std::fill(v, v + count + slack, U(0));
    return v;
  }
};

// A log-sum-exp's numbers: what T can hold and how exactly.
template <class T>
struct Range;
template <>
struct Range<float> {
  static constexpr double headroom = 90;           // the shared reference lies this far below the bound of z, in log 2
  static constexpr double headroom_of_product = 60;  // so far where E Y is summed before it is normalised
  static constexpr double largest_norm = 0x1p50;     // of a row in E Y
  static constexpr double smallest = 0x1p-100;     // sums below this, times the number of terms, may have lost a bit
  static constexpr double shared_spread = 120;     // of r and c, in log 2, for one reference in the gradients
  static constexpr double exact_r = 256;           // beyond, r's own rounding would show in exp(z - r)
};
template <>
struct Range<double> {
  static constexpr double headroom = 900;
  static constexpr double headroom_of_product = 500;
  static constexpr double largest_norm = 0x1p480;
  static constexpr double smallest = 0x1p-960;
  static constexpr double shared_spread = 900;
  static constexpr double exact_r = 1 << 20;
};

// Both sides in T, with everything that z needs; sums and gradients are asked for on top.
template <class T>
class Prepared {
 public:
  explicit Prepared(const Arguments& a);

  Task<T> task;
  TorchHost memory;
  Tensor x, y;      // rows as the kernels read them: in T, centred for sqdist
  double scale;     // a

  // Sets the shared reference, if there can be one: below every z's bound by what T's range allows.
  bool share(bool of_products);

  // Sides' results, zeroed and hooked up.
  void want_values(bool of_y);
  void want_maxima();
  void forget_values();
  void want_gradients(const Wanted& wanted, bool weight_sums);
  void sweep(Step step) { kernels_->sweep(task, step, memory.host()); }
  bool strip(const RowWeights& weights) { return kernels_->strip(task, weights, memory.host()); }

  Tensor x_product, y_product;

 private:
  void prepare_side(Side<T>& side, const Tensor& rows, const std::optional<Tensor>& bias, double shift, double unit);
  void bound_z();
  bool norms_are_held(const Side<T>& side) const;
  const Kernels<T>* kernels_ = &kernels<T>();
  double bound_ = 0, largest_row_ = 0;
};

extern template class Prepared<float>;
extern template class Prepared<double>;

}  // namespace fastcl::cpu
