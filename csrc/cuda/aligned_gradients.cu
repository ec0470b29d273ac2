// From the sums of the sweeps to the gradients of rows as they were given, and of scale and shift. A warp has one row.
#include "aligned_rows.cuh"
#include "fused_launch.cuh"

namespace fastcl::cuda {
namespace {

// d L / d u_i, entry by entry: a W Y, or 2a (diag(W 1) U - W Y), and what the pair that matches adds.
template <class T>
struct OfUnitRow {
  const T *own, *other;  // other: null beyond the pairs that match
  const float* sums;     // null: no sweep had this row
  float scale, ones, positive;
  bool squared;

  __device__ __forceinline__ float operator[](int k) const {
    const float u = static_cast<float>(own[k]);
    float v = 0.f;
    if (sums != nullptr) v = scale * (squared ? 2.f * fmaf(ones, u, -sums[k]) : sums[k]);
    if (other != nullptr) {
      const float w = static_cast<float>(other[k]);
      v += weighed(positive, squared ? 2.f * (u - w) : w);
    }
    return v;
  }
};

// The gradient of rows of unit length less its radial part, over the row's length: rows whose gradient is near the end of the range
// are scaled down meanwhile. Where a gradient is infinite its infinite entries alone count, as equals: never NaN, which comes of
// NaN only.
template <class T>
__device__ __forceinline__ void write_tangent(T* to, const OfUnitRow<T>& of_unit, const UnitRow<T>& unit, int d, double upstream) {
  const int lane = threadIdx.x % 32;
  float largest = 0.f, radial = 0.f;
  for (int k = lane; k < d; k += 32) largest = larger(largest, fabsf(of_unit[k]));
  largest = over_warp(largest, [](float a, float b) { return larger(a, b); });
  const float power = power_for(largest);
  const bool infinite = isinf(largest);
  const auto at = [&](int k) {
    const float v = of_unit[k];
    return !infinite ? v * power : isinf(v) ? copysignf(1.f, v) : 0.f * v;
  };
  for (int k = lane; k < d; k += 32) radial = fmaf(at(k), unit[k], radial);
  radial = unit.along ? warp_sum(radial) : 0.f * unit.divisor;
  // Of a power of two the reciprocal is exact.
  const double inverse = double{unit.power} * double{1.f / unit.divisor};
  const double by = upstream * inverse * (infinite ? 0x1p1000 : double{1.f / power});
  for (int k = lane; k < d; k += 32) to[k] = static_cast<T>(static_cast<float>(double{at(k) - radial * unit[k]} * by));
}

// What a row counts for the gradients of a and b.
struct OfNumbers {
  double scale = 0, shift = 0;
};

template <class T>
__device__ __forceinline__ OfNumbers of_row(const AlignedGradients& p, const AlignedSide& side, const AlignedSide& opposite, int64_t i, bool of_x) {
  const int lane = threadIdx.x % 32, d = static_cast<int>(p.d);
  const bool pair = i < p.n;
  const AlignedNumbers& numbers = *p.numbers;
  const float of_z = pair ? p.of_matching[i] : 0.f;
  OfUnitRow<T> of_unit{};
  of_unit.own = static_cast<const T*>(side.unit) + i * p.width;
  of_unit.other = pair ? static_cast<const T*>(opposite.unit) + i * p.width : nullptr;
  of_unit.sums = side.sums == nullptr ? nullptr : side.sums + i * p.width;
  of_unit.scale = numbers.swept_scale * numbers.unit, of_unit.positive = weighed(of_z, numbers.scale);
  of_unit.ones = side.ones == nullptr ? 0.f : side.ones[i], of_unit.squared = p.squared;
  if (side.gradient != nullptr) {
    T* const to = static_cast<T*>(side.gradient) + i * p.d;
    const double upstream = *p.upstream;
    if (side.given.rows != nullptr) write_tangent(to, of_unit, UnitRow<T>(side.given, i, d, true), d, upstream);
    else
      for (int k = lane; k < d; k += 32) to[k] = static_cast<T>(static_cast<float>(double{of_unit[k]} * upstream));
  }
  OfNumbers found;
  if (p.parts == nullptr) return found;
  float dot = 0.f;
  if (of_unit.sums != nullptr && side.of_dot != 0.f)
    for (int k = lane; k < d; k += 32) dot = fmaf(static_cast<float>(of_unit.own[k]), of_unit.sums[k], dot);
  dot = warp_sum(dot);
  const double norms = side.of_norm == 0.f ? 0 : double{side.of_norm} * side.norm[i] * of_unit.ones;
  found.scale = p.slope * numbers.unit * (double{side.of_dot} * dot + norms);
  found.shift = p.slope * numbers.unit * (double{side.of_ones} * of_unit.ones);
  if (pair && of_x) found.scale += weighed(of_z, p.matching[i]), found.shift += of_z;
  return found;
}

template <class T>
__global__ void __launch_bounds__(aligned_threads, 1) aligned_gradients_kernel(const AlignedGradients p) {
  __shared__ double meeting[32];
  __shared__ bool last;
  const int64_t x_rows = p.x.given.count, row = blockIdx.x * aligned_rows_of_block + threadIdx.x / 32;
  OfNumbers found;
  if (row < x_rows) found = of_row<T>(p, p.x, p.y, row, true);
  else if (row < x_rows + p.y.given.count) found = of_row<T>(p, p.y, p.x, row - x_rows, false);
  if (p.parts == nullptr) return;

  // Blocks leave their parts, and the last one adds them up, in one order whoever that is.
  const bool first_lane = threadIdx.x % 32 == 0;
  const auto add = [](double a, double b) { return a + b; };
  const double scale = over_block(first_lane ? found.scale : 0.0, 0.0, meeting, add);
  const double shift = over_block(first_lane ? found.shift : 0.0, 0.0, meeting, add);
  double* const parts = reinterpret_cast<double*>(p.parts);
  if (threadIdx.x == 0) {
    parts[2 * blockIdx.x] = scale, parts[2 * blockIdx.x + 1] = shift;
    __threadfence();
    last = atomicInc(&p.numbers->finished, gridDim.x - 1) == gridDim.x - 1;  // which makes it 0 again
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  double of_scale = 0, of_shift = 0;
  for (unsigned k = threadIdx.x; k < gridDim.x; k += blockDim.x) of_scale += __ldcg(parts + 2 * k), of_shift += __ldcg(parts + 2 * k + 1);
  of_scale = over_block(of_scale, 0.0, meeting, add), of_shift = over_block(of_shift, 0.0, meeting, add);
  if (threadIdx.x != 0) return;
  if (p.of_scale != nullptr) *p.of_scale = static_cast<float>(*p.upstream * of_scale);
  if (p.of_shift != nullptr) *p.of_shift = static_cast<float>(*p.upstream * of_shift);
}

}  // namespace

extern "C" int fastcl_cuda_aligned_gradients(const AlignedGradients* p, void* stream) {
  const dim3 grid(static_cast<unsigned>(aligned_gradient_blocks(p->x.given.count, p->y.given.count)));
  switch (p->dtype) {
    case Dtype::bfloat16: return start(aligned_gradients_kernel<bf16>, grid, aligned_threads, 0, *p, stream);
    case Dtype::float16: return start(aligned_gradients_kernel<f16>, grid, aligned_threads, 0, *p, stream);
    case Dtype::float32: return start(aligned_gradients_kernel<float>, grid, aligned_threads, 0, *p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace fastcl::cuda
