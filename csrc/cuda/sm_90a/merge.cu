// Partial results of a sweep joined in order, and the guard of the one reference.
#include "../fused_launch.cuh"
#include "launch.h"

namespace fastcl::cuda {
namespace {

// The sum of all parts of one row: of every split, and in the triangle or where they are all there is of every CTA's columns. In the
// triangle a CTA has seen only the columns right of its first block.
__device__ __forceinline__ float joined(const HopperMerge& p, int64_t k) {
  float v = 0.f;
  if (p.row_parts != nullptr)
    for (int64_t s = 0; s < p.splits; s++) v += static_cast<const float*>(p.row_parts)[s * p.size + k];
  if (p.col_parts != nullptr) {
    const int64_t ctas = p.block ? min(p.ctas, k / p.block) : p.ctas;
    for (int64_t c = 0; c < ctas; c++) v += static_cast<const float*>(p.col_parts)[c * p.size + k];
  }
  return v;
}
// Terms under 2^-126 vanish: 2^27 of them are no more than 2^-15 of a sum that passes this. Infinity and NaN do not pass.
__device__ __forceinline__ bool sound(float v) { return v >= 0x1p-84f && v < INFINITY; }

__global__ void merge(const HopperMerge p) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k >= p.size) return;
  float v = joined(p, k);
  if (p.logsumexp) {
    if (!sound(v)) *static_cast<int*>(p.doubtful) = 1;
    // As in fused_merged. The logarithm is that of a number between 1/2 and 1.
    int exponent = 0;
    const float fraction = frexpf(v, &exponent);
    const double z = double{log2f(fraction)} + exponent + double{*static_cast<const float*>(p.reference)};
    v = static_cast<float>(z * (1.0 / double{log2_e}) + double{*static_cast<const float*>(p.shift)});
  }
  static_cast<float*>(p.out)[k] = v;
}

// Both read the flag first: where nothing is doubtful they cost a launch.
template <class T>
__global__ void __launch_bounds__(RowsLayout<T>::threads, 1) careful(const HopperCareful p) {
  using C = RowsLayout<T>;
  if (*static_cast<const int*>(p.doubtful) != 0) fused_rows_sweep<C, LogSumExp<C, true>>(p.rows);
}
__global__ void replace(const HopperReplace p) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (*static_cast<const int*>(p.merge.doubtful) == 0 || k >= p.merge.size || sound(joined(p.merge, k))) return;
  static_cast<float*>(p.merge.out)[k] = fused_merged<float2>(p.careful, k);
}

template <class T>
int start_careful(const HopperCareful& p, void* stream) {
  const FusedRows& r = p.rows;
  const int64_t shared = fused_rows_shared(r.sides.dtype, r.sides.d, r.resident, r.stages, true);
  const dim3 grid(static_cast<unsigned>(r.ctas), static_cast<unsigned>(r.splits));
  return start(careful<T>, grid, RowsLayout<T>::threads, shared, p, stream);
}

}  // namespace
}  // namespace fastcl::cuda

using namespace fastcl::cuda;

extern "C" int fastcl_cuda_hopper_merge(const HopperMerge* p, void* stream) { return start(merge, over(p->size), 256, 0, *p, stream); }
extern "C" int fastcl_cuda_hopper_careful(const HopperCareful* p, void* stream) {
  if (!plausible(p->rows.equation, p->rows.sides) || p->rows.ctas < 1 || p->rows.splits < 1) return cudaErrorInvalidValue;
  return p->rows.sides.dtype == Dtype::float16 ? start_careful<f16>(*p, stream) : start_careful<bf16>(*p, stream);
}
extern "C" int fastcl_cuda_hopper_replace(const HopperReplace* p, void* stream) { return start(replace, over(p->merge.size), 256, 0, *p, stream); }
