// From the op's tensors to what the kernels read: O(n d) work, once for each call.
#pragma once

#include <vector>

#include "given.h"
#include "host.h"
#include "kernels.h"
#include "range.h"

namespace fastcl::cpu {

// A matrix in T, each row contiguous, in torch's memory or the host's.
template <class T>
struct Rows {
  const T* data = nullptr;
  int64_t stride = 0, count = 0, d = 0;
  const T* operator[](int64_t i) const { return data + i * stride; }
};

// Both sides in T, with everything that z needs; sums and gradients are asked for on top.
template <class T>
class Prepared {
 public:
  explicit Prepared(const Given& a);

  Task<T> task;
  TorchHost memory;
  // Rows as the kernels read them: in T, centred for sqdist, times a power of two where they are very long or short.
  Rows<T> x, y;
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
  void sweep(Step step) {
    const TorchHost::Scope scope(memory);
    kernels_->sweep(task, step, memory.host());
  }
  bool strip(const RowWeights& weights) {
    const TorchHost::Scope scope(memory);
    return kernels_->strip(task, weights, memory.host());
  }

  OptionalTensor x_product, y_product;

 private:
  void prepare_sides();
  void prepare_side(Side<T>& side, const Rows<T>& rows);
  void find_beyond(Side<T>& side, int64_t d);
  void keep_nan_apart(Side<T>& side);
  void shorten();
  void lengthen();
  void set_lengths();
  bool alike() const { return task.self || task.operand == Operand::sqdist; }  // whether both sides have one unit
  void divide();
  double shortest() const;
  double largest_u() const;
  double set_terms(Side<T>& side, const OptionalTensor& bias, const OptionalTensor& limit, double shift, double unit);
  void set_limits(Side<T>& side, Side<T>& guide, const OptionalTensor& limit, T* term, double unit);
  void set_units(const Given& a);
  void set_guides(const Given& a);
  const Kernels<T>* kernels_ = &kernels<T>();
  Task<T> guide_;  // of limits on another product: its rows
  double bound_ = 0;
  bool marks_nan_ = false;  // whether the weight of a z of NaN is NaN
  Rows<T> given_x_, given_y_;  // before they were divided
  double longest_x_ = 0, longest_y_ = 0;  // the largest norms
};

extern template class Prepared<float>;
extern template class Prepared<double>;

}  // namespace fastcl::cpu
