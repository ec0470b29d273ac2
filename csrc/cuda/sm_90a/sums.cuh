// Launches of sums of pair functions: reductions and weights.
#pragma once

#include "start.cuh"
#include "weights.cuh"

namespace fastcl::cuda::hopper {

template <class T, class F>
int rows_sum_of(const HopperTiles& p, void* stream) {
  using Work = Rows<128, PairFunction<F>, true>;
  // log1pf is long: ptxas spilled a register of the resident loop for it, and of the other one none. Training takes its values from
  // weights_sum_of.
  if constexpr (!__is_same(F, ::fastcl::pairs::Log1p))
    if (hopper_resident(p.equation, p.sides.d, false, true)) return start_tiles<T, 128, Work>(p, stream);
  return start_streamed<T, 128, Work>(p, stream);
}
template <class T, class F>
int weights_sum_of(const HopperTiles& p, void* stream) {
  using Work = Weights<T, 128, F, true, 1>;
  return hopper_resident(p.equation, p.sides.d, true, true) ? start_tiles<T, 128, Work>(p, stream) : start_streamed<T, 128, Work>(p, stream);
}

#define FASTCL_CASE(name, type, constants) \
  if (p.equation.pair == number++) return FASTCL_LAUNCH_OF(type);

template <class T>
int rows_sum(const HopperTiles& p, void* stream) {
  int number = 0;
#define FASTCL_LAUNCH_OF(type) rows_sum_of<T, type>(p, stream)
  FASTCL_FOR_EACH_PAIR(FASTCL_CASE)
#undef FASTCL_LAUNCH_OF
  return cudaErrorInvalidValue;
}
template <class T>
int weights_sum(const HopperTiles& p, void* stream) {
  int number = 0;
#define FASTCL_LAUNCH_OF(type) weights_sum_of<T, type>(p, stream)
  FASTCL_FOR_EACH_PAIR(FASTCL_CASE)
#undef FASTCL_LAUNCH_OF
  return cudaErrorInvalidValue;
}
#undef FASTCL_CASE

}  // namespace fastcl::cuda::hopper
