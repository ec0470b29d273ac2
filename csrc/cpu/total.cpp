// The total forms: value and gradients from one op call, the upstream gradient being one scalar.
//
//     sum        sum_i r_i                       a sum: one sweep for both
//     pooled     logsumexp of all pairs          one sweep for both: every weight is exp(z) over one number
//     contrast   sum_i softplus(r_i - p_i)       the strip: one exponential for each pair; x with itself: two sweeps
//                                                over a triangle, which is less
//                with columns, half of this and half of the same of c: two sweeps, rows and columns in each
#include "reduce.h"

#include <algorithm>

namespace fastcl::cpu {
namespace {

double softplus(double z) { return z > 0 ? z + std::log1p(std::exp(-z)) : std::log1p(std::exp(z)); }
double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

// The outer function of a row's log-sum-exp, gathered row by row.
template <class T>
struct OuterForm {
  Outer outer;
  const T* positive;
  T* dpositive;
  double value = 0;

  // Adds the row (or column) to the value; returns its g_i.
  double add(int64_t i, double r, double share = 1) {
    if (outer == Outer::sum) return value += r, 1.0;
    const double z = r - double(positive[i]);
    const double g = share * sigmoid(z);
    value += share * softplus(z);
    dpositive[i] -= T(g);
    return g;
  }
};

template <class T>
class Total {
  Prepared<T> p_;
  const Wanted wanted_;
  const bool columns_;
  OuterForm<T> form_;
  Tensor dpositive_;

 public:
  Total(const Given& a, const OptionalTensor& positive, std::string_view outer, const Wanted& wanted)
      : p_(a), wanted_(wanted), columns_(a.columns), form_{outer_of(outer, p_.task.reduce, positive.has_value()), nullptr, nullptr},
        dpositive_(zeros({positive ? p_.task.x.count : 0}, kind_of<T>)) {
    FASTCL_CHECK_VALUE(!columns_ || (form_.outer == Outer::contrast && p_.task.x.count == p_.task.y.count),
                       "columns: expected outer='contrast' and as many rows as columns");
    if (!positive) return;
    form_.positive = vector_of<T>("positive", *positive, p_.task.x.count, a, p_.memory);
    form_.dpositive = dpositive_.template mutable_data_as<T>();
  }

  Eight run() {
    const bool sum = p_.task.reduce == Reduction::sum;
    if (!wanted_.any()) return without_gradients();
    if (sum) return of_a_sum();
    if (form_.outer == Outer::pooled) return pooled();
    return by_rows();
  }

 private:
  void want_gradients() { p_.want_gradients(wanted_, needs_weight_sums(wanted_, p_.task.operand)); }

  Eight results(double value, double factor) {
    Six g = finish(p_, wanted_, factor, kind_of<T>);
    return {scalar<T>(value),   std::move(g[0]), std::move(g[1]), std::move(g[2]),
            std::move(g[3]),    std::move(g[4]), std::move(g[5]), std::move(dpositive_)};
  }

  double sum_of_values() const {
    double sum = 0;
    for (int64_t i = 0; i < p_.task.x.count; i++) sum += p_.task.x.value[i];
    return sum;
  }

  // The log-sum-exp of all rows, to base 2, after reduce_all.
  double log2_of_all() const {
    double highest = -INFINITY, sum = 0;
    for (int64_t i = 0; i < p_.task.x.count; i++) highest = std::fmax(highest, log2_of(p_, p_.task.x, i));
    if (highest == -INFINITY || highest == INFINITY) {
      for (int64_t i = 0; i < p_.task.x.count; i++) sum += std::isnan(p_.task.x.value[i]) ? NAN : 0;
      return highest + sum;
    }
    for (int64_t i = 0; i < p_.task.x.count; i++) sum += std::exp2(log2_of(p_, p_.task.x, i) - highest);
    return highest + std::log2(sum);
  }

  Eight without_gradients() {
    reduce_all(p_, columns_);
    if (form_.outer == Outer::pooled) return results(ln_2 * log2_of_all(), 1);
    add(p_.task.x);
    if (columns_) add(p_.task.y);
    return results(form_.value, 1);
  }

  // In x with itself both orders of a pair count: w_ij = f'(z_ij) (1 + 1).
  double both_orders() const { return p_.task.self ? 2 : 1; }

  Eight of_a_sum() {
    p_.want_values(p_.task.self);
    want_gradients();
    p_.sweep(Step::both);
    return results(sum_of_values(), both_orders());
  }

  Eight pooled() {
    if (p_.share(true)) {
      p_.want_values(p_.task.self);
      want_gradients();
      p_.sweep(Step::both);
      const double sum = sum_of_values();
      const double terms = double(p_.task.x.count) * double(p_.task.y.count);
      if (sum >= Prepared<T>::least_sum(true, terms) && sum > 0) return results(ln_2 * (p_.task.reference + std::log2(sum)), both_orders() / sum);
    }
    // g_i = exp(r_i - total), so that g_i exp(z_ij - r_i) = exp(z_ij - total).
    drop_gradients();
    reduce_all(p_, false, false);
    const double total = log2_of_all();
    std::vector<double> g(p_.task.x.count);
    for (int64_t i = 0; i < p_.task.x.count; i++) g[i] = total == -INFINITY ? 0 : std::exp2(log2_of(p_, p_.task.x, i) - total);
    return gradients_by_rows(g, ln_2 * total);
  }

  // contrast, or the sum of log-sum-exps
  Eight by_rows() {
    if (in_one_sweep() && p_.share(true)) {
      if (columns_) p_.want_values(true);
      want_gradients();
      RowWeights weights{this, [](void* self, int64_t begin, int64_t end, const double* values, double* rho) {
                           return static_cast<Total*>(self)->row_weights(begin, end, values, rho);
                         }};
      if (columns_)
        weights.of_columns = [](void* self, const double* values, double* sigma) {
          auto* total = static_cast<Total*>(self);
          return total->row_weights(0, total->p_.task.y.count, values, sigma);
        };
      if (p_.strip(weights)) return results(form_.value, 1);
      form_.value = 0;
      std::fill_n(form_.dpositive, form_.dpositive ? p_.task.x.count : 0, T(0));
      drop_gradients();
    }
    reduce_all(p_, columns_);
    const std::vector<double> g = add(p_.task.x), h = columns_ ? add(p_.task.y) : std::vector<double>();
    return gradients_by_rows(g, form_.value, h);
  }

  // The side's rows, after reduce_all; their g.
  std::vector<double> add(const Side<T>& side) {
    std::vector<double> g(side.count);
    for (int64_t i = 0; i < side.count; i++) g[i] = form_.add(i, reduced(p_, side, i), columns_ ? 0.5 : 1);
    return g;
  }

  // Few rows with columns keep their exponentials, which a second sweep would form again.
  bool in_one_sweep() const {
    if (p_.task.self || p_.task.x.count == 0 || p_.task.y.count == 0) return false;
    return !columns_ || (p_.task.x.count <= rows_kept && !needs_weight_sums(wanted_, p_.task.operand));
  }

  // Of rows, or of as many columns.
  bool row_weights(int64_t begin, int64_t end, const double* values, double* rho) {
    const double smallest = Prepared<T>::least_sum(true, double(p_.task.y.count));
    for (int64_t i = begin; i < end; i++) {
      const double value = values[i - begin];
      if (!(value >= smallest)) return false;
      const double g = form_.add(i, ln_2 * (p_.task.reference + std::log2(value)), columns_ ? 0.5 : 1);
      rho[i - begin] = g / value;
      if (columns_ && g != 0 && !(g >= Range<T>::least_kept && rho[i - begin] >= Range<T>::least_kept_factor)) return false;
    }
    return true;
  }

  Eight gradients_by_rows(const std::vector<double>& g, double value, const std::vector<double>& h = {}) {
    const Normalisers of_y = h.empty() ? Normalisers() : normalisers_of(p_, p_.task.y);
    const Step step = set_weights(p_, normalisers_of(p_, p_.task.x), g.data(), of_y, h.data());
    p_.forget_values();
    want_gradients();
    p_.sweep(step);
    return results(value, 1);
  }

  void drop_gradients() {
    for (Side<T>* side : {&p_.task.x, &p_.task.y}) side->product = nullptr, side->weight_sum = nullptr;
    p_.x_product.reset(), p_.y_product.reset();
  }
};

}  // namespace

Eight total_of(const Given& a, const OptionalTensor& positive, std::string_view outer, const Wanted& wanted) {
  a.check(wanted);
  return a.in_double() ? Total<double>(a, positive, outer, wanted).run() : Total<float>(a, positive, outer, wanted).run();
}

void kernel_total(Stack stack) {
  Stack results = stack;
  const Given a(stack);
  const OptionalTensor positive = stack.optional_tensor();
  const std::string outer = stack.text();
  const Wanted wanted(stack.six_booleans());
  for (Tensor& t : total_of(a, positive, outer, wanted)) results.put(std::move(t));
}

}  // namespace fastcl::cpu
