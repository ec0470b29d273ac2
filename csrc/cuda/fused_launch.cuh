// Starting a kernel, and what is refused before memory is touched.
#pragma once

#include "fused_gradient.cuh"
#include "fused_rows.cuh"

namespace fastcl::cuda {

int launch_rows_logsumexp(const FusedRows&, void* stream);
int launch_rows_sum(const FusedRows&, void* stream);
int launch_gradient_logsumexp(const FusedGradient&, void* stream);
int launch_gradient_sum(const FusedGradient&, void* stream);

template <class Kernel, class Params>
int start(Kernel kernel, dim3 grid, int threads, int64_t shared, const Params& p, void* stream) {
  if (grid.x == 0) return cudaSuccess;
  if (shared > 48 << 10) {
    // The device's most and not this launch's: another thread may launch the same kernel with less between these two calls. It
    // is a limit and reserves nothing.
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

// A grid of 256 threads for each 256 of count.
inline dim3 over(int64_t count) { return dim3(static_cast<unsigned>((count + 255) / 256)); }

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Whether the copies may be 16 bytes wide and every index of a row fits 32 bits.
inline bool plausible(const Equation& e, const FusedSides& s) {
  const int64_t unit = 16 / bytes_of(s.dtype), most = (int64_t{1} << 31) - 2 * fused_tile;
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return s.n >= 1 && s.m >= 1 && s.d >= 1 && s.n <= most && s.m <= most && s.d <= most && s.d % unit == 0 &&
         s.x_stride % unit == 0 && s.y_stride % unit == 0 && aligned(s.x) && aligned(s.y) && s.dtype != Dtype::float64 &&
         e.pair >= 0 && e.pair < pair_count;
}

template <class C>
int launch_rows(void (*kernel)(FusedRows), const FusedRows& p, bool logsumexp, void* stream) {
  static_assert(C::BM == fused_tile && C::BN == fused_tile && C::WM == 2 && C::WN == 4 && line_bytes<C> == 2 * fused_tile * fused_line, "");
  const int64_t shared = fused_rows_shared(p.sides.dtype, p.sides.d, p.resident, p.stages, logsumexp);
  const dim3 grid(static_cast<unsigned>(p.ctas), static_cast<unsigned>(p.splits));
  return start(kernel, grid, C::threads, shared, p, stream);
}

template <class C>
int launch_gradient(void (*kernel)(FusedGradient), const FusedGradient& p, void* stream) {
  if (fused_gradient_shared(p.sides.dtype, p.sides.d) != C::shared) return cudaErrorInvalidValue;  // the two disagree
  return start(kernel, dim3(static_cast<unsigned>(ceil_div(p.sides.n, C::BM))), C::threads, C::shared, p, stream);
}

}  // namespace fastcl::cuda
