// Launches of the weights of a log-sum-exp.
#pragma once

#include "start.cuh"
#include "weights.cuh"

namespace fastcl::cuda::hopper {

template <class T>
int weights_logsumexp(const HopperTiles& p, void* stream) {
  const bool sums = p.row_parts != nullptr || p.col_parts != nullptr;
  const int64_t resident = hopper_resident(p.equation, p.sides.d, true, sums);
  if (hopper_general(p.equation, sums))
    return resident ? start_tiles<T, 128, Weights<T, 128, Softmax, true, 1>>(p, stream) : start_streamed<T, 128, Weights<T, 128, Softmax, true, 1>>(p, stream);
  switch (resident) {
    case 256: return start_tiles<T, 256, Weights<T, 256, Softmax, false, 4>>(p, stream);
    case 128: return start_tiles<T, 128, Weights<T, 128, Softmax, false, 1>>(p, stream);
    default: return start_streamed<T, 256, Weights<T, 256, Softmax, false, 1>>(p, stream);
  }
}

}  // namespace fastcl::cuda::hopper
