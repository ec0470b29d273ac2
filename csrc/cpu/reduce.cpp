#include "reduce.h"

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
  parallel_for(int64_t(sums.size()), 8, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
      for (int64_t i = b * block; i < std::min((b + 1) * block, side.count); i++)
        for (int64_t k = 0; k < d; k++) sums[b] += double(side.weighed[i * side.weighed_stride + k]) * double(product[i * d + k]);
  });
  double sum = 0;
  for (double s : sums) sum += s;
  return sum;
}

// A weight of 0 takes nothing from a norm of NaN: that row meets nothing.
template <class T>
double sum_of(const double* v, const T* factor, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; i++) sum += factor == nullptr ? v[i] : v[i] == 0 ? 0 : v[i] * double(factor[i]);
  return sum;
}

template <class T>
Tensor tensor_of(const double* v, int64_t count, double factor) {
  Tensor out = empty({count}, kind_of<T>);
  T* o = out.mutable_data_as<T>();
  for (int64_t i = 0; i < count; i++) o[i] = T(v[i] * factor);
  return out;
}

// dx = a W Y, or -2a (W Y - diag(W 1) X), rounded to T and then to the rows' dtype; in double, so that no factor leaves the range on
// its way.
template <class T>
Tensor gradient_of(const Prepared<T>& p, const Side<T>& side, OptionalTensor& product, double factor, ScalarKind kind) {
  const bool sqdist = p.task.operand == Operand::sqdist;
  const int64_t d = p.task.d;
  const double slope = sqdist ? -2 * factor * p.scale : factor * p.scale;
  const T* sums = product->template data_as<T>();
  Tensor out = kind == kind_of<T> ? std::move(*product) : empty({side.count, d}, kind);
  with_type(kind, [&](auto as) {
    using U = decltype(as);
    U* all = out.mutable_data_as<U>();
    for_each_row(side.count, d, [&](int64_t i) {
      U* o = all + i * d;
      const T *s = sums + i * d, *row = side.weighed + i * side.weighed_stride;
      if (sqdist) for (int64_t k = 0; k < d; k++) o[k] = U(T(slope * (double(s[k]) - side.weight_sum[i] * double(row[k]))));
      else for (int64_t k = 0; k < d; k++) o[k] = U(T(slope * double(s[k])));
    });
  });
  return out;
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
Six finish(Prepared<T>& p, const Wanted& wanted, double factor, ScalarKind kind) {
  const Side<T>&x = p.task.x, &y = p.task.y;
  const Tensor absent = empty({0}, kind_of<T>);
  // In x with itself w_ij holds both orders of a pair, and each pair comes twice.
  const double once = p.task.self ? 0.5 * factor : factor;
  auto scale = [&] {
    // No pair, no product: the pointers of empty tensors are null, which below means another thing.
    const bool none = x.count == 0 || y.count == 0;
    double u = none ? 0 : x.product ? inner(x, x.product, p.task.d) : inner(y, y.product, p.task.d);
    if (p.task.operand == Operand::sqdist)
      u = sum_of(x.weight_sum, x.norm, x.count) + sum_of(y.weight_sum, y.norm, y.count) - 2 * u;
    return scalar<T>(once * u * p.x_unit * p.y_unit);
  };
  // The scale's first: it reads the products, which the others replace.
  Tensor of_scale = wanted.scale ? scale() : absent.again();
  return {wanted.x ? gradient_of(p, x, p.x_product, factor * p.y_unit, kind) : absent.again(),
          wanted.y ? gradient_of(p, y, p.y_product, factor * p.x_unit, kind) : absent.again(), std::move(of_scale),
          wanted.shift ? scalar<T>(once * sum_of<T>(x.weight_sum, nullptr, x.count)) : absent.again(),
          wanted.bias_x ? tensor_of<T>(x.weight_sum, x.count, factor) : absent.again(),
          wanted.bias_y ? tensor_of<T>(y.weight_sum, y.count, factor) : absent.again()};
}

template <class T>
const T* vector_of(const char* name, const Tensor& v, int64_t count, const Given& a, TorchHost& memory) {
  FASTCL_CHECK_VALUE(v.dim() == 1 && v.size(0) == count, name, ": expected shape (", count, ",), got ", v.describe());
  FASTCL_CHECK_TYPE(v.kind() != ScalarKind::other && v.kind() != ScalarKind::int64, name, ": expected a floating dtype, got ", v.describe().dtype);
  check_device(name, v.describe(), a.x.describe());
  T* copy = memory.vector<T>(count);
  with_type(v.kind(), [&](auto as) {
    const auto* given = v.data_as<decltype(as)>();
    for (int64_t i = 0; i < count; i++) copy[i] = T(given[i * v.stride(0)]);
  });
  return copy;
}

namespace {

template <class T>
void rows_of(const Given& a, Stack results) {
  Prepared<T> p(a);
  reduce_all(p, a.columns);
  auto put = [&](const Side<T>& side, int64_t count) {
    Tensor r = empty({count}, kind_of<T>);
    T* values = r.mutable_data_as<T>();
    for (int64_t i = 0; i < count; i++) values[i] = T(reduced(p, side, i));
    results.put(std::move(r));
  };
  put(p.task.x, p.task.x.count);
  put(p.task.y, a.columns ? p.task.y.count : 0);
}

// r, c, g or h.
template <class T>
struct Vector {
  const T* data;
  int64_t count;
};

// Whether exp(z - r) can be formed of r itself: beyond, its rounding would show.
template <class T>
bool is_exact(const Vector<T>& r) {
  return std::all_of(r.data, r.data + r.count, [](T ri) { return ri == -INFINITY || std::abs(ri) <= Range<T>::exact_r; });
}

template <class T>
Normalisers normalisers_of(const Vector<T>& r) {
  Normalisers all(r.count);
  for (size_t i = 0; i < all.size(); i++) {
    const double log2_r = double(r.data[i]) * log2_e, reference = std::floor(log2_r);
    all[i] = log2_r == -INFINITY ? Normaliser{0, 0} : Normaliser{reference, std::exp2(reference - log2_r)};
  }
  return all;
}

// From the values of these pairs alone, which may be few of those in r: exp(z - r) = exp(z - own) exp(own - r). What r's rounding
// explains of own - r is no difference.
template <class T>
Normalisers normalisers_of(const Prepared<T>& p, const Side<T>& side, const Vector<T>& r) {
  Normalisers all = normalisers_of(p, side);
  for (size_t i = 0; i < all.size(); i++) {
    const T ri = r.data[i];
    const double own = reduced(p, side, i), difference = own - double(ri);
    if (all[i].factor != 0 && T(own) != ri && !(std::abs(difference) <= Range<T>::epsilon * std::abs(double(ri)))) all[i].factor *= std::exp(difference);
  }
  return all;
}

template <class T>
void gradients_of(const Given& a, const std::array<Tensor, 4>& given, const Wanted& wanted, ScalarKind of_rows, Stack results) {
  Prepared<T> p(a);
  const int64_t n = p.task.x.count, m = a.columns ? p.task.y.count : 0;
  auto vector = [&](const char* name, const Tensor& v, int64_t count) { return Vector<T>{vector_of<T>(name, v, count, a, p.memory), count}; };
  const Vector<T> r = vector("r", given[0], n), c = vector("c", given[1], m), g = vector("g", given[2], n), h = vector("h", given[3], m);
  Step step = Step::weigh;
  if (p.task.reduce == Reduction::sum) {
    p.task.x.weight = g.data;
    if (p.task.self) p.task.y.weight = p.task.x.weight;
    else if (m) p.task.y.weight = h.data;
  } else {
    const std::vector<double> gs(g.data, g.data + n), hs(h.data, h.data + m);
    if (is_exact(r) && is_exact(c)) {
      step = set_weights(p, normalisers_of(r), gs.data(), normalisers_of(c), hs.data());
    } else {
      reduce_all(p, a.columns, false);
      const Normalisers of_x = normalisers_of(p, p.task.x, r);
      step = set_weights(p, of_x, gs.data(), m ? normalisers_of(p, p.task.y, c) : Normalisers(), hs.data());
      p.forget_values();
    }
  }
  p.want_gradients(wanted, needs_weight_sums(wanted, p.task.operand));
  if (wanted.any()) p.sweep(step);
  for (Tensor& t : finish(p, wanted, 1, of_rows)) results.put(std::move(t));
}

}  // namespace

void kernel_rows(Stack stack) {
  const Stack results = stack;
  const Given a(stack);
  a.in_double() ? rows_of<double>(a, results) : rows_of<float>(a, results);
}

void kernel_gradients(Stack stack) {
  const Stack results = stack;
  const Given a(stack);
  const std::array<Tensor, 4> given{stack.tensor(), stack.tensor(), stack.tensor(), stack.tensor()};
  const Wanted wanted(stack.six_booleans());
  const bool wide = stack.boolean();
  a.check(wanted);
  if (a.in_double()) return gradients_of<double>(a, given, wanted, ScalarKind::float64, results);
  gradients_of<float>(a, given, wanted, wide ? ScalarKind::float32 : a.x.kind(), results);
}

#define FASTCL_INSTANTIATE(T)                                                                                                \
  template void reduce_all<T>(Prepared<T>&, bool, bool);                                                                     \
  template Normalisers normalisers_of<T>(const Prepared<T>&, const Side<T>&);                                                \
  template Step set_weights<T>(Prepared<T>&, const Normalisers&, const double*, const Normalisers&, const double*);          \
  template const T* vector_of<T>(const char*, const Tensor&, int64_t, const Given&, TorchHost&);                             \
  template Six finish<T>(Prepared<T>&, const Wanted&, double, ScalarKind);
FASTCL_INSTANTIATE(float)
FASTCL_INSTANTIATE(double)
#undef FASTCL_INSTANTIATE

}  // namespace fastcl::cpu
