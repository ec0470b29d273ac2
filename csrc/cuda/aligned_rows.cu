// Before the pairs: both views' rows as the sweeps take them, and the operand of the pairs that match. A warp has row i of either.
#include "aligned_rows.cuh"
#include "fused_launch.cuh"

namespace fastcl::cuda {

__device__ __forceinline__ void write_numbers(const AlignedRows& p) {
  AlignedNumbers& numbers = *p.numbers;
  const double scale = p.scale == nullptr ? p.scale_number : static_cast<double>(*static_cast<const float*>(p.scale));
  const double shift = p.shift == nullptr ? p.shift_number : static_cast<double>(*static_cast<const float*>(p.shift));
  numbers.scale = static_cast<float>(scale), numbers.shift = static_cast<float>(shift);
  numbers.swept_scale = static_cast<float>(p.slope * scale), numbers.swept_shift = static_cast<float>(p.slope * shift + p.offset);
  numbers.unit = 1.f, numbers.single[0] = numbers.single[1] = 1, numbers.finished = 0;
}

template <class T>
__global__ void __launch_bounds__(aligned_threads, 1) aligned_rows_kernel(const AlignedRows p) {
  const int lane = threadIdx.x % 32;
  const int64_t i = blockIdx.x * aligned_rows_of_block + threadIdx.x / 32;
  if (blockIdx.x == 0 && threadIdx.x == 0) write_numbers(p);
  const int d = static_cast<int>(p.d), width = static_cast<int>(p.width);
  const bool of_x = i < p.x.count, of_y = i < p.y.count;
  if (!of_x && !of_y) return;
  // Without a row of its own a warp reads that of the other side, and writes nothing of it.
  const UnitRow<T> x(of_x ? p.x : p.y, i, d, p.normalize), y(of_y ? p.y : p.x, i, d, p.normalize);
  T *const to_u = static_cast<T*>(p.u) + i * width, *const to_v = static_cast<T*>(p.v) + i * width;
  float matching = 0.f, norm_u = 0.f, norm_v = 0.f;
  for (int k = lane; k < width; k += 32) {
    float a = k < d ? x[k] : 0.f, b = k < d ? y[k] : 0.f;
    const float u = rounded<T>(a), v = rounded<T>(b);
    if (of_x) to_u[k] = static_cast<T>(u);
    if (of_y) to_v[k] = static_cast<T>(v);
    norm_u = fmaf(u, u, norm_u), norm_v = fmaf(v, v, norm_v);
    // A pair that matches is formed of the rows as they are: of float32, before tf32 rounds them.
    if constexpr (sizeof(T) == 2) a = u, b = v;
    matching = p.squared ? fmaf(a - b, a - b, matching) : fmaf(a, b, matching);
  }
  matching = warp_sum(matching);
  if (p.norm_u != nullptr) norm_u = warp_sum(norm_u), norm_v = warp_sum(norm_v);
  if (lane != 0) return;
  if (of_x && of_y) p.matching[i] = matching;
  if (of_x && p.norm_u != nullptr) p.norm_u[i] = norm_u;
  if (of_y && p.norm_v != nullptr) p.norm_v[i] = norm_v;
  if (of_x && p.group_u != nullptr) p.group_u[i] = i;
  if (of_y && p.group_v != nullptr) p.group_v[i] = i;
}

extern "C" int fastcl_cuda_aligned_rows(const AlignedRows* p, void* stream) {
  const int64_t rows = p->x.count > p->y.count ? p->x.count : p->y.count;
  const dim3 grid = over(32 * rows);
  switch (p->dtype) {
    case Dtype::bfloat16: return start(aligned_rows_kernel<bf16>, grid, aligned_threads, 0, *p, stream);
    case Dtype::float16: return start(aligned_rows_kernel<f16>, grid, aligned_threads, 0, *p, stream);
    case Dtype::float32: return start(aligned_rows_kernel<float>, grid, aligned_threads, 0, *p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace fastcl::cuda
