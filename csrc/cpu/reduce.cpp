#include "reduce.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace fastcl::cpu {
namespace {

template <class T>
bool exact(const Side<T>& side, int64_t terms) {
  const double least = Prepared<T>::least_sum(false, double(terms));
  return std::all_of(side.value, side.value + side.count, [&](double v) { return v >= least; });
}

// sum_ik x_ik product_ik, in double, block by block so that it does not depend on the number of threads.
template <class T>
double inner(const Side<T>& side, const T* product, int64_t d) {
  constexpr int64_t block = 64;
  std::vector<double> sums((side.count + block - 1) / block);
  at::parallel_for(0, int64_t(sums.size()), 8, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
      for (int64_t i = b * block; i < std::min((b + 1) * block, side.count); i++)
        for (int64_t k = 0; k < d; k++) sums[b] += double(side.rows[i * side.row_stride + k]) * double(product[i * d + k]);
  });
  double sum = 0;
  for (double s : sums) sum += s;
  return sum;
}

template <class T>
double sum_of(const double* v, const T* factor, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; i++) sum += v[i] * (factor ? double(factor[i]) : 1.0);
  return sum;
}

template <class T>
Tensor tensor_of(const double* v, int64_t count, double factor) {
  Tensor out = at::empty({count}, c10::CppTypeToScalarType<T>::value);
  T* o = out.mutable_data_ptr<T>();
  for (int64_t i = 0; i < count; i++) o[i] = T(v[i] * factor);
  return out;
}

// dx = a W Y, or -2a (W Y - diag(W 1) X); in double, so that no factor leaves the range on its way.
template <class T>
Tensor gradient_of(const Prepared<T>& p, const Side<T>& side, Tensor& product, double factor, at::ScalarType dtype) {
  const bool sqdist = p.task.operand == Operand::sqdist;
  const int64_t d = p.task.d;
  const double slope = sqdist ? -2 * factor * p.scale : factor * p.scale;
  T* out = product.mutable_data_ptr<T>();
  at::parallel_for(0, side.count, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, d)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      T* o = out + i * d;
      const T* row = side.rows + i * side.row_stride;
      if (sqdist) for (int64_t k = 0; k < d; k++) o[k] = T(slope * (double(o[k]) - side.weight_sum[i] * double(row[k])));
      else for (int64_t k = 0; k < d; k++) o[k] = T(slope * double(o[k]));
    }
  });
  return product.to(dtype);
}

}  // namespace

template <class T>
void reduce_all(Prepared<T>& p, bool of_y, bool may_share) {
  of_y = of_y || p.task.self;
  p.want_values(of_y);
  if (p.task.reduce == Reduction::sum) return p.sweep(Step::push);
  if (may_share && p.share(false)) {
    p.sweep(Step::push);
    if (exact(p.task.x, p.task.y.count) && (!of_y || exact(p.task.y, p.task.x.count))) return;
    p.want_values(of_y);
  }
  p.want_maxima();
  p.sweep(Step::push_maxima);
}

template <class T>
Normalisers normalisers_of(const Prepared<T>& p, const Side<T>& side) {
  Normalisers all(side.count);
  for (int64_t i = 0; i < side.count; i++) {
    const double value = side.value[i];
    if (value == 0) all[i] = {0, 0};
    else if (side.maximum) all[i] = {double(p.task.unit) * double(side.maximum[i]), 1 / value};
    else {
      const double exponent = std::floor(std::log2(value));
      all[i] = {p.task.reference + exponent, std::exp2(exponent) / value};
    }
  }
  return all;
}

template <class T>
Step set_weights(Prepared<T>& p, const Normalisers& x, const double* g, const Normalisers& y, const double* h) {
  using R = Range<T>;
  double lowest = INFINITY, highest = -INFINITY;
  for (const Normalisers* side : {&x, &y})
    for (const Normaliser& n : *side) {
      if (n.factor == 0) continue;
      lowest = std::fmin(lowest, n.reference);
      highest = std::fmax(highest, n.reference);
    }
  const double middle = highest >= lowest ? std::nearbyint(lowest + (highest - lowest) / 2) : 0;
  bool shared = p.task.unit == 1 && !p.task.x.maximum && !(highest - lowest > R::shared_spread);
  auto weight = [&](const Normaliser& n, double g) { return n.factor == 0 ? 0 : g * n.factor * (shared ? std::exp2(middle - n.reference) : 1); };
  auto keeps_digits = [&](const Normalisers& side, const double* g) {
    for (size_t i = 0; i < side.size(); i++)
      if (const double w = std::abs(weight(side[i], g[i])); w != 0 && !(w >= R::least_weight && w <= R::largest_weight)) return false;
    return true;
  };
  shared = shared && keeps_digits(x, g) && keeps_digits(y, h);
  p.task.reference = T(middle);
  auto set = [&](Side<T>& side, const Normalisers& normalisers, const double* g) {
    T* weights = p.memory.template vector<T>(side.count);
    T* references = p.memory.template vector<T>(side.count);
    std::copy_n(side.reference, side.count, references);
    for (size_t i = 0; i < normalisers.size(); i++) {
      weights[i] = T(weight(normalisers[i], g[i]));
      if (normalisers[i].factor != 0) references[i] = T(normalisers[i].reference / double(p.task.unit));
    }
    side.weight = weights;
    side.reference = references;
  };
  set(p.task.x, x, g);
  if (p.task.self) p.task.y.weight = p.task.x.weight, p.task.y.reference = p.task.x.reference;
  else if (!y.empty()) set(p.task.y, y, h);
  return shared ? Step::weigh : Step::weigh_split;
}

template <class T>
std::array<Tensor, 6> finish(Prepared<T>& p, const Wanted& wanted, double factor, at::ScalarType dtype) {
  const Side<T>&x = p.task.x, &y = p.task.y;
  const Tensor absent = at::empty({0}, p.x.options());
  // In x with itself w_ij holds both orders of a pair, and each pair comes twice.
  const double once = p.task.self ? 0.5 * factor : factor;
  std::array<Tensor, 6> out;
  out.fill(absent);
  if (wanted.scale) {
    // No pair, no product: the pointers of empty tensors are null, which below means another thing.
    const bool none = x.count == 0 || y.count == 0;
    double u = none ? 0 : x.product ? inner(x, x.product, p.task.d) : inner(y, y.product, p.task.d);
    if (p.task.operand == Operand::sqdist)
      u = sum_of(x.weight_sum, x.norm, x.count) + sum_of(y.weight_sum, y.norm, y.count) - 2 * u;
    out[2] = scalar<T>(once * u * p.x_unit * p.y_unit);
  }
  if (wanted.shift) out[3] = scalar<T>(once * sum_of<T>(x.weight_sum, nullptr, x.count));
  if (wanted.bias_x) out[4] = tensor_of<T>(x.weight_sum, x.count, factor);
  if (wanted.bias_y) out[5] = tensor_of<T>(y.weight_sum, y.count, factor);
  if (wanted.x) out[0] = gradient_of(p, x, p.x_product, factor * p.y_unit, dtype);
  if (wanted.y) out[1] = gradient_of(p, y, p.y_product, factor * p.x_unit, dtype);
  return out;
}

namespace {

template <class T>
std::tuple<Tensor, Tensor> rows_of(const Arguments& a) {
  Prepared<T> p(a);
  reduce_all(p, a.columns);
  auto results = [&](const Side<T>& side, int64_t count) {
    Tensor r = at::empty({count}, p.x.options());
    for (int64_t i = 0; i < count; i++) r.mutable_data_ptr<T>()[i] = T(reduced(p, side, i));
    return r;
  };
  return {results(p.task.x, p.task.x.count), results(p.task.y, a.columns ? p.task.y.count : 0)};
}

// Whether exp(z - r) can be formed of r itself: beyond, its rounding would show.
template <class T>
bool is_exact(const Tensor& r) {
  const T* v = r.const_data_ptr<T>();
  return std::all_of(v, v + r.numel(), [](T ri) { return ri == -INFINITY || std::abs(ri) <= Range<T>::exact_r; });
}

template <class T>
Normalisers normalisers_of(const Tensor& r) {
  Normalisers all(r.numel());
  for (size_t i = 0; i < all.size(); i++) {
    const double log2_r = double(r.const_data_ptr<T>()[i]) * log2_e, reference = std::floor(log2_r);
    all[i] = log2_r == -INFINITY ? Normaliser{0, 0} : Normaliser{reference, std::exp2(reference - log2_r)};
  }
  return all;
}

// From the values of these pairs alone, which may be few of those in r: exp(z - r) = exp(z - own) exp(own - r). What r's rounding
// explains of own - r is no difference.
template <class T>
Normalisers normalisers_of(const Prepared<T>& p, const Side<T>& side, const Tensor& r) {
  Normalisers all = normalisers_of(p, side);
  for (size_t i = 0; i < all.size(); i++) {
    const T ri = r.const_data_ptr<T>()[i];
    const double own = reduced(p, side, i), difference = own - double(ri);
    if (all[i].factor != 0 && T(own) != ri && !(std::abs(difference) <= Range<T>::epsilon * std::abs(double(ri)))) all[i].factor *= std::exp(difference);
  }
  return all;
}

template <class T>
std::array<Tensor, 6> gradients_of(const Arguments& a, const Tensor& r_, const Tensor& c_, const Tensor& g_, const Tensor& h_, const Wanted& wanted) {
  Prepared<T> p(a);
  const auto dtype = c10::CppTypeToScalarType<T>::value;
  auto vector = [&](const char* name, const Tensor& v, int64_t count) {
    TORCH_CHECK_VALUE(v.dim() == 1 && v.size(0) == count, name, ": expected shape (", count, ",), got ", v.sizes());
    return v.to(dtype).contiguous();
  };
  const int64_t n = p.task.x.count, m = a.columns ? p.task.y.count : 0;
  const Tensor r = vector("r", r_, n), c = vector("c", c_, m), g = vector("g", g_, n), h = vector("h", h_, m);
  Step step = Step::weigh;
  if (p.task.reduce == Reduction::sum) {
    auto set = [&](Side<T>& side, const Tensor& g) {
      T* weight = p.memory.template vector<T>(side.count);
      std::copy_n(g.const_data_ptr<T>(), g.numel(), weight);
      side.weight = weight;
    };
    set(p.task.x, g);
    if (p.task.self) p.task.y.weight = p.task.x.weight;
    else if (m) set(p.task.y, h);
  } else {
    const Tensor exact_g = g.to(at::kDouble), exact_h = h.to(at::kDouble);
    const double *gs = exact_g.const_data_ptr<double>(), *hs = exact_h.const_data_ptr<double>();
    if (is_exact<T>(r) && is_exact<T>(c)) {
      step = set_weights(p, normalisers_of<T>(r), gs, normalisers_of<T>(c), hs);
    } else {
      reduce_all(p, a.columns, false);
      const Normalisers of_x = normalisers_of(p, p.task.x, r);
      step = set_weights(p, of_x, gs, m ? normalisers_of(p, p.task.y, c) : Normalisers(), hs);
      p.forget_values();
    }
  }
  p.want_gradients(wanted, needs_weight_sums(wanted, p.task.operand));
  if (wanted.any()) p.sweep(step);
  return finish(p, wanted, 1, a.x.scalar_type());
}

}  // namespace

std::tuple<Tensor, Tensor> kernel_rows(const Arguments& a) {
  return a.in_double() ? rows_of<double>(a) : rows_of<float>(a);
}

std::array<Tensor, 6> kernel_gradients(const Arguments& a, const Tensor& r, const Tensor& c, const Tensor& g, const Tensor& h, const Wanted& wanted) {
  return a.in_double() ? gradients_of<double>(a, r, c, g, h, wanted) : gradients_of<float>(a, r, c, g, h, wanted);
}

#define FASTCL_INSTANTIATE(T)                                                  \
  template void reduce_all<T>(Prepared<T>&, bool, bool);                                                                     \
  template Normalisers normalisers_of<T>(const Prepared<T>&, const Side<T>&);                                                \
  template Step set_weights<T>(Prepared<T>&, const Normalisers&, const double*, const Normalisers&, const double*);          \
  template std::array<Tensor, 6> finish<T>(Prepared<T>&, const Wanted&, double, at::ScalarType);
FASTCL_INSTANTIATE(float)
FASTCL_INSTANTIATE(double)
#undef FASTCL_INSTANTIATE

}  // namespace fastcl::cpu
