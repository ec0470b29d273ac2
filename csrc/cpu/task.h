// What a CPU kernel is told, and the kernels themselves. No torch header, and no code: every instruction set's
// objects include this file, and an inline function of one could be linked into another.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../pair_reduce.h"

namespace fastcl::cpu {

// Constants that a pair function may have: those of fastcl 2, others as many.
inline constexpr int most_constants = 8;

// Vectors that belong to a side are readable this many elements beyond its last row.
inline constexpr int64_t slack = 64;

// One of the two sides, x or y: its rows, what each row brings to z, and where its results go.
template <class T>
struct Side {
  const T* rows = nullptr;  // (count, d), row_stride apart, each row contiguous
  int64_t row_stride = 0;
  const T* weighed = nullptr;  // the same as gradients weigh them: 0 where a weight of 0 would meet NaN
  int64_t weighed_stride = 0;
  int64_t count = 0;
  int parts = 3;                   // bfloat16 numbers whose sum each element is, exactly
  const T* term = nullptr;         // (count,) added to z: b + bx for x, by for y
  const T* norm = nullptr;         // (count,) |row|^2, for sqdist
  const int32_t* beyond = nullptr;  // (count + 1,) how many rows before each one AMX cannot hold (range.h)
  const int64_t* group = nullptr;  // (count,) for the masks by groups
  const T* limit = nullptr;        // (count,) what z, in its unit, or the guides' product may be at most; where the task is limited
  const T* weight = nullptr;       // (count,) g or h; for logsumexp the factor of exp2(z - reference)
  const T* reference = nullptr;    // (count,) for weights in split form

  double* value = nullptr;       // (count,) sum of f(z), or of exp2(z - reference); added to
  T* maximum = nullptr;          // (count,) with push_maxima: value is relative to it; starts at lowest
  double* weight_sum = nullptr;  // (count,) W 1; added to
  T* product = nullptr;          // (count, d) W Y; added to; null: not wanted
};

// One pairwise reduction. For a log-sum-exp, scale and terms are in units of `unit` log 2, so that exp2 serves.
template <class T>
struct Task {
  Side<T> x, y;  // x with itself: y is a copy of x, and only the pairs of one triangle of tiles are visited
  bool self = false;
  int64_t d = 0;
  Operand operand = Operand::dot;
  MaskKind mask = MaskKind::all;
  int64_t row_offset = 0, col_offset = 0;
  int64_t period = 0;  // off_diagonal leaves out the diagonal at their difference, and those a period from there
  bool limited = false;  // pairs whose z is above either side's limit are left out
  const Task* guide = nullptr;  // limits are on its product in place of z: of this task its sides' rows and d are read, and self
  Reduction reduce = Reduction::sum;
  int pair = 0;  // index into pair_entries, for Reduction::sum
  const void* own_pair = nullptr;  // in its place: the epilogues of one that was added at run time (own_pair.h)
  T constants[most_constants] = {};
  T scale = 1;
  T unit = 1;       // above 1 only where steps are push_maxima and weigh_split
  T reference = 0;  // the integer M of the shared form: e_ij = exp2(z_ij - M)
};

// What happens to each pair's z.
enum class Step {
  push,         // value += f(z), f = exp2(z - M) for logsumexp
  push_maxima,  // logsumexp with running maxima: right for any z
  weigh,        // w = f'(z) (g_i + h_j)
  weigh_split,  // w = g_i exp2(z - reference_i) + h_j exp2(z - reference_j)
  both          // push, and w = f'(z)
};
inline constexpr int step_count = 5;

// Threads and memory, lent by the caller.
struct Host {
  void* self;
  int threads;
  void (*parallel)(void* self, int tasks, void (*body)(void* argument, int task), void* argument);
  void* (*allocate)(void* self, size_t bytes);  // 64-byte aligned; freed when the call has ended
  const volatile int* stop = nullptr;  // not 0: nobody waits for what is computed, and `parallel` throws once its tasks have ended

  bool stopped() const { return stop && *stop; }
};

// Row weights of a strip, told once its rows' values are complete: rho_i = d total / d value_i.
// False stops the sweep (a value is too small to be exact; the caller starts again with running maxima).
// Where columns count too: sigma_j = d total / d (y's value j), for a task of at most rows_kept rows whose y has values.
struct RowWeights {
  void* self;
  bool (*of)(void* self, int64_t begin, int64_t end, const double* values, double* rho);
  bool (*of_columns)(void* self, const double* values, double* sigma) = nullptr;
};
// 1 MB of exponentials at most, for one product of four less: CLIP of 512 x 128 takes 0.78 of the time (AVX2, one thread).
inline constexpr int64_t rows_kept = 512;

// The kernels of one instruction set.
template <class T>
struct Kernels {
  // One sweep over all pairs. It adds to what the sides point to.
  void (*sweep)(const Task<T>&, Step, const Host&);
  // value and gradients with one exponential for each pair, where y's gradient needs the rows' values: a strip
  // of rows keeps its exponentials until they are known. Not for x with itself.
  bool (*strip)(const Task<T>&, const RowWeights&, const Host&);
  void (*squared_norms)(const Side<T>&, int64_t d, T* norms, const Host&);
  double (*fma_flops)(int64_t rounds);  // runs that many rounds in registers, and returns their flops
  void (*rows_beyond)(const Side<T>&, int64_t d, int32_t* beyond, const Host&);  // null: any row can be held
};

}  // namespace fastcl::cpu
