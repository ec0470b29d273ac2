// Diagonals of csrc/cuda/diagonals.cuh alone: of each (diff, period, row0, col0) the one that meets a block of 128 x 128 pairs there.
#include "diagonals.cuh"

namespace fastcl::cuda {

struct Met {
  const int64_t* asked;
  int64_t count;
  int64_t* met;
};

__global__ void met_kernel(const Met p) {
  const int64_t k = threadIdx.x;
  if (k >= p.count) return;
  Equation e{};
  e.diff = p.asked[4 * k], e.period = p.asked[4 * k + 1];
  p.met[k] = Diagonals(e).met<128, 128>(static_cast<int>(p.asked[4 * k + 2]), static_cast<int>(p.asked[4 * k + 3]));
}

extern "C" int fastcl_cuda_met(const Met* p, void* stream) {
  met_kernel<<<1, 1024, 0, static_cast<cudaStream_t>(stream)>>>(*p);
  return cudaGetLastError();
}

}  // namespace fastcl::cuda
