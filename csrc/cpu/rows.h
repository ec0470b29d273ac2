// Rows in memory, their norms and what normalising them does to gradients: in double, where products of floats are exact, and no norm
// overflows or is lost.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../tensors.h"

namespace fastcl::cpu {

// Rows in memory, each contiguous: copied where they are not.
template <class T>
struct Matrix {
  std::vector<T> copy;
  const T* data;
  int64_t stride, d;

  explicit Matrix(const Tensor& t) : data(t.data_as<T>()), stride(t.stride(0)), d(t.size(1)) {
    const int64_t step = t.stride(1);
    if (step == 1 || d <= 1) return;
    copy.resize(t.count());
    for_each_row(t.size(0), d, [&](int64_t i) {
      for (int64_t k = 0; k < d; k++) copy[i * d + k] = data[i * stride + k * step];
    });
    data = copy.data(), stride = d;
  }
  const T* operator[](int64_t i) const { return data + i * stride; }
};

// sum_k of(k), over eight sums
template <class Of>
double sum_over(int64_t d, const Of& of) {
  constexpr int lanes = 8;
  double sums[lanes] = {};
  int64_t k = 0;
  for (; k + lanes <= d; k += lanes)
    for (int l = 0; l < lanes; l++) sums[l] += of(k + l);
  for (; k < d; k++) sums[0] += of(k);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// <x_i, y_i>
template <class T>
double inner(const T* x, const T* y, int64_t d) {
  return sum_over(d, [=](int64_t k) { return double(float(x[k])) * double(float(y[k])); });
}

constexpr double least_norm = 1e-12;

// 1 / max(|x|, 1e-12); NaN for a row with an infinity, as in F.normalize, so that it is not hidden.
inline double inverse_of(double norm) {
  return std::isfinite(norm) ? 1 / std::max(norm, least_norm) : std::numeric_limits<double>::quiet_NaN();
}

// x / max(|x|, 1e-12)
template <class T>
void unit_row(const T* x, T* out, int64_t d) {
  const double inverse = inverse_of(std::sqrt(inner(x, x, d)));
  for (int64_t k = 0; k < d; k++) out[k] = T(float(double(float(x[k])) * inverse));
}

// The gradient g of x / max(|x|, 1e-12), times `upstream`: (g - <g, u> u) / max(|x|, 1e-12), the radial part in rows longer than 1e-12
// alone. Where a g is infinite its infinite entries alone count, as equals, and what is left of them is infinite with its sign, or 0,
// never NaN.
template <class T>
void tangent(const T* g, const T* x, T* out, int64_t d, double upstream = 1) {
  const double norm = std::sqrt(inner(x, x, d)), inverse = inverse_of(norm);
  bool infinite = false;
  for (int64_t k = 0; k < d; k++) infinite |= std::isinf(float(g[k]));
  auto at = [&](int64_t k) {
    const double value = float(g[k]);
    return !infinite ? value : std::isinf(value) ? std::copysign(1.0, value) : 0 * value;
  };
  double along = infinite ? 0 : inner(g, x, d);
  if (infinite)
    for (int64_t k = 0; k < d; k++) along += at(k) * double(float(x[k]));
  const double by = norm > least_norm ? along * inverse * inverse : 0 * inverse;
  const double factor = upstream * (infinite ? std::numeric_limits<double>::max() : inverse);
  for (int64_t k = 0; k < d; k++) out[k] = T(float((at(k) - by * double(float(x[k]))) * factor));
}

}  // namespace fastcl::cpu
