// A whole loss of two views whose rows of equal index match, in one call: from rows as they are given to one number, and on to the
// gradients of its rows of unit length. For a few dozen rows most of a loss's time goes into the calls between its parts.
//
//     z_ij = a u(x_i, y_j) + b           u of rows of unit length, or of rows as they are; pairs (i, i) are positives alone
//     contrast    L = w sum_i softplus(r_i - z_ii)                             r_i the log-sum-exp of z_ij; with columns, half
//                                                                              of this and half of the same of the columns
//     sum         L = w sum_ij f(p z_ij + q) + sum_i [ w' h(p' z_ii + q') + l z_ii ] + k
//
// Sides: xy, pairs of x with y; xx, of x with itself; xx+yy, of either; stacked, of [x; y] with itself.
#include "reduce.h"
#include "rows.h"

namespace fastcl::cpu {
namespace {

using T = float;  // float64 is left out: there the definition is torch's alone

// w f(p z + q), with the constants of f after its three numbers.
struct Term {
  std::string pair;
  std::vector<double> numbers;
  double weight() const { return numbers[0]; }
  double slope() const { return numbers[1]; }
  double offset() const { return numbers[2]; }
  std::vector<double> constants() const { return {numbers.begin() + 3, numbers.end()}; }

  Term(std::string name, std::vector<double> given) : pair(std::move(name)), numbers(std::move(given)) {
    FASTCL_CHECK_VALUE(numbers.size() >= 3, "numbers: expected a weight, a slope and an offset of '", pair, "', got ", int64_t(numbers.size()));
  }
};

// An op's arguments: ALIGNED of fastcl/equation/problem.py.
struct Form {
  Tensor x, y, scale, shift;
  bool normalize;
  std::string sides, operand, reduce, outer;
  bool columns;
  Term negatives, positives;
  double linear, constant;

  explicit Form(Stack& s)
      : x(s.tensor()), y(s.tensor()), scale(s.tensor()), shift(s.tensor()), normalize(s.boolean()), sides(s.text()), operand(s.text()),
        reduce(s.text()), outer(s.text()), columns(s.boolean()), negatives(term(s)), positives(term(s)), linear(s.number()), constant(s.number()) {
    for (const Tensor* t : {&x, &y}) {
      FASTCL_CHECK_VALUE(t->dim() == 2, "rows: expected a matrix (n, d), got shape ", t->describe());
      FASTCL_CHECK_TYPE(t->kind() == kind_of<T>, "rows: expected float32, got ", t->describe().dtype);
    }
    const bool alike = x.size(0) == y.size(0);
    FASTCL_CHECK_VALUE(x.size(1) == y.size(1) && (alike || (sides == "xy" && !columns && x.size(0) < y.size(0))),
                       "y: expected rows that match those of x, of shape ", x.describe(), ", got ", y.describe());
    FASTCL_CHECK_VALUE(sides == "xy" || sides == "xx" || sides == "xx+yy" || sides == "stacked", "sides: expected xy, xx, xx+yy or stacked, got ", sides);
    FASTCL_CHECK_VALUE(!columns || outer == "contrast", "columns: expected outer='contrast', got ", outer);
    for (const Tensor* t : {&scale, &shift})
      FASTCL_CHECK_TYPE(t->count() == 1 && t->kind() == kind_of<T>, "scale and shift: expected one number of float32, got ", t->describe());
    for (const Tensor* t : {&y, &scale, &shift}) check_device("y, scale and shift", t->describe(), x.describe());
  }

 private:
  static Term term(Stack& s) {
    std::string name = s.text();
    return {std::move(name), s.numbers()};
  }
};

// A term that is absent, or whose slope has gone to 0, takes nothing from an infinite logit: NaN comes of NaN alone.
double times(double weight, double number) { return weight == 0 && std::isinf(number) ? 0 : weight * number; }

class AlignedLoss {
  const Form& form_;
  const Wanted wanted_;
  const int64_t n_ = form_.x.size(0), m_ = form_.y.size(0), d_ = form_.x.size(1);
  const bool stacked_ = form_.sides == "stacked", squared_ = form_.operand == "sqdist", contrast_ = form_.outer == "contrast";
  const double scale_ = *form_.scale.data_as<T>(), shift_ = *form_.shift.data_as<T>();
  Tensor x_, y_;  // as they are paired: stacked, both are in x
  Matrix<T> xs_, ys_;
  std::vector<double> u_, g_;  // of positives: u(x_i, y_i) and d L / d z_ii
  double value_ = 0, of_scale_ = 0, of_shift_ = 0;
  Tensor of_x_ = empty({0}, kind_of<T>), of_y_ = empty({0}, kind_of<T>);

 public:
  AlignedLoss(const Form& form, const Wanted& wanted)
      : form_(form), wanted_(wanted), x_(paired(form.x, stacked_ ? &form.y : nullptr)), y_(stacked_ ? form.y.again() : paired(form.y, nullptr)),
        xs_(x_), ys_(stacked_ ? x_ : y_), u_(n_), g_(n_) {
    for_each_row(n_, d_, [&](int64_t i) { u_[i] = T(squared_ ? distance(x_row(i), y_row(i)) : inner(x_row(i), y_row(i), d_)); });
  }

  void run(Stack results) {
    Tensor positive = of_positives();
    if (!contrast_) value_ += positives(std::move(positive)), negatives(form_.sides == "xx+yy", {});
    else negatives(false, std::move(positive));
    for (int64_t i = 0; i < n_; i++) of_scale_ += times(g_[i], u_[i]), of_shift_ += g_[i];
    add_positives();
    results.put(scalar<T>(value_ + form_.constant));
    results.put(std::move(of_x_)), results.put(std::move(of_y_));
    results.put(scalar<T>(of_scale_)), results.put(scalar<T>(of_shift_));
  }

 private:
  // Rows of unit length where they are wanted, or the rows; with others below them in one matrix.
  Tensor paired(const Tensor& rows, const Tensor* below) const {
    if (!form_.normalize && below == nullptr) return rows.again();
    Tensor out = empty({rows.size(0) + (below ? below->size(0) : 0), d_}, kind_of<T>);
    T* o = out.mutable_data_as<T>();
    for (const Tensor* t : {&rows, below}) {
      if (t == nullptr) continue;
      const Matrix<T> from(*t);
      for_each_row(t->size(0), d_, [&](int64_t i) {
        if (form_.normalize) unit_row(from[i], o + i * d_, d_);
        else std::copy_n(from[i], d_, o + i * d_);
      });
      o += t->size(0) * d_;
    }
    return out;
  }
  const T* x_row(int64_t i) const { return xs_[i]; }
  const T* y_row(int64_t i) const { return ys_[stacked_ ? n_ + i : i]; }
  double distance(const T* x, const T* y) const {
    return sum_over(d_, [=](int64_t k) { return (double(x[k]) - double(y[k])) * (double(x[k]) - double(y[k])); });
  }

  // z_ii; those of stacked rows for either view
  Tensor of_positives() const {
    const int64_t views = stacked_ && contrast_ ? 2 : 1;
    Tensor z = empty({views * n_}, kind_of<T>);
    T* out = z.mutable_data_as<T>();
    for (int64_t i = 0; i < views * n_; i++) out[i] = T(T(u_[i % n_] * scale_) + shift_);
    return z;
  }

  // sum_i w' h(p' z_ii + q') + l z_ii: pairs of n rows without columns and one other, z being their bias.
  double positives(Tensor z) {
    const Term& term = form_.positives;
    const T* given = z.data_as<T>();
    double sum = 0;
    for (int64_t i = 0; i < n_; i++) sum += times(form_.linear, given[i]), g_[i] = form_.linear;
    if (term.weight() == 0) return sum;
    Tensor bias = empty({n_}, kind_of<T>);
    for (int64_t i = 0; i < n_; i++) bias.mutable_data_as<T>()[i] = T(term.slope() * double(given[i]));
    Given pairs(empty({n_, 0}, kind_of<T>), empty({1, 0}, kind_of<T>), scalar<T>(0), scalar<T>(term.offset()));
    pairs.bias_x = std::move(bias), pairs.pair = term.pair, pairs.constants = term.constants();
    const std::array<bool, 6> of{false, false, false, false, wanted_.any(), false};
    Eight found = total_of(pairs, {}, "sum", Wanted(of));
    if (wanted_.any())
      for (int64_t i = 0; i < n_; i++) g_[i] += term.weight() * term.slope() * double(found[5].data_as<T>()[i]);
    return sum + term.weight() * double(*found[0].data_as<T>());
  }

  void negatives(bool of_both, OptionalTensor positive) {
    const bool itself = form_.sides != "xy";
    total(x_, itself ? OptionalTensor() : y_.again(), itself ? wanted_.x || (stacked_ && wanted_.y) : wanted_.x, std::move(positive));
    if (of_both) total(y_, {}, wanted_.y, {});
  }

  void total(const Tensor& x, OptionalTensor y, bool of_rows, OptionalTensor positive) {
    const Term& term = form_.negatives;
    const bool as_given = term.slope() == 1 && term.offset() == 0, of_x = &x == &x_, of_others = y && wanted_.y;
    Given pairs(x.again(), std::move(y), as_given ? form_.scale.again() : scalar<T>(term.slope() * scale_),
                as_given ? form_.shift.again() : scalar<T>(term.slope() * shift_ + term.offset()));
    pairs.mask = "off_diagonal", pairs.period = stacked_ ? n_ : 0;
    pairs.operand = form_.operand, pairs.reduce = form_.reduce, pairs.columns = form_.columns;
    pairs.pair = term.pair, pairs.constants = term.constants();
    const std::array<bool, 6> of{of_rows, of_others, wanted_.scale, wanted_.shift, false, false};
    Eight found = total_of(pairs, positive, form_.outer, Wanted(of));
    value_ += term.weight() * double(*found[0].data_as<T>());
    if (wanted_.scale) of_scale_ += term.weight() * term.slope() * double(*found[3].data_as<T>());
    if (wanted_.shift) of_shift_ += term.weight() * term.slope() * double(*found[4].data_as<T>());
    if (of_rows) (of_x ? of_x_ : of_y_) = std::move(found[1]);
    if (of_others) of_y_ = std::move(found[2]);
    if (!positive || !wanted_.any()) return;
    const T* of_positive = found[7].data_as<T>();
    for (int64_t i = 0; i < found[7].size(0); i++) g_[i % n_] += term.weight() * double(of_positive[i]);
  }

  // The gradients of rows, from those of the pairs for a weight of 1, and of the positives.
  void add_positives() {
    const double weight = form_.negatives.weight();
    if (wanted_.y && of_y_.dim() < 2 && !stacked_) of_y_ = zeros({m_, d_}, kind_of<T>);
    auto add = [&](Tensor& to, int64_t from, int64_t count, auto own, auto other) {
      T* all = to.mutable_data_as<T>() + from * d_;
      for_each_row(count, d_, [&](int64_t i) {
        T* row = all + i * d_;
        if (i >= n_) {
          for (int64_t k = 0; k < d_; k++) row[k] = T(weight * double(row[k]));
          return;
        }
        const T *a = own(i), *b = other(i);
        const double g = times(g_[i], scale_) * (squared_ ? 2 : 1);
        if (squared_) for (int64_t k = 0; k < d_; k++) row[k] = T(weight * double(row[k]) + g * (double(a[k]) - double(b[k])));
        else for (int64_t k = 0; k < d_; k++) row[k] = T(weight * double(row[k]) + g * double(b[k]));
      });
    };
    auto x_row = [&](int64_t i) { return this->x_row(i); };
    auto y_row = [&](int64_t i) { return this->y_row(i); };
    if (wanted_.x) add(of_x_, 0, n_, x_row, y_row);
    if (wanted_.y) add(stacked_ ? of_x_ : of_y_, stacked_ ? n_ : 0, m_, y_row, x_row);
  }
};

void aligned_loss(StableIValue* arguments, uint64_t, uint64_t) {
  Stack stack(arguments), results = stack;
  const Form form(stack);
  AlignedLoss(form, Wanted(stack.six_booleans())).run(results);
}

// The gradients of rows as they were given, for an upstream gradient; of x alone both, where they were stacked.
void aligned_loss_backward(StableIValue* arguments, uint64_t, uint64_t) {
  Stack stack(arguments), results = stack;
  const Tensor upstream = stack.tensor();
  const OptionalTensor x = stack.optional_tensor(), y = stack.optional_tensor();
  const Tensor of_x = stack.tensor(), of_y = stack.tensor();
  const bool normalize = stack.boolean();
  FASTCL_CHECK_TYPE(upstream.count() == 1 && upstream.kind() == kind_of<T>, "upstream: expected one number of float32, got ", upstream.describe());
  const double g = *upstream.data_as<T>();
  auto gradient = [&](const OptionalTensor& rows, const Tensor& of_unit, int64_t from) {
    if (!rows) return empty({0}, kind_of<T>);
    const int64_t n = rows->size(0), d = rows->size(1);
    FASTCL_CHECK_VALUE(of_unit.dim() == 2 && of_unit.size(0) >= from + n && of_unit.size(1) == d && of_unit.kind() == kind_of<T> && rows->kind() == kind_of<T>,
                       "gradient: expected one of float32 for each row, got ", of_unit.describe());
    const Matrix<T> gs(of_unit), xs(*rows);
    Tensor out = empty({n, d}, kind_of<T>);
    T* o = out.mutable_data_as<T>();
    for_each_row(n, d, [&](int64_t i) {
      if (normalize) return tangent(gs[from + i], xs[i], o + i * d, d, g);
      for (int64_t k = 0; k < d; k++) o[i * d + k] = T(g * double(gs[from + i][k]));
    });
    return out;
  };
  const bool stacked = of_y.dim() < 2 && of_x.dim() == 2 && y;
  results.put(gradient(x, of_x, 0));
  results.put(gradient(y, stacked ? of_x : of_y, stacked ? of_x.size(0) - y->size(0) : 0));
}

const Registration registration("fastcl", "CPU", {{"cpu_aligned_loss", aligned_loss}, {"cpu_aligned_loss_backward", aligned_loss_backward}});

}  // namespace
}  // namespace fastcl::cpu
