// Which diagonal of a mask meets a block of pairs.
#pragma once

#include <climits>

#include "launch.h"

namespace fastcl::cuda {

// Of `here` and the two diagonals a period from there, that which may meet a block of `rows` x `cols` pairs. A diagonal is told by
// the block's column that it has in the block's first row: it meets the block where that is above -rows and under cols. Of
// diagonals rows + cols or more apart one at most does. A period of 0 is one diagonal.
template <int rows, int cols>
__device__ __forceinline__ int64_t nearest_diagonal(int64_t here, int64_t period) {
  return here + (here >= cols ? -period : here <= -rows ? period : 0);
}

// The diagonals of one mask in 32 bits each: with i and j below 2^31 - 255, as the fused kernels have them, what does not fit meets no
// pair, nor does what it becomes.
struct Diagonals {
  int diff;
  uint32_t period;

  __device__ __forceinline__ explicit Diagonals(const Equation& e)
      : diff(static_cast<int>(min(max(e.diff, int64_t{INT_MIN}), int64_t{INT_MAX}))),
        period(static_cast<uint32_t>(min(e.period, int64_t{UINT_MAX}))) {}

  // Column less row, within the block at row0 and col0, of the pairs that are left out there; `nowhere`: none are.
  static constexpr int nowhere = INT_MIN / 2;
  template <int rows, int cols>
  __device__ __forceinline__ int met(int row0, int col0) const {
    const int64_t here = nearest_diagonal<rows, cols>(int64_t{diff} + row0 - col0, period);
    return here > -rows && here < cols ? static_cast<int>(here) : nowhere;
  }
};

}  // namespace fastcl::cuda
