// What happens to the u of one register tile: z, the mask, and then the reduction, the weights, or both.
//
//     z_ij = a u_ij + (b + bx_i) + by_j
#pragma once

#include "microkernel.h"
#include "simd_math.h"
#include "task.h"

namespace fastcl::cpu::FASTCL_ISA {

// One register tile at rows i.. and columns j..: what its epilogue reads and writes.
template <class T>
struct Pane {
  const T* u;
  typename Bits<T>::type* keep;  // all ones where the mask has the pair, all zeros elsewhere

  const T *row_term, *row_weight, *row_reference;
  const T *col_term, *col_weight, *col_reference;

  // Sums over columns stay spread over the lanes of one vector for each row; sums over rows need no spreading.
  Simd<T> *row_value, *row_maximum, *row_weight_sum;
  T *col_value, *col_maximum, *col_weight_sum;
  T* w;
};

// f and f' of one register. For a log-sum-exp both are the exponential against the shared reference.
template <class T, class P>
struct Function {
  Simd<T> k[most_constants];
  FASTCL_INLINE explicit Function(const Task<T>& task) {
    FASTCL_UNROLL for (int i = 0; i < most_constants; i++) k[i] = Simd<T>(task.constants[i]);
  }
  FASTCL_INLINE Simd<T> value(Simd<T> z) const { return P::value(z, k); }
  FASTCL_INLINE Simd<T> slope(Simd<T> z) const { return P::slope(z, k); }
};
template <class T>
struct SharedExponential {
  Simd<T> M;
  FASTCL_INLINE explicit SharedExponential(const Task<T>& task) : M(task.reference) {}
  FASTCL_INLINE Simd<T> value(Simd<T> z) const { return exp2_below(z, M); }
  FASTCL_INLINE Simd<T> slope(Simd<T> z) const { return exp2_below(z, M); }
};

template <class T>
FASTCL_INLINE Simd<T> z_of(const Pane<T>& p, Simd<T> scale, int r, int v) {
  using G = Geometry<T>;
  const Simd<T> u = Simd<T>::load(p.u + r * G::cols + v * G::lanes);
  return (u * scale + Simd<T>(p.row_term[r])) + Simd<T>::load(p.col_term + v * G::lanes);
}

template <bool masked, class T>
FASTCL_INLINE Simd<T> visited(const Pane<T>& p, Simd<T> value, int r, int v) {
  using G = Geometry<T>;
  if constexpr (masked) return kept(value, p.keep + r * G::cols + v * G::lanes);
  else return value;
}

// Leaves out the pairs whose z, or whose product of guides where there are any, is above either limit; no NaN is. A pass of its own
// over the pane: no epilogue pays for it without limits, and every step, forward and backward, decides by the same instructions.
template <class T>
void leave_out_above(const Pane<T>& pane, const T* row_limit, const T* col_limit, Simd<T> scale, const T* guided) {
  const Pane<T> p = pane;
  using G = Geometry<T>;
  for (int r = 0; r < G::pane_rows; r++)
    FASTCL_UNROLL for (int v = 0; v < G::vectors; v++) {
      const Simd<T> limit = smaller(Simd<T>(row_limit[r]), Simd<T>::load(col_limit + v * G::lanes));
      auto* keep = reinterpret_cast<typename Simd<T>::LooseInt*>(p.keep + r * G::cols + v * G::lanes);
      const Simd<T> decides = guided ? Simd<T>::load(guided + r * G::cols + v * G::lanes) : z_of(p, scale, r, v);
      *keep &= ~typename Simd<T>::RawInt(decides.v > limit.v);
    }
}

// A weight as rows are multiplied by it, which are 0 where they are NaN (prepare.cpp): of a z of NaN NaN, whatever the slope is.
template <bool masked, class T>
FASTCL_INLINE Simd<T> marked(Simd<T> w, Simd<T> z) {
  if constexpr (masked) return Simd<T>(z.v != z.v && w.v != typename Simd<T>::Raw{} ? z.v : w.v);
  else return w;
}

// A running sum over the rows of the pane, for each of its columns; nothing where it is not wanted.
template <class T, bool wanted = true>
struct ColumnSums {
  using G = Geometry<T>;
  Simd<T> sum[G::vectors];
  FASTCL_INLINE explicit ColumnSums(const T* from) {
    if constexpr (wanted) FASTCL_UNROLL for (int v = 0; v < G::vectors; v++) sum[v] = Simd<T>::load(from + v * G::lanes);
  }
  FASTCL_INLINE void store(T* to) const {
    if constexpr (wanted) FASTCL_UNROLL for (int v = 0; v < G::vectors; v++) sum[v].store(to + v * G::lanes);
  }
};

// The steps of one exponential or one f for each pair: its value, its weight (with g_i + h_j where the step is weigh alone), or both.
template <class T, class F, Step step, bool masked>
void visit(const Pane<T>& pane, const Task<T>& task) {
  constexpr bool values = step != Step::weigh, weights = step != Step::push;
  const Pane<T> p = pane;  // its own copy: what is stored to w might else have changed the pointers
  using G = Geometry<T>;
  const F f(task);
  const Simd<T> scale = task.scale;
  ColumnSums<T, values> col_values(p.col_value);
  ColumnSums<T, weights> col_weights(p.col_weight_sum);
  for (int r = 0; r < G::pane_rows; r++) {
    Simd<T> row_value, row_weight;
    if constexpr (values) row_value = p.row_value[r];
    if constexpr (weights) row_weight = p.row_weight_sum[r];
    FASTCL_UNROLL for (int v = 0; v < G::vectors; v++) {
      const Simd<T> z = z_of(p, scale, r, v);
      if constexpr (values) {
        const Simd<T> value = visited<masked>(p, f.value(z), r, v);
        row_value += value;
        col_values.sum[v] += value;
      }
      if constexpr (weights) {
        Simd<T> w = f.slope(z);
        if constexpr (step == Step::weigh) w = w * (Simd<T>(p.row_weight[r]) + Simd<T>::load(p.col_weight + v * G::lanes));
        w = visited<masked>(p, w, r, v);
        marked<masked>(w, z).store(p.w + r * G::w_stride + v * G::lanes);
        row_weight += w;
        col_weights.sum[v] += w;
      }
    }
    if constexpr (values) p.row_value[r] = row_value;
    if constexpr (weights) p.row_weight_sum[r] = row_weight;
  }
  col_values.store(p.col_value);
  col_weights.store(p.col_weight_sum);
}

// The running maximum and the sum of exponentials against it, after N more values.
template <int N, class T>
FASTCL_INLINE void push_against_maximum(Simd<T>& maximum, Simd<T>& sum, const Simd<T> (&z)[N], Simd<T> unit) {
  Simd<T> next = maximum;
  FASTCL_UNROLL for (int i = 0; i < N; i++) next = larger(next, z[i]);
  sum = sum * exp2_of_difference(maximum, next, unit);
  FASTCL_UNROLL for (int i = 0; i < N; i++) sum += exp2_of_difference(z[i], next, unit);
  maximum = next;
}

// Two exponentials for each pair instead of one, and right whatever z is.
template <class T, bool masked>
void push_maxima(const Pane<T>& pane, const Task<T>& task) {
  const Pane<T> p = pane;  // its own copy: what is stored to w might else have changed the pointers
  using G = Geometry<T>;
  const Simd<T> scale = task.scale, unit = task.unit, nothing = -Constants<T>::infinity, largest = -Constants<T>::lowest;
  Simd<T> z[G::pane_rows][G::vectors];
  FASTCL_UNROLL for (int r = 0; r < G::pane_rows; r++) FASTCL_UNROLL for (int v = 0; v < G::vectors; v++) {
    // An infinite maximum would make inf - inf of it; the largest finite number stands for it until the end.
    z[r][v] = smaller(largest, z_of(p, scale, r, v));
    if constexpr (masked) {
      const auto* keep = p.keep + r * G::cols + v * G::lanes;
      z[r][v] = Simd<T>(*reinterpret_cast<const typename Simd<T>::LooseInt*>(keep) ? z[r][v].v : nothing.v);
    }
  }
  for (int r = 0; r < G::pane_rows; r++) push_against_maximum(p.row_maximum[r], p.row_value[r], z[r], unit);
  FASTCL_UNROLL for (int v = 0; v < G::vectors; v++) {
    Simd<T> column[G::pane_rows];
    FASTCL_UNROLL for (int r = 0; r < G::pane_rows; r++) column[r] = z[r][v];
    Simd<T> maximum = Simd<T>::load(p.col_maximum + v * G::lanes), sum = Simd<T>::load(p.col_value + v * G::lanes);
    push_against_maximum(maximum, sum, column, unit);
    maximum.store(p.col_maximum + v * G::lanes);
    sum.store(p.col_value + v * G::lanes);
  }
}

template <class T, bool masked>
void weigh_split(const Pane<T>& pane, const Task<T>& task) {
  const Pane<T> p = pane;  // its own copy: what is stored to w might else have changed the pointers
  using G = Geometry<T>;
  const Simd<T> scale = task.scale, unit = task.unit, largest = -Constants<T>::lowest;
  ColumnSums<T> cols(p.col_weight_sum);
  for (int r = 0; r < G::pane_rows; r++) {
    Simd<T> row = p.row_weight_sum[r];
    FASTCL_UNROLL for (int v = 0; v < G::vectors; v++) {
      const Simd<T> z = smaller(largest, z_of(p, scale, r, v)), h = Simd<T>::load(p.col_weight + v * G::lanes);
      const Simd<T> e = exp2_of_difference(z, Simd<T>(p.row_reference[r]), unit);
      const Simd<T> k = exp2_of_difference(z, Simd<T>::load(p.col_reference + v * G::lanes), unit);
      const Simd<T> w = visited<masked>(p, e * Simd<T>(p.row_weight[r]) + k * h, r, v);
      w.store(p.w + r * G::w_stride + v * G::lanes);
      row += w;
      cols.sum[v] += w;
    }
    p.row_weight_sum[r] = row;
  }
  cols.store(p.col_weight_sum);
}

// An epilogue with and without the mask: most register tiles need none.
template <class T>
struct Epilogue {
  void (*plain)(const Pane<T>&, const Task<T>&);
  void (*masked)(const Pane<T>&, const Task<T>&);
};

template <class T, class F, Step step>
inline constexpr Epilogue<T> visiting = {visit<T, F, step, false>, visit<T, F, step, true>};

// Of a pair function: what its sum takes of the steps, in this order.
#define FASTCL_EPILOGUES(T, P) \
  visiting<T, Function<T, P>, Step::push>, visiting<T, Function<T, P>, Step::weigh>, visiting<T, Function<T, P>, Step::both>

template <class T>
Epilogue<T> epilogue_of(const Task<T>& task, Step step) {
  if (task.reduce == Reduction::logsumexp) {
    using F = SharedExponential<T>;
    switch (step) {
      case Step::push: return visiting<T, F, Step::push>;
      case Step::push_maxima: return {push_maxima<T, false>, push_maxima<T, true>};
      case Step::weigh: return visiting<T, F, Step::weigh>;
      case Step::weigh_split: return {weigh_split<T, false>, weigh_split<T, true>};
      case Step::both: return visiting<T, F, Step::both>;
    }
  }
  const int place = step == Step::push ? 0 : step == Step::weigh ? 1 : 2;
  if (task.own_pair) return static_cast<const Epilogue<T>*>(task.own_pair)[place];
#define FASTCL_ROW(name, P, constants) {FASTCL_EPILOGUES(T, P)},
  static constexpr Epilogue<T> table[pair_count][3] = {FASTCL_FOR_EACH_PAIR(FASTCL_ROW)};
#undef FASTCL_ROW
  return table[task.pair][place];
}

}  // namespace fastcl::cpu::FASTCL_ISA
