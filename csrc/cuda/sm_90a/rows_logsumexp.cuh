// Launches of the forward sweep under log-sum-exp.
#pragma once

#include "rows.cuh"
#include "start.cuh"

namespace fastcl::cuda::hopper {

template <class T>
int rows_logsumexp(const HopperTiles& p, void* stream) {
  const int64_t resident = hopper_resident(p.equation, p.sides.d, false, false);
  if (hopper_general(p.equation, false))
    return resident ? start_tiles<T, 128, Rows<128, Exponential, true>>(p, stream) : start_streamed<T, 128, Rows<128, Exponential, true>>(p, stream);
  switch (resident) {
    case 256: return start_tiles<T, 256, Rows<256, Exponential, false>>(p, stream);
    case 192: return start_tiles<T, 192, Rows<192, Exponential, false>>(p, stream);
    case 128: return start_tiles<T, 128, Rows<128, Exponential, false>>(p, stream);
    default: return start_streamed<T, 256, Rows<256, Exponential, false>>(p, stream);
  }
}

}  // namespace fastcl::cuda::hopper
