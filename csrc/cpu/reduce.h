// The steps that rows, gradients and total share.
#pragma once

#include <cmath>

#include "prepare.h"

namespace fastcl::cpu {

// Sweeps for the values of x (and y). For a log-sum-exp first against the shared reference, with one exponential for
// each pair; if a value is too small to be exact so (or there is no such reference), with running maxima.
template <class T>
void reduce_all(Prepared<T>& p, bool of_y, bool may_share = true);

// The logarithm of row i's sum of exponentials, to base 2; -inf where nothing was left.
template <class T>
double log2_of(const Prepared<T>& p, const Side<T>& side, int64_t i) {
  if (side.value[i] == 0) return -INFINITY;
  const T reference = side.maximum ? side.maximum[i] : p.task.reference;
  if (reference == std::numeric_limits<T>::max() && side.value[i] > 0) return INFINITY;
  return double(p.task.unit) * double(reference) + std::log2(side.value[i]);
}

// r_i
template <class T>
double reduced(const Prepared<T>& p, const Side<T>& side, int64_t i) {
  return p.task.reduce == Reduction::sum ? side.value[i] : ln_2 * log2_of(p, side, i);
}

// exp(z_ij - r_i) = factor exp2(z_ij - reference), z and the reference in units of log 2; factor is 0 where nothing was left.
struct Normaliser {
  double reference, factor;
};
using Normalisers = std::vector<Normaliser>;

// From the values of reduce_all, which are exact where r is rounded.
template <class T>
Normalisers normalisers_of(const Prepared<T>& p, const Side<T>& side);

// The sides' weights, so that w_ij = g_i exp(z_ij - r_i) + h_j exp(z_ij - c_j), and the step that goes with them. Without `y` the
// second term is 0; in x with itself it is the other order of the pair.
template <class T>
Step set_weights(Prepared<T>& p, const Normalisers& x, const double* g, const Normalisers& y = {}, const double* h = nullptr);

// A number as a tensor; infinite beyond T.
template <class T>
Tensor scalar(double value) {
  Tensor out = empty({}, kind_of<T>);
  *out.mutable_data_as<T>() = T(value);
  return out;
}

using Six = std::array<Tensor, 6>;

// The six gradients from the four sums, times a factor; the matrices in the given dtype. What is beyond it is infinite.
template <class T>
Six finish(Prepared<T>& p, const Wanted& wanted, double factor, ScalarKind kind);

// Whether the gradients need W 1 and W^T 1.
inline bool needs_weight_sums(const Wanted& w, Operand operand) {
  return w.shift || w.bias_x || w.bias_y || (operand == Operand::sqdist && w.any());
}

// A vector of that length in T, and elements beyond it that may be read; converted where it is of another floating dtype.
template <class T>
const T* vector_of(const char* name, const Tensor& v, int64_t count, const Given& a, TorchHost& memory);

// The op kernel_total: a value, the six gradients, and that of the positive, for an upstream gradient of 1.
using Eight = std::array<Tensor, 8>;
Eight total_of(const Given& a, const OptionalTensor& positive, std::string_view outer, const Wanted& wanted);

// The three ops: they take their arguments off the stack and put their results there.
void kernel_rows(Stack stack);
void kernel_gradients(Stack stack);
void kernel_total(Stack stack);

}  // namespace fastcl::cpu
