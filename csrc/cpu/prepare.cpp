#include "prepare.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastcl::cpu {
namespace {

constexpr int64_t sampled = 32;  // rows of a side, of which the centre is the median

// The one element of a tensor, in T.
template <class T>
double value_of(const Tensor& t) {
  return with_type(t.kind(), [&](auto as) { return double(T(*t.data_as<decltype(as)>())); });
}

// A new matrix whose row i is what make(i, row) writes.
template <class T, class Make>
Rows<T> made(TorchHost& memory, int64_t count, int64_t d, const Make& make) {
  auto* data = static_cast<T*>(memory.allocate(size_t(count * d) * sizeof(T)));
  for_each_row(count, d, [&](int64_t i) { make(i, data + i * d); });
  return {data, d, count, d};
}

// Rows that a kernel can read: in place where they are of T and each is contiguous.
template <class T>
Rows<T> readable(const Tensor& rows, TorchHost& memory) {
  const int64_t count = rows.size(0), d = rows.size(1), step = rows.stride(1);
  if (rows.kind() == kind_of<T> && (step == 1 || d <= 1)) return {rows.data_as<T>(), rows.stride(0), count, d};
  return with_type(rows.kind(), [&](auto as) {
    const auto* data = rows.data_as<decltype(as)>();
    return made<T>(memory, count, d, [=, stride = rows.stride(0)](int64_t i, T* row) {
      const auto* from = data + i * stride;
      if (step == 1) for (int64_t k = 0; k < d; k++) row[k] = T(from[k]);
      else for (int64_t k = 0; k < d; k++) row[k] = T(from[k * step]);
    });
  });
}

// A point amid the rows, always finite: the median of each column over a sample of both sides, of two middle ones the smaller
// (reference.py says why). NaN stands last, as in a sort.
template <class T>
std::vector<T> centre_of(const Rows<T>& x, const Rows<T>* y) {
  std::vector<const T*> sample;
  for (const Rows<T>* side : {&x, y}) {
    if (side == nullptr) continue;
    const int64_t step = std::max<int64_t>(1, (side->count + sampled - 1) / sampled);
    for (int64_t i = 0; i < side->count; i += step) sample.push_back((*side)[i]);
  }
  std::vector<T> centre(x.d), column(sample.size());
  const auto lower = column.begin() + int64_t(sample.size() - 1) / 2;
  for (int64_t k = 0; k < x.d; k++) {
    for (size_t i = 0; i < sample.size(); i++) column[i] = std::isnan(sample[i][k]) ? std::numeric_limits<T>::infinity() : sample[i][k];
    std::nth_element(column.begin(), lower, column.end());
    const T upper = sample.size() % 2 ? *lower : *std::min_element(lower + 1, column.end());
    const T middle = std::abs(upper) < std::abs(*lower) ? upper : *lower;
    centre[k] = std::isfinite(middle) ? middle : T(0);
  }
  return centre;
}

}  // namespace

template <class T>
Prepared<T>::Prepared(const Given& a) {
  const Choices choices = a.check();
  task.self = !a.y;
  task.operand = choices.operand;
  task.reduce = choices.reduce;
  task.mask = choices.mask;
  task.pair = choices.pair;
  if (a.own) task.own_pair = sizeof(T) == 4 ? a.own->of_float : a.own->of_double;
  for (size_t k = 0; k < a.constants.size(); k++) task.constants[k] = T(a.constants[k]);
  task.row_offset = a.row_offset;
  task.col_offset = a.col_offset;
  task.period = a.period;
  task.limited = a.limit_x || a.limit_y;
  // The slopes of these are numbers everywhere, 1 and p max(z, eps)^0; those of one's own may be. Where there are limits every tile is
  // masked, and its weights are marked whatever the slope is.
  const bool straight = a.own || a.pair == "identity" || (a.pair == "power" && a.constants.at(0) == 1);
  marks_nan_ = task.limited || (task.mask != MaskKind::all && (task.reduce == Reduction::logsumexp || !straight));
  task.d = a.x.size(1);

  x = readable<T>(a.x, memory);
  y = task.self ? x : readable<T>(*a.y, memory);
  if (task.operand == Operand::sqdist && y.count > 0) {
    // |x|^2 + |y|^2 - 2 <x, y> cancels for a cloud far from the origin; about a point in its midst it does not.
    const std::vector<T> centre = centre_of(x, task.self ? nullptr : &y);
    auto centred = [&](const Rows<T>& rows) {
      return made<T>(memory, rows.count, rows.d, [&](int64_t i, T* row) {
        for (int64_t k = 0; k < rows.d; k++) row[k] = rows[i][k] - centre[k];
      });
    };
    x = centred(x);
    y = task.self ? x : centred(y);
  }
  // The 11 bits of a float16 are two bfloat16; centred rows are floats.
  const ScalarKind given = a.x.kind();
  const int parts = task.operand == Operand::sqdist ? 3 : given == ScalarKind::bfloat16 ? 1 : given == ScalarKind::float16 ? 2 : 3;
  task.x.parts = task.y.parts = parts;
  scale = value_of<T>(a.scale);
  prepare_sides();
  given_x_ = x, given_y_ = y;
  if (largest_u() > Range<T>::largest_u || std::fmax(longest_x_, longest_y_) > Range<T>::longest) shorten();
  if (std::fmin(longest_x_, longest_y_) < shortest()) lengthen();
  if (a.guide_x) set_guides(a);
  set_units(a);
  if (task.guide) find_beyond(guide_.x, guide_.d), find_beyond(guide_.y, guide_.d);
  if (task.mask == MaskKind::across_groups || task.mask == MaskKind::within_groups) {
    auto groups_of = [&](const Tensor& group) {
      auto* groups = memory.vector<int64_t>(group.size(0));
      const auto* given = group.data_as<int64_t>();
      for (int64_t i = 0; i < group.size(0); i++) groups[i] = given[i * group.stride(0)];
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
void Prepared<T>::prepare_side(Side<T>& side, const Rows<T>& rows) {
  side.rows = rows.data;
  side.row_stride = rows.stride;
  side.weighed = side.rows, side.weighed_stride = side.row_stride;
  side.count = rows.count;
  // Nothing weighs: 0 times an exponential that is 0 for every z.
  side.weight = memory.vector<T>(side.count);
  T* reference = memory.vector<T>(side.count);
  std::fill_n(reference, side.count + slack, std::numeric_limits<T>::max());
  side.reference = reference;
  T* norm = memory.vector<T>(side.count);
  kernels_->squared_norms(side, task.d, norm, memory.host());
  side.norm = norm;
  find_beyond(side, task.d);
}

template <class T>
void Prepared<T>::find_beyond(Side<T>& side, int64_t d) {
  if (!kernels_->rows_beyond) return;
  int32_t* beyond = memory.vector<int32_t>(side.count + 1);
  kernels_->rows_beyond(side, d, beyond, memory.host());
  side.beyond = beyond;
}

// The largest |u| that there can be, by Cauchy and Schwarz.
template <class T>
double Prepared<T>::largest_u() const {
  const double sum = longest_x_ + longest_y_;
  return task.operand == Operand::sqdist ? sum * sum : longest_x_ * longest_y_;
}

// Divides long rows by powers of two, so that neither u nor their products with weights overflow. The scale takes them back, as far as
// it can: beyond, z overflows.
template <class T>
void Prepared<T>::shorten() {
  using R = Range<T>;
  set_lengths();
  const double excess = std::ceil(std::log2(largest_u() / R::largest_u));
  const double room = std::floor(std::log2(R::largest_z / std::abs(scale)));
  auto down = [](double longest) { return longest > R::shortened ? std::ceil(std::log2(longest / R::shortened)) : 0.0; };
  double of_x = down(longest_x_), of_y = down(longest_y_);
  if (alike()) of_x = of_y = std::fmax(of_x, of_y);
  if (of_x + of_y > room) {  // u alone
    const double power = std::fmax(0, std::fmin(excess, room));
    of_x = std::ceil(power / 2), of_y = alike() ? of_x : std::floor(power / 2);
  }
  if (std::isfinite(longest_x_ + longest_y_)) x_unit = std::exp2(of_x), y_unit = std::exp2(of_y);
  divide();
}

// The longest row that a side has to be lengthened for.
template <class T>
double Prepared<T>::shortest() const {
  return std::abs(scale) * x_unit * y_unit > Range<T>::large_scale ? 1.0 : Range<T>::shortest;
}

// The mirror image: multiplies rows, so that their products with weights keep their digits. No further than u allows, nor than leaves
// the scale its own.
template <class T>
void Prepared<T>::lengthen() {
  using R = Range<T>;
  set_lengths();
  const double whole = std::abs(scale) * x_unit * y_unit;
  const double most = std::log2(R::largest_u), room = std::fmin(most, std::floor(std::log2(whole / R::least_scale) / 2));
  auto power = [&](double longest, double other) {
    if (!(longest > 0 && longest < shortest())) return 0.0;
    return std::fmax(0, std::fmin(room, std::floor(std::fmin(0, most - std::log2(other)) - std::log2(longest))));
  };
  double of_x = power(longest_x_, longest_y_), of_y = power(longest_y_, longest_x_);
  if (alike()) of_x = of_y = power(std::fmax(longest_x_, longest_y_), 0);
  x_unit *= std::exp2(-of_x), y_unit *= std::exp2(-of_y);
  divide();
}

// The length that the largest element allows the rows: their squares may be beyond the range of T.
template <class T>
void Prepared<T>::set_lengths() {
  auto length = [&](const Rows<T>& rows) {
    double largest = 0;  // NaN stays, as above
    for (int64_t i = 0; i < rows.count; i++)
      for (int64_t k = 0; k < rows.d; k++)
        if (const double e = std::abs(double(rows[i][k])); !(e <= largest) && !std::isnan(largest)) largest = e;
    return largest * std::sqrt(double(task.d));
  };
  longest_x_ = length(x), longest_y_ = task.self ? longest_x_ : length(y);
}

// The rows as they were given over their units.
template <class T>
void Prepared<T>::divide() {
  auto divided = [&](const Rows<T>& rows, double unit) {
    const T by = T(1 / unit);
    return unit == 1 ? rows : made<T>(memory, rows.count, rows.d, [&](int64_t i, T* row) {
      for (int64_t k = 0; k < rows.d; k++) row[k] = rows[i][k] * by;
    });
  };
  x = divided(given_x_, x_unit), y = task.self ? x : divided(given_y_, y_unit);
  prepare_sides();
}

// What each row brings to z and what it allows z to be, in the given unit; the largest of the terms, infinite ones left out: they
// are padding. A limit of NaN is a term of NaN: no comparison with it would show.
template <class T>
double Prepared<T>::set_terms(Side<T>& side, const OptionalTensor& bias, const OptionalTensor& limit, double shift, double unit) {
  T* term = memory.vector<T>(side.count);
  const T* b = bias ? bias->data_as<T>() : nullptr;
  const int64_t step = bias ? bias->stride(0) : 0;
  double largest = 0;
  for (int64_t i = 0; i < side.count; i++) {
    const double exact = (shift + (b ? double(b[i * step]) : 0.0)) * unit;
    term[i] = T(exact);
    if (std::isfinite(exact)) largest = std::fmax(largest, std::abs(exact));
  }
  side.term = term;
  if (task.limited) set_limits(side, &side == &task.x ? guide_.x : guide_.y, limit, term, unit);
  return largest;
}

// What z may be at most, in its unit, or the product of the guides. A limit of NaN is a term of NaN, as no comparison with it would
// show, and so is a guide of NaN; a guide is NaN where its limit is, so that the other side's limit leaves out none of its pairs.
template <class T>
void Prepared<T>::set_limits(Side<T>& side, Side<T>& guide, const OptionalTensor& limit, T* term, double unit) {
  T* limits = memory.vector<T>(side.count);
  const T* given = limit ? limit->data_as<T>() : nullptr;
  const int64_t k = guide_.d;
  if (task.guide) unit = 1;
  bool marked = false;
  for (int64_t i = 0; i < side.count; i++) {
    limits[i] = given ? T(double(given[i * limit->stride(0)]) * unit) : std::numeric_limits<T>::infinity();
    marked |= bool(std::isnan(limits[i]));
    const T* row = task.guide ? guide.rows + i * guide.row_stride : nullptr;
    if (std::isnan(limits[i]) || (row && std::any_of(row, row + k, [](T t) { return std::isnan(t); })))
      term[i] = std::numeric_limits<T>::quiet_NaN();
  }
  side.limit = limits;
  if (!task.guide || !marked) return;
  const Rows<T> rows = made<T>(memory, guide.count, k, [&](int64_t i, T* row) {
    if (std::isnan(limits[i])) std::fill_n(row, k, limits[i]);
    else std::copy_n(guide.rows + i * guide.row_stride, k, row);
  });
  guide.rows = rows.data, guide.row_stride = rows.stride;
}

// The rows of the product that limits are on, as a task that has nothing else.
template <class T>
void Prepared<T>::set_guides(const Given& a) {
  guide_.self = task.self;
  guide_.d = a.guide_x->size(1);
  auto set = [&](Side<T>& side, const Tensor& given) {
    const Rows<T> rows = readable<T>(given, memory);
    side.rows = rows.data, side.row_stride = rows.stride, side.count = rows.count;
  };
  set(guide_.x, *a.guide_x);
  if (task.self) guide_.y = guide_.x;
  else set(guide_.y, *a.guide_y);
  task.guide = &guide_;
}

// z's unit, and the largest z that there can be.
template <class T>
void Prepared<T>::set_units(const Given& a) {
  const double shift = value_of<T>(a.shift), u = largest_u(), whole_scale = scale * x_unit * y_unit;
  const bool logarithmic = task.reduce == Reduction::logsumexp;
  const OptionalTensor none;
  auto set = [&](double unit) {
    task.scale = T(whole_scale * unit);
    const double x_terms = set_terms(task.x, a.bias_x, a.limit_x, shift, unit);
    const OptionalTensor& limit_y = task.self ? a.limit_x : a.limit_y;
    return x_terms + set_terms(task.y, task.self ? none : a.bias_y, limit_y, 0, unit);  // in x with itself the shift counts once
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

// A pair that the mask leaves out has a weight of 0, and 0 times NaN is NaN: what is weighed has 0 for a row of NaN. Those that do
// meet the row have a weight of NaN.
template <class T>
void Prepared<T>::keep_nan_apart(Side<T>& side) {
  const auto* given = side.rows;
  const Rows<T> apart = made<T>(memory, side.count, task.d, [&](int64_t i, T* row) {
    if (std::isnan(side.norm[i])) std::fill_n(row, task.d, T(0));
    else std::copy_n(given + i * side.row_stride, task.d, row);
  });
  side.weighed = apart.data, side.weighed_stride = apart.stride;
}

template <class T>
void Prepared<T>::want_gradients(const Wanted& wanted, bool weight_sums) {
  if (marks_nan_ && std::isnan(longest_x_)) keep_nan_apart(task.x);
  if (task.self) task.y.weighed = task.x.weighed, task.y.weighed_stride = task.x.weighed_stride;
  else if (marks_nan_ && std::isnan(longest_y_)) keep_nan_apart(task.y);
  auto product = [&](const Side<T>& side, OptionalTensor& into) {
    into = zeros({side.count, task.d}, kind_of<T>);
    return into->template mutable_data_as<T>();
  };
  // da needs one of the two products.
  task.x.product = wanted.x || (wanted.scale && !wanted.y) ? product(task.x, x_product) : nullptr;
  task.y.product = task.self ? task.x.product : wanted.y ? product(task.y, y_product) : nullptr;
  if (weight_sums) {
    task.x.weight_sum = memory.vector<double>(task.x.count);
    task.y.weight_sum = task.self ? task.x.weight_sum : memory.vector<double>(task.y.count);
  }
}

template class Prepared<float>;
template class Prepared<double>;

}  // namespace fastcl::cpu
