#include "reduce.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace fastcl::cpu {
namespace {

// Each term below 2^-126 was lost; `terms` of them must not show beside the sum.
template <class T>
bool exact(const Side<T>& side, int64_t terms) {
  return std::all_of(side.value, side.value + side.count, [&](double v) { return v >= Range<T>::smallest * double(terms); });
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

template <class T>
Tensor gradient_of(const Prepared<T>& p, const Side<T>& side, const Tensor& rows, Tensor product, double factor, at::ScalarType dtype) {
  if (p.task.operand == Operand::dot) return product.mul_(factor * p.scale).to(dtype);
  const Tensor weight_sum = tensor_of<T>(side.weight_sum, side.count, 1);
  return product.addcmul_(weight_sum.unsqueeze(1), rows, -1).mul_(-2 * factor * p.scale).to(dtype);
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
void weights_from_values(Prepared<T>& p, Side<T>& side, const double* g) {
  T* weight = p.memory.template vector<T>(side.count);
  for (int64_t i = 0; i < side.count; i++) weight[i] = side.value[i] == 0 ? T(0) : T(g[i] / side.value[i]);
  side.weight = weight;
  if (!side.maximum) return;
  T* reference = p.memory.template vector<T>(side.count);
  std::copy_n(side.maximum, side.count, reference);
  side.reference = reference;
}

template <class T>
std::array<Tensor, 6> finish(Prepared<T>& p, const Wanted& wanted, double factor, at::ScalarType dtype) {
  const Side<T>&x = p.task.x, &y = p.task.y;
  const auto options = p.x.options();
  const Tensor absent = at::empty({0}, options);
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
    out[2] = at::full({}, once * u, options);
  }
  if (wanted.shift) out[3] = at::full({}, once * sum_of<T>(x.weight_sum, nullptr, x.count), options);
  if (wanted.bias_x) out[4] = tensor_of<T>(x.weight_sum, x.count, factor);
  if (wanted.bias_y) out[5] = tensor_of<T>(y.weight_sum, y.count, factor);
  if (wanted.x) out[0] = gradient_of(p, x, p.x, p.x_product, factor, dtype);
  if (wanted.y) out[1] = gradient_of(p, y, p.y, p.y_product, factor, dtype);
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

// Where r and c say how large the exponentials are, and exactly enough: their weights against one shared reference
// if their spread allows, else one for each row and column. False: r is so large that its rounding would show.
template <class T>
bool weights_from_r(Prepared<T>& p, const Tensor& r, const Tensor& c, const Tensor& g, const Tensor& h, bool& split) {
  double lowest = INFINITY, highest = -INFINITY;
  for (const Tensor* t : {&r, &c}) {
    const T* v = t->const_data_ptr<T>();
    for (int64_t i = 0; i < t->numel(); i++) {
      if (v[i] == -INFINITY) continue;
      if (!(std::abs(v[i]) <= Range<T>::exact_r)) return false;
      lowest = std::min(lowest, v[i] * log2_e);
      highest = std::max(highest, v[i] * log2_e);
    }
  }
  split = highest - lowest > Range<T>::shared_spread;
  if (highest >= lowest) p.task.reference = T(std::nearbyint((lowest + highest) / 2));
  auto set = [&](Side<T>& side, const Tensor& r, const Tensor& g) {
    T* weight = p.memory.template vector<T>(side.count);
    T* reference = p.memory.template vector<T>(side.count);
    std::copy_n(side.reference, side.count, reference);
    for (int64_t i = 0; i < r.numel(); i++) {
      const T ri = r.const_data_ptr<T>()[i];
      if (ri == -INFINITY) continue;
      reference[i] = split ? T(std::nearbyint(ri * log2_e)) : p.task.reference;
      weight[i] = T(g.const_data_ptr<T>()[i] * std::exp2(reference[i] - ri * log2_e));
    }
    side.weight = weight;
    side.reference = reference;
  };
  set(p.task.x, r, g);
  if (p.task.self) p.task.y.weight = p.task.x.weight, p.task.y.reference = p.task.x.reference;
  else if (c.numel()) set(p.task.y, c, h);
  return true;
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
  } else if (bool split; weights_from_r(p, r, c, g, h, split)) {
    step = split ? Step::weigh_split : Step::weigh;
  } else {
    reduce_all(p, a.columns, false);
    const Tensor exact_g = g.to(at::kDouble), exact_h = h.to(at::kDouble);
    weights_from_values(p, p.task.x, exact_g.const_data_ptr<double>());
    if (p.task.self) p.task.y.weight = p.task.x.weight, p.task.y.reference = p.task.x.reference;
    else if (m) weights_from_values(p, p.task.y, exact_h.const_data_ptr<double>());
    step = weighing(p);
    p.forget_values();
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
  template void reduce_all<T>(Prepared<T>&, bool, bool);                           \
  template void weights_from_values<T>(Prepared<T>&, Side<T>&, const double*); \
  template std::array<Tensor, 6> finish<T>(Prepared<T>&, const Wanted&, double, at::ScalarType);
FASTCL_INSTANTIATE(float)
FASTCL_INSTANTIATE(double)
#undef FASTCL_INSTANTIATE

}  // namespace fastcl::cpu
