// From the op's tensors to what the kernels read: O(n d) work, once for each call.
#pragma once

#include <cstdlib>
#include <memory>
#include <vector>

#include "interruption.h"
#include "kernels.h"
#include "own_pairs.h"
#include "range.h"
#include "../tensors.h"

namespace fastcl::cpu {

// The op's arguments: its tensors, and what is checked of them.
struct Given {
  Tensor x;
  OptionalTensor y;
  Tensor scale, shift;
  OptionalTensor bias_x, bias_y, group_x, group_y, limit_x, limit_y, guide_x, guide_y;
  int64_t row_offset, col_offset, period;
  std::string mask, operand, pair;
  std::vector<double> constants;
  std::string reduce;
  bool columns;
  const OwnPair* own;  // null where the pair function is one of fastcl's

  explicit Given(Stack& stack);  // PROBLEM of fastcl/equation/problem.py
  // A sum of all z_ij, and whatever else the caller makes of it.
  Given(Tensor x, OptionalTensor y, Tensor scale, Tensor shift);
  bool in_double() const { return x.kind() == ScalarKind::float64; }
  Choices check() const;
  void check(const Wanted& wanted) const;
};

// torch's intra-op threads, and memory, as the kernels see them. Memory lives as long as this object.
class TorchHost {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  // What a small call needs comes from memory that the calling thread keeps: given back, the system would take its pages away, and
  // for 128 rows to touch them anew took a tenth of a call.
  static constexpr size_t kept_bytes = size_t(1) << 21;
  struct Kept {
    std::unique_ptr<void, Free> memory;
    bool lent = false;
  };
  static Kept& kept();

  std::vector<std::unique_ptr<void, Free>> memory_;
  char* rest_ = nullptr;  // of what was lent
  size_t rest_bytes_ = 0;
  bool borrows_ = false;
  Interruption interruption_;

 public:
  TorchHost();
  ~TorchHost();
  TorchHost(const TorchHost&) = delete;
  Host host();
  void* allocate(size_t bytes);
  // What is allocated while one lives is given back at its end: the second sweep of a call holds no panels of the first.
  class Scope {
    TorchHost& host_;
    const size_t count_ = host_.memory_.size(), rest_bytes_ = host_.rest_bytes_;
    char* const rest_ = host_.rest_;

   public:
    explicit Scope(TorchHost& host) : host_(host) {}
    Scope(const Scope&) = delete;
    ~Scope() {
      host_.memory_.resize(count_);
      host_.rest_ = rest_, host_.rest_bytes_ = rest_bytes_;
    }
  };
  // Elements [0, count) for use and `slack` more that may be read, all zero.
  template <class U>
  U* vector(int64_t count) {
    auto* v = static_cast<U*>(allocate((count + slack) * sizeof(U)));
    std::fill(v, v + count + slack, U(0));
    return v;
  }
};

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
