// From the op's tensors to what the kernels read: O(n d) work, once for each call.
#pragma once

#include <vector>

#include "../arguments.h"
#include "kernels.h"
#include "range.h"

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

// Both sides in T, with everything that z needs; sums and gradients are asked for on top.
template <class T>
class Prepared {
 public:
  explicit Prepared(const Arguments& a);

  Task<T> task;
  TorchHost memory;
  Tensor x, y;      // rows as the kernels read them: in T, centred for sqdist, times a power of two where they are very long
  double scale;     // a
  double x_unit = 1, y_unit = 1;  // what the rows were divided by

  // Sets the shared reference, if there can be one: below every z's bound by what T's range allows.
  bool share(bool of_products);
  // The least that a sum of this many exponentials may be to have been exact.
  static double least_sum(bool of_products, double terms) { return (of_products ? Range<T>::smallest_of_product : Range<T>::smallest) * terms; }

  // Sides' results, zeroed and hooked up.
  void want_values(bool of_y);
  void want_maxima();
  void forget_values();
  void want_gradients(const Wanted& wanted, bool weight_sums);
  void sweep(Step step) { kernels_->sweep(task, step, memory.host()); }
  bool strip(const RowWeights& weights) { return kernels_->strip(task, weights, memory.host()); }

  Tensor x_product, y_product;

 private:
  void prepare_sides();
  void prepare_side(Side<T>& side, const Tensor& rows);
  void shorten();
  double largest_u() const;
  double set_terms(Side<T>& side, const std::optional<Tensor>& bias, double shift, double unit);
  void set_units(const Arguments& a);
  const Kernels<T>* kernels_ = &kernels<T>();
  double bound_ = 0;
  double longest_x_ = 0, longest_y_ = 0;  // the largest norms
};

extern template class Prepared<float>;
extern template class Prepared<double>;

}  // namespace fastcl::cpu
