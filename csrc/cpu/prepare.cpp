#include "prepare.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastcl::cpu {
namespace {

constexpr double log2_e = 1.4426950408889634074;

// Rows that a kernel can read in place: of T, each row contiguous. No copy where they already are.
template <class T>
Tensor readable(const Tensor& rows) {
  const Tensor converted = rows.to(c10::CppTypeToScalarType<T>::value);
  return converted.stride(1) == 1 || converted.size(1) <= 1 ? converted : converted.contiguous();
}

}  // namespace

Host TorchHost::host() {
  return Host{this, at::in_parallel_region() ? 1 : at::get_num_threads(),
              [](void*, int tasks, void (*body)(void*, int), void* argument) {
                at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
                  for (int64_t t = begin; t < end; t++) body(argument, int(t));
                });
              },
              [](void* self, size_t bytes) { return static_cast<TorchHost*>(self)->allocate(bytes); }};
}

void* TorchHost::allocate(size_t bytes) {
  memory_.push_back(at::empty({int64_t(std::max<size_t>(bytes, 64))}, at::kByte));
  return memory_.back().data_ptr();
}

template <class T>
Prepared<T>::Prepared(const Arguments& a) {
  const Choices choices = a.check();
  task.self = !a.y;
  task.operand = choices.operand;
  task.reduce = choices.reduce;
  task.mask = choices.mask;
  task.pair = choices.pair;
  for (size_t k = 0; k < a.constants.size(); k++) task.constants[k] = T(a.constants[k]);
  task.row_offset = a.row_offset;
  task.col_offset = a.col_offset;
  task.period = a.period;
  task.d = a.x.size(1);

  x = readable<T>(a.x);
  y = task.self ? x : readable<T>(*a.y);
  if (task.operand == Operand::sqdist && y.size(0) > 0) {
    // |x|^2 + |y|^2 - 2 <x, y> cancels for a cloud far from the origin; about a point in its midst it does not.
    const Tensor centre = y.mean(0, false, at::kDouble).to(y.scalar_type());
    x = x - centre;
    y = task.self ? x : y - centre;
  }
  // The 11 bits of a float16 are two bfloat16; centred rows are floats.
  const auto given = a.x.scalar_type();
  const int parts = task.operand == Operand::sqdist ? 3 : given == at::kBFloat16 ? 1 : given == at::kHalf ? 2 : 3;
  task.x.parts = task.y.parts = parts;
  scale = a.scale.item<T>();
  prepare_sides();
  if (largest_u() > Range<T>::largest_u) shorten();
  set_units(a);
  if (task.mask == MaskKind::across_groups || task.mask == MaskKind::within_groups) {
    auto groups_of = [&](const Tensor& group) {
      auto* groups = memory.vector<int64_t>(group.size(0));
      const Tensor contiguous = group.contiguous();
      std::copy_n(contiguous.const_data_ptr<int64_t>(), group.size(0), groups);
      return groups;
    };
    task.x.group = groups_of(*a.group_x);
    task.y.group = a.group_y ? groups_of(*a.group_y) : task.x.group;
  }
}

template <class T>
void Prepared<T>::prepare_sides() {
  auto longest = [](const Side<T>& side) {
    double norm = 0;
    // NaN stays: it makes every bound NaN, and the careful forms, which need none, hand it on.
    for (int64_t i = 0; i < side.count; i++) norm = std::isnan(norm) || side.norm[i] <= norm ? norm : double(side.norm[i]);
    return std::sqrt(norm);
  };
  prepare_side(task.x, x);
  if (task.self) task.y = task.x;
  else prepare_side(task.y, y);
  longest_x_ = longest(task.x), longest_y_ = longest(task.y);
}

template <class T>
void Prepared<T>::prepare_side(Side<T>& side, const Tensor& rows) {
  side.rows = rows.const_data_ptr<T>();
  side.row_stride = rows.stride(0);
  side.count = rows.size(0);
  // Nothing weighs: 0 times an exponential that is 0 for every z.
  side.weight = memory.vector<T>(side.count);
  T* reference = memory.vector<T>(side.count);
  std::fill_n(reference, side.count + slack, std::numeric_limits<T>::max());
  side.reference = reference;
  T* norm = memory.vector<T>(side.count);
  kernels_->squared_norms(side, task.d, norm, memory.host());
  side.norm = norm;
  if (!kernels_->rows_beyond) return;
  int32_t* beyond = memory.vector<int32_t>(side.count + 1);
  kernels_->rows_beyond(side, task.d, beyond, memory.host());
  side.beyond = beyond;
}

// The largest |u| that there can be, by Cauchy and Schwarz.
template <class T>
double Prepared<T>::largest_u() const {
  const double sum = longest_x_ + longest_y_;
  return task.operand == Operand::sqdist ? sum * sum : longest_x_ * longest_y_;
}

// Divides the rows by powers of two so that u does not overflow. The scale takes them back, as far as it can: beyond, z overflows.
template <class T>
void Prepared<T>::shorten() {
  auto length = [&](const Tensor& rows) { return rows.numel() ? rows.abs().amax().template item<double>() * std::sqrt(double(task.d)) : 0.0; };
  longest_x_ = length(x), longest_y_ = task.self ? longest_x_ : length(y);
  const double excess = std::ceil(std::log2(largest_u() / Range<T>::largest_u));
  const double room = std::floor(std::log2(Range<T>::largest_z / std::abs(scale)));
  if (const double power = std::fmin(excess, room); std::isfinite(excess) && power > 0) {
    const bool alike = task.self || task.operand == Operand::sqdist;
    x_unit = std::exp2(std::ceil(power / 2)), y_unit = alike ? x_unit : std::exp2(std::floor(power / 2));
    x = x * (1 / x_unit), y = task.self ? x : y * (1 / y_unit);
  }
  prepare_sides();
}

// What each row brings to z, in the given unit; the largest of them, infinite ones left out: they are padding.
template <class T>
double Prepared<T>::set_terms(Side<T>& side, const std::optional<Tensor>& bias, double shift, double unit) {
  T* term = memory.vector<T>(side.count);
  const Tensor contiguous = bias ? bias->contiguous() : Tensor();
  const T* b = bias ? contiguous.const_data_ptr<T>() : nullptr;
  double largest = 0;
  for (int64_t i = 0; i < side.count; i++) {
    const double exact = (shift + (b ? double(b[i]) : 0.0)) * unit;
    term[i] = T(exact);
    if (std::isfinite(exact)) largest = std::fmax(largest, std::abs(exact));
  }
  side.term = term;
  return largest;
}

// z's unit, and the largest z that there can be.
template <class T>
void Prepared<T>::set_units(const Arguments& a) {
  const double shift = a.shift.item<T>(), u = largest_u(), whole_scale = scale * x_unit * y_unit;
  const bool logarithmic = task.reduce == Reduction::logsumexp;
  auto set = [&](double unit) {
    task.scale = T(whole_scale * unit);
    const double x_terms = set_terms(task.x, a.bias_x, shift, unit);
    return x_terms + set_terms(task.y, task.self ? std::nullopt : a.bias_y, 0, unit);  // in x with itself the shift counts once
  };
  const double terms = set(logarithmic ? log2_e : 1);
  if (!logarithmic) return;
  const double reach = std::abs(whole_scale) * log2_e * u;
  if (!(reach + terms < Range<T>::largest_z && std::abs(whole_scale) * log2_e < Range<T>::largest_z)) {
    task.unit = T(coarse_unit);
    set(log2_e / coarse_unit);
  }
  auto highest = [](const Side<T>& side) {
    double term = -INFINITY;
    for (int64_t i = 0; i < side.count; i++) term = std::isnan(term) || side.term[i] <= term ? term : double(side.term[i]);
    return term;
  };
  bound_ = (task.operand == Operand::sqdist && scale <= 0 ? 0 : reach * (1 + 1e-5)) + highest(task.x) + highest(task.y);
}

template <class T>
bool Prepared<T>::share(bool of_products) {
  if (task.unit != 1 || !(std::abs(bound_) < Range<T>::shared_bound)) return false;
  auto multiplies = [](double longest) { return longest >= Range<T>::least_row && longest <= Range<T>::largest_row; };
  if (of_products && !(multiplies(longest_x_) && multiplies(longest_y_))) return false;
  task.reference = T(std::ceil(bound_) - (of_products ? Range<T>::headroom_of_product : Range<T>::headroom));
  return true;
}

template <class T>
void Prepared<T>::want_values(bool of_y) {
  task.x.value = memory.vector<double>(task.x.count);
  if (of_y) task.y.value = task.self ? task.x.value : memory.vector<double>(task.y.count);
}

template <class T>
void Prepared<T>::want_maxima() {
  task.x.maximum = memory.vector<T>(task.x.count);
  task.y.maximum = task.self ? task.x.maximum : memory.vector<T>(task.y.count);
  std::fill_n(task.x.maximum, task.x.count, std::numeric_limits<T>::lowest());
  std::fill_n(task.y.maximum, task.y.count, std::numeric_limits<T>::lowest());
}

template <class T>
void Prepared<T>::forget_values() {
  task.x.value = task.y.value = nullptr;
}

template <class T>
void Prepared<T>::want_gradients(const Wanted& wanted, bool weight_sums) {
  auto zeros = [&](const Side<T>& side) { return at::zeros({side.count, task.d}, x.options()); };
  // da needs one of the two products.
  if (wanted.x || (wanted.scale && !wanted.y)) x_product = zeros(task.x);
  if (task.self) y_product = x_product;
  else if (wanted.y) y_product = zeros(task.y);
  task.x.product = x_product.defined() ? x_product.mutable_data_ptr<T>() : nullptr;
  task.y.product = y_product.defined() ? y_product.mutable_data_ptr<T>() : nullptr;
  if (weight_sums) {
    task.x.weight_sum = memory.vector<double>(task.x.count);
    task.y.weight_sum = task.self ? task.x.weight_sum : memory.vector<double>(task.y.count);
  }
}

template class Prepared<float>;
template class Prepared<double>;

}  // namespace fastcl::cpu
