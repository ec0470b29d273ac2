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
  task.d = a.x.size(1);

  x = readable<T>(a.x);
  y = task.self ? x : readable<T>(*a.y);
  if (task.operand == Operand::sqdist && y.size(0) > 0) {
    // |x|^2 + |y|^2 - 2 <x, y> cancels for a cloud far from the origin; about a point in its midst it does not.
    const Tensor centre = y.mean(0);
    x = x - centre;
    y = task.self ? x : y - centre;
  }
  // The 11 bits of a float16 are two bfloat16; centred rows are floats.
  const auto given = a.x.scalar_type();
  const int parts = task.operand == Operand::sqdist ? 3 : given == at::kBFloat16 ? 1 : given == at::kHalf ? 2 : 3;
  task.x.parts = task.y.parts = parts;
  // For a log-sum-exp z is in units of log 2.
  const double unit = task.reduce == Reduction::logsumexp ? log2_e : 1;
  scale = a.scale.item<T>();
  task.scale = T(scale * unit);
  prepare_side(task.x, x, a.bias_x, a.shift.item<T>(), unit);
  if (task.self) {
    task.y = task.x;
    task.y.term = memory.vector<T>(task.y.count);  // the shift counts once
  } else {
    prepare_side(task.y, y, a.bias_y, 0, unit);
  }
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
  if (!norms_are_held(task.x) || !norms_are_held(task.y)) kernels_ = &kernels_of_any_norm<T>();
  if (task.reduce == Reduction::logsumexp) bound_z();
}

template <class T>
bool Prepared<T>::norms_are_held(const Side<T>& side) const {
  const double least = kernels_->least_norm * kernels_->least_norm, most = kernels_->most_norm * kernels_->most_norm;
  return least == 0 || std::all_of(side.norm, side.norm + side.count, [&](T norm) { return norm == 0 || (norm >= least && norm <= most); });
}

template <class T>
void Prepared<T>::prepare_side(Side<T>& side, const Tensor& rows, const std::optional<Tensor>& bias, double shift, double unit) {
  side.rows = rows.const_data_ptr<T>();
  side.row_stride = rows.stride(0);
  side.count = rows.size(0);
  T* term = memory.vector<T>(side.count);
  const Tensor contiguous = bias ? bias->contiguous() : Tensor();
  const T* b = bias ? contiguous.const_data_ptr<T>() : nullptr;
  for (int64_t i = 0; i < side.count; i++) term[i] = T((shift + (b ? double(b[i]) : 0.0)) * unit);
  side.term = term;
  // Nothing weighs: 0 times an exponential that is 0 for every z.
  side.weight = memory.vector<T>(side.count);
  T* reference = memory.vector<T>(side.count);
  std::fill_n(reference, side.count + slack, std::numeric_limits<T>::max());
  side.reference = reference;
  T* norm = memory.vector<T>(side.count);
  if (task.operand == Operand::sqdist || task.reduce == Reduction::logsumexp || kernels_->least_norm > 0)
    kernels<T>().squared_norms(side, task.d, norm, memory.host());
  side.norm = norm;
}

// The largest z that there can be, by Cauchy and Schwarz.
template <class T>
void Prepared<T>::bound_z() {
  double norm_x = 0, norm_y = 0, term_x = -INFINITY, term_y = -INFINITY;
  auto maxima = [](const Side<T>& side, double& norm, double& term) {
    for (int64_t i = 0; i < side.count; i++) {
      // NaN must not lose the comparison: it makes the bound NaN, and the running maxima hand it on.
      norm = side.norm[i] <= norm ? norm : double(side.norm[i]);
      term = side.term[i] <= term ? term : double(side.term[i]);
    }
  };
  maxima(task.x, norm_x, term_x);
  maxima(task.y, norm_y, term_y);
  const double a = task.scale;
  double u = std::sqrt(norm_x) * std::sqrt(norm_y);
  if (task.operand == Operand::sqdist) u = a > 0 ? norm_x + norm_y + 2 * u : 0;
  bound_ = std::abs(a) * u * (1 + 1e-5) + term_x + term_y;
  largest_row_ = std::sqrt(std::fmax(norm_x, norm_y));
}

template <class T>
bool Prepared<T>::share(bool of_products) {
  constexpr double exact_integers = 1 << 20;
  if (!(std::abs(bound_) < exact_integers) || (of_products && largest_row_ > Range<T>::largest_norm)) return false;
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
