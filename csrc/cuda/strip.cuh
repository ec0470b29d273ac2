// What the strip's kernels share: a block of 64 x 128 elements of a tile, z on it, M, and reductions over its rows and columns.
//
// A block has eight warps of eight rows each. A lane holds four neighbouring columns of its warp's rows, so that a warp reads
// and writes 512 bytes of a row of float32 at once, and no two threads touch one element.
#pragma once

#include "../operands.h"
#include "launch.h"
#include "special.cuh"

namespace fastcl::cuda {

inline constexpr int warps = 8, warp_rows = 8, lane_cols = 4, threads = 32 * warps;
static_assert(warps * warp_rows == strip_block_rows && 32 * lane_cols == strip_block_cols);

template <class T>
struct Limits;
template <>
struct Limits<float> {
  // A row or column whose terms all lie this far under the block's maximum has lost digits to underflow.
  static constexpr float faint = 0x1p-100f;
};
template <>
struct Limits<double> {
  static constexpr double faint = 0x1p-900;
};

template <class T>
__device__ __forceinline__ T infinity() {
  return T(INFINITY);
}

// e^t. For float one multiplication and ex2: off by |t| 2^-24 of itself, and the terms of a sum of exponentials that count
// have a small t.
__device__ __forceinline__ float exponential(float t) { return ex2(t * log2_e); }
__device__ __forceinline__ double exponential(double t) { return ::exp(t); }

// The maximum of what is no NaN; NaN returns through the sum of exponentials.
__device__ __forceinline__ float highest(float a, float b) { return ::fmaxf(a, b); }
__device__ __forceinline__ double highest(double a, double b) { return ::fmax(a, b); }

// f and f': for float by the special function units.
template <class Pair>
__device__ __forceinline__ float value_of(float z, const float* k) {
  const Fast constants[2] = {Fast::of(k[0]), Fast::of(k[1])};
  return Pair::value(Fast::of(z), constants).v;
}
template <class Pair>
__device__ __forceinline__ float slope_of(float z, const float* k) {
  const Fast constants[2] = {Fast::of(k[0]), Fast::of(k[1])};
  return Pair::slope(Fast::of(z), constants).v;
}
template <class Pair>
__device__ __forceinline__ double value_of(double z, const double* k) {
  return Pair::value(z, k);
}
template <class Pair>
__device__ __forceinline__ double slope_of(double z, const double* k) {
  return Pair::slope(z, k);
}

// A normaliser as weights take it off: +inf where nothing was reduced, so that z less it is -inf, and the weight exactly 0.
template <class T>
__device__ __forceinline__ T normaliser(T log) {
  return log == -infinity<T>() ? infinity<T>() : log;
}

// A reference for exponentials: the maximum, or 0 where it is infinite, since inf - inf is NaN.
template <class T>
__device__ __forceinline__ T reference_of(T top) {
  return ::isinf(top) ? T(0) : top;
}

struct Sum {
  template <class T>
  __device__ __forceinline__ static T of(T a, T b) { return a + b; }
};
struct Maximum {
  template <class T>
  __device__ __forceinline__ static T of(T a, T b) { return highest(a, b); }
};

template <class Op, class T>
__device__ __forceinline__ T over_warp(T v) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) v = Op::of(v, __shfl_xor_sync(0xffffffffu, v, other));
  return v;
}

// Each of the warp's eight rows reduced over the lanes, that of row lane / 4 in this lane: nine shuffles where forty would
// reduce one row after the other.
template <class Op, class T>
__device__ __forceinline__ T over_lanes(T (&row)[warp_rows], int lane) {
#pragma unroll
  for (int half = warp_rows / 2, other = 16; half > 0; half /= 2, other /= 2) {
    const bool upper = lane & other;
#pragma unroll
    for (int r = 0; r < half; r++) {
      const T given = __shfl_xor_sync(0xffffffffu, upper ? row[r] : row[r + half], other);
      row[r] = Op::of(upper ? row[r + half] : row[r], given);
    }
  }
  T v = Op::of(row[0], __shfl_xor_sync(0xffffffffu, row[0], 2));
  return Op::of(v, __shfl_xor_sync(0xffffffffu, v, 1));
}

// Four neighbours as vectors of 16 bytes: one wavefront for each 128 bytes of a warp.
__device__ __forceinline__ void store_vectors(float* to, const float (&v)[lane_cols]) { *reinterpret_cast<float4*>(to) = {v[0], v[1], v[2], v[3]}; }
__device__ __forceinline__ void store_vectors(double* to, const double (&v)[lane_cols]) {
  reinterpret_cast<double2*>(to)[0] = {v[0], v[1]}, reinterpret_cast<double2*>(to)[1] = {v[2], v[3]};
}

// How many of a thread's rows are unrolled where f is evaluated: float64 is there to be right, not fast, and its
// exponentials and powers are long.
template <class T>
inline constexpr int unrolled_rows = sizeof(T) == 8 ? 1 : warp_rows;

// The sums of the warp's eight rows, given one row after the other.
template <class T>
struct RowSums {
  T row[warp_rows] = {};
  __device__ __forceinline__ void set(int r, T v, int) { row[r] = v; }
  __device__ __forceinline__ T of_lane(int lane) { return over_lanes<Sum>(row, lane); }
};
// One reduced after the other, by loops that are not unrolled.
template <class T>
struct RowSumsInTurn {
  T own = T(0);
  __device__ __forceinline__ void set(int r, T v, int lane) {
    v = over_warp<Sum>(v);
    if (lane / 4 == r) own = v;
  }
  __device__ __forceinline__ T of_lane(int) { return own; }
};
template <>
struct RowSums<double> : RowSumsInTurn<double> {};

// The columns of all warps reduced, that of column t in thread t < 128. `shared` holds a row for each warp; between two uses
// of it the caller has a barrier.
template <class Op, class T>
__device__ __forceinline__ T over_warps(const T (&col)[lane_cols], T* shared, int warp, int lane) {
  store_vectors(shared + warp * strip_block_cols + lane_cols * lane, col);
  __syncthreads();
  if (threadIdx.x >= strip_block_cols) return T(0);
  T v = shared[threadIdx.x];
#pragma unroll
  for (int w = 1; w < warps; w++) v = Op::of(v, shared[w * strip_block_cols + threadIdx.x]);
  return v;
}

template <class T>
__device__ __forceinline__ T at_or(const void* vector, int64_t index, bool inside, T otherwise) {
  return vector != nullptr && inside ? static_cast<const T*>(vector)[index] : otherwise;
}

// This thread's place: rows row + 0..7 and columns col + 0..3 of x and y, and how many of the columns the tile has.
struct Place {
  int warp, lane;
  int64_t row, col;
  int inside;

  __device__ __forceinline__ explicit Place(const Tile& t) : warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    row = t.i0 + int64_t(blockIdx.x) * strip_block_rows + warp * warp_rows;
    col = t.j0 + int64_t(blockIdx.y) * strip_block_cols + lane_cols * lane;
    const int64_t left = t.j1 - col;
    inside = left >= lane_cols ? lane_cols : left > 0 ? int(left) : 0;
  }
};

// Whether the tile has every pair of this block and M visits all of them, so that none is tested: most blocks of a large
// tile. The same for all of its threads.
__device__ __forceinline__ bool visits_all(const Equation& e, const Tile& t) {
  const int64_t i = t.i0 + int64_t(blockIdx.x) * strip_block_rows, j = t.j0 + int64_t(blockIdx.y) * strip_block_cols;
  if (i + strip_block_rows > t.i1 || j + strip_block_cols > t.j1) return false;
  const int64_t met = i + e.diff - j;  // the block's column that its first row leaves out
  return e.mask == MaskKind::all || (e.mask == MaskKind::off_diagonal && (met >= strip_block_cols || met <= -strip_block_rows));
}

// Four neighbouring elements. Memory beyond the tile's columns is neither read nor written.
template <bool all, class T>
__device__ __forceinline__ void load_four(const T* from, int inside, T (&v)[lane_cols]) {
  if (all || inside == lane_cols) {
    if constexpr (sizeof(T) == 4) {
      const float4 q = *reinterpret_cast<const float4*>(from);
      v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
    } else {
      const double2 p = reinterpret_cast<const double2*>(from)[0], q = reinterpret_cast<const double2*>(from)[1];
      v[0] = p.x, v[1] = p.y, v[2] = q.x, v[3] = q.y;
    }
  } else {
#pragma unroll
    for (int c = 0; c < lane_cols; c++) v[c] = c < inside ? from[c] : T(0);
  }
}

// Stores four neighbouring weights.
template <class H>
__device__ __forceinline__ void store_halves(unsigned short* to, int inside, const float (&w)[lane_cols]) {
  const unsigned low = pack<H>(w[0], w[1]), high = pack<H>(w[2], w[3]);
  if (inside == lane_cols) {
    // Of a uint2 nvcc makes two stores, each of half a sector.
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(low), "r"(high) : "memory");
    return;
  }
  const unsigned each[lane_cols] = {low & 0xffffu, low >> 16, high & 0xffffu, high >> 16};
#pragma unroll
  for (int c = 0; c < lane_cols; c++)
    if (c < inside) to[c] = static_cast<unsigned short>(each[c]);
}
template <class T>
__device__ __forceinline__ void store_four(void* weights, int64_t offset, Dtype dtype, int inside, const T (&w)[lane_cols]) {
  if constexpr (sizeof(T) == 4) {
    unsigned short* const halves = static_cast<unsigned short*>(weights) + offset;
    if (dtype == Dtype::bfloat16) return store_halves<bf16>(halves, inside, w);
    if (dtype == Dtype::float16) return store_halves<f16>(halves, inside, w);
  }
  T* const to = static_cast<T*>(weights) + offset;
  if (inside == lane_cols) return store_vectors(to, w);
#pragma unroll
  for (int c = 0; c < lane_cols; c++)
    if (c < inside) to[c] = w[c];
}
// w as store_four rounds it.
template <class T>
__device__ __forceinline__ T rounded_to(Dtype dtype, T w) {
  if constexpr (sizeof(T) == 4) {
    if (dtype == Dtype::bfloat16) return rounded<bf16>(w);
    if (dtype == Dtype::float16) return rounded<f16>(w);
  }
  return w;
}

// The entries of this thread's four columns of a vector, which may begin anywhere. Four groups are 32 bytes, so that each of their
// two loads uses half of every sector it asks for; the second finds them in the L1 cache, and it is once a block.
template <class T>
__device__ __forceinline__ void load_columns(const void* vector, const Place& p, T absent, T (&v)[lane_cols]) {
#pragma unroll
  for (int c = 0; c < lane_cols; c++) v[c] = absent;
  if (vector == nullptr) return;
  const T* const from = static_cast<const T*>(vector) + p.col;
  if (p.inside == lane_cols && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    struct alignas(16) Vector {
      T v[16 / sizeof(T)];
    };
#pragma unroll
    for (int k = 0; k < lane_cols; k += 16 / sizeof(T)) {
      const Vector part = *reinterpret_cast<const Vector*>(from + k);
#pragma unroll
      for (int c = 0; c < int(16 / sizeof(T)); c++) v[k + c] = part.v[c];
    }
  } else {
#pragma unroll
    for (int c = 0; c < lane_cols; c++)
      if (c < p.inside) v[c] = from[c];
  }
}

// What z and M take from this thread's four columns.
template <class T>
struct Columns {
  T norm[lane_cols], bias[lane_cols];
  int64_t group[lane_cols];

  __device__ __forceinline__ Columns(const Equation& e, const Place& p) {
    load_columns(e.norm_y, p, T(0), norm);
    load_columns(e.bias_y, p, T(0), bias);
    load_columns(e.group_y, p, int64_t(0), group);
  }
};

// z_ij and M on one row of four columns. z is formed by the same instructions in every kernel: a weight takes off a normaliser that
// was reduced of it, which is then none that it is above, and a backward decides of limits as its forward did.
template <class T>
struct Logits {
  const Equation e;
  T a, b;
  bool sqdist, terms;

  __device__ __forceinline__ explicit Logits(const Equation& equation)
      : e(equation), a(*static_cast<const T*>(e.scale)), b(*static_cast<const T*>(e.shift)), sqdist(e.operand == Operand::sqdist),
        terms(sqdist || e.bias_x != nullptr || e.bias_y != nullptr) {}

  // Of dot products; term: b + bx. What is not there is 0 in norms and biases.
  __device__ __forceinline__ void of_row(T term, T norm, const T (&norms)[lane_cols], const T (&biases)[lane_cols],
                                         T (&v)[lane_cols]) const {
    if (sqdist)
#pragma unroll
      for (int c = 0; c < lane_cols; c++) v[c] = intrinsics::maximum(::fma(T(-2), v[c], norm + norms[c]), T(0));
#pragma unroll
    for (int c = 0; c < lane_cols; c++) v[c] = ::fma(a, v[c], term);
    if (e.bias_y != nullptr)
#pragma unroll
      for (int c = 0; c < lane_cols; c++) v[c] += biases[c];
  }
  // The same in one loop, for kernels that form little else: in float64 it takes fewer registers there.
  __device__ __forceinline__ void of_row(int64_t i, const Columns<T>& cols, T (&v)[lane_cols]) const {
    if (!terms) {
#pragma unroll
      for (int c = 0; c < lane_cols; c++) v[c] = ::fma(a, v[c], b);
      return;
    }
    const T term = b + at_or<T>(e.bias_x, i, true, T(0)), norm = at_or<T>(e.norm_x, i, true, T(0));
#pragma unroll
    for (int c = 0; c < lane_cols; c++) {
      const T u = sqdist ? intrinsics::maximum(::fma(T(-2), v[c], norm + cols.norm[c]), T(0)) : v[c];
      v[c] = ::fma(a, u, term) + cols.bias[c];
    }
  }

  // Bit c is set where M visits (i, col + c) and the tile has that column.
  __device__ __forceinline__ unsigned visits(int64_t i, const Place& p, const int64_t (&groups)[lane_cols]) const {
    unsigned bits = (1u << p.inside) - 1u;
    if (e.mask == MaskKind::off_diagonal) {
      const int64_t c = i + e.diff - p.col;
      if (c >= 0 && c < lane_cols) bits &= ~(1u << c);
    } else if (e.mask != MaskKind::all) {
      const int64_t group = e.group_x[i];
      const bool across = e.mask == MaskKind::across_groups;
#pragma unroll
      for (int c = 0; c < lane_cols; c++)
        if ((group == groups[c]) == across) bits &= ~(1u << c);
    }
    return bits;
  }
};

// Writes this block's row (one for each group of four lanes) and column results to its rows of the partial results.
template <class T>
struct Partial {
  T *row, *col;
  int64_t rows, cols;
  bool has_row, has_col;

  __device__ __forceinline__ Partial(const StripReduce& args, const Place& p) {
    const Tile& t = args.tile;
    rows = t.i1 - t.i0, cols = t.j1 - t.j0;
    const int64_t i = int64_t(blockIdx.x) * strip_block_rows + p.warp * warp_rows + p.lane / 4;
    const int64_t j = int64_t(blockIdx.y) * strip_block_cols + threadIdx.x;
    row = static_cast<T*>(args.row_parts) + blockIdx.y * rows + i;
    col = static_cast<T*>(args.col_parts) + blockIdx.x * cols + j;
    has_row = i < rows;
    has_col = args.col_parts != nullptr && threadIdx.x < strip_block_cols && j < cols;
  }
  __device__ __forceinline__ bool stores_row(int lane) const { return has_row && lane % 4 == 0; }
  __device__ __forceinline__ int64_t row_plane() const { return gridDim.y * rows; }
  __device__ __forceinline__ int64_t col_plane() const { return gridDim.x * cols; }
};

// Calls body(pair functor) for the pair function of that number.
template <class Body>
int with_pair(int pair, Body body) {
  int number = 0;
#define FASTCL_CASE(name, type, constants) \
  if (pair == number++) return body(type{});
  FASTCL_FOR_EACH_PAIR(FASTCL_CASE)
#undef FASTCL_CASE
  return 1;  // cudaErrorInvalidValue
}

inline dim3 blocks_of(const Tile& t) {
  return dim3(unsigned(ceil_div(t.i1 - t.i0, strip_block_rows)), unsigned(ceil_div(t.j1 - t.j0, strip_block_cols)));
}

}  // namespace fastcl::cuda
