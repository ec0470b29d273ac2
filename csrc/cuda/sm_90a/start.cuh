// Starting the kernels: maps, shared memory, and what is refused before memory is touched.
#pragma once

#include <algorithm>

#include "streamed.cuh"

namespace fastcl::cuda::hopper {

// (rows, columns) two-byte values, rows `pitch` values apart, in boxes of 64 columns and `box` rows in the 128-byte swizzle; zeros
// outside. The driver's function comes through the runtime: nothing links to libcuda. False: it is not there, or refuses.
inline bool make_map(CUtensorMap* map, Dtype dtype, const void* data, int64_t rows, int64_t columns, int64_t pitch, unsigned box) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                              const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess ? reinterpret_cast<Encode>(f) : nullptr;
  }();
  if (encode == nullptr) return false;
  const auto type = dtype == Dtype::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)}, strides[] = {static_cast<cuuint64_t>(pitch) * 2};
  const cuuint32_t boxes[] = {64, box}, steps[] = {1, 1};
  return encode(map, type, 2, const_cast<void*>(data), sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

inline constexpr int64_t most_rows = int64_t{1} << 29;  // every index of a row fits
// Whether the copy engine can read rows of d values.
inline bool readable(const void* rows, int64_t stride, int64_t d) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && stride % 8 == 0 && stride >= d;
}
inline bool two_bytes(Dtype dtype) { return dtype == Dtype::bfloat16 || dtype == Dtype::float16; }

inline bool plausible(const HopperTiles& p) {
  const FusedSides& s = p.sides;
  return s.n >= 1 && s.m >= 1 && s.d >= 1 && s.n <= most_rows && s.m <= most_rows && s.d <= 1 << 20 &&
         readable(s.x, s.x_stride, s.d) && readable(s.y, s.y_stride, s.d) && two_bytes(s.dtype) && p.equation.pair >= 0 &&
         p.equation.pair < pair_count && p.ctas >= 1 && p.splits >= 1 && p.splits <= 65535;
}

// 384 threads a CTA, and so many CTAs that run together.
template <class Kernel, class... Arguments>
int start(Kernel kernel, dim3 grid, dim3 cluster, int bytes, void* stream, const Arguments&... arguments) {
  // The most that any launch takes: another thread may launch the same kernel with less between this call and the next.
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, hopper_shared)) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster.x, attribute.val.clusterDim.y = cluster.y, attribute.val.clusterDim.z = cluster.z;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(384);
  config.dynamicSmemBytes = bytes, config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// The kernel with as many stages of `stage` bytes as fit (0: it has its own); `rest`: what else it keeps in shared memory, but for the header. `unit`:
// tiles of y that are taken at once. `x_box`, `y_box`: rows that are brought at once. `cluster`: CTAs along
// x and of splits that run together.
template <class Kernel>
int start(Kernel kernel, const HopperTiles& p, int64_t block, int unit, int64_t rest, int64_t stage, bool weights, void* stream, int64_t x_box, int64_t y_box, dim3 cluster = {1, 1, 1}) {
  if (!plausible(p) || p.ctas > ceil_div(p.sides.n, block)) return cudaErrorInvalidValue;
  CUtensorMap x, y, w{};
  const FusedSides& s = p.sides;
  if (!make_map(&x, s.dtype, s.x, s.n, s.d, s.x_stride, static_cast<unsigned>(x_box)) ||
      !make_map(&y, s.dtype, s.y, s.m, s.d, s.y_stride, static_cast<unsigned>(y_box)) ||
      (p.weights != nullptr && (!readable(p.weights, p.pitch, s.n) || !make_map(&w, s.dtype, p.weights, s.m, s.n, p.pitch, 64))))
    return cudaErrorInvalidValue;
  const auto over = [](int64_t a, int64_t b) { return static_cast<int>(ceil_div(a, b)); };
  Task task{p};
  task.n = static_cast<int>(s.n), task.m = static_cast<int>(s.m), task.chunks = over(s.d, 64);
  task.blocks = over(s.n, block), task.tiles = over(s.m, 64 * unit) * unit, task.each = over(task.tiles / unit, p.splits) * unit;
  task.terms = hopper_terms(p.equation), task.groups = hopper_groups(p.equation);
  task.header = over(lines_at + lines_bytes(p.equation, static_cast<int>(block), weights), 1024) * 1024;
  const int64_t left = hopper_shared - rest - task.header;
  task.stages = stage ? static_cast<int>(std::min<int64_t>(16, left / stage)) : 0;
  if (left < 0 || (stage && task.stages < 2)) return cudaErrorInvalidValue;
  const int bytes = static_cast<int>(task.header + rest + task.stages * stage);
  return start(kernel, dim3(static_cast<unsigned>(p.ctas), static_cast<unsigned>(p.splits)), cluster, bytes, stream, x, y, w, task);
}

template <class T, int NX, class Work>
int start_tiles(const HopperTiles& p, void* stream) {
  const int64_t kept = ceil_div(p.sides.d, 64) * NX * 128 + staging_bytes<Work>;
  const unsigned peers = hopper_shares_y(NX, p.sides.d) && p.ctas % 2 == 0 ? 2 : 1;
  return start(tiles<T, NX, Work>, p, NX, 1, kept, box_bytes, Work::boxes > 0, stream, NX, 64 / peers, dim3(peers));
}
template <class T, int NX, class Work>
int start_streamed(const HopperTiles& p, void* stream) {
  const int64_t scratch = Work::has_sums(p) ? 8 * NX * 4 : 0;
  return start(streamed<T, NX, Work>, p, NX, 2, staging_bytes<Work> + scratch, step_bytes<NX>, Work::boxes > 0, stream, NX / x_parts, 128,
               dim3(1, p.splits % 2 ? 1 : 2));
}

// Launches of one dtype; each is in a file of its own, so that they compile side by side.
template <class T>
int rows_logsumexp(const HopperTiles&, void* stream);
template <class T>
int rows_sum(const HopperTiles&, void* stream);
template <class T>
int weights_logsumexp(const HopperTiles&, void* stream);
template <class T>
int weights_sum(const HopperTiles&, void* stream);
template <class T>
int start_sweep(const HopperTiles&, void* stream);
template <class T>
int start_product(const HopperProduct&, void* stream);

}  // namespace fastcl::cuda::hopper
