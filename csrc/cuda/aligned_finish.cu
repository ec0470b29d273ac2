// After the pairs: r and c from their parts, the loss, and the factors that the gradient sweeps multiply. One block has them all.
#include "aligned_rows.cuh"
#include "fused_launch.cuh"

namespace fastcl::cuda {
namespace {

struct ValueAndSlope {
  float value, slope;
};

// h and h' at z, in float32 itself: there are few of them.
__device__ ValueAndSlope potential(const AlignedTerm& t, float z) {
  const float k[2] = {static_cast<float>(t.constants[0]), static_cast<float>(t.constants[1])};
  ValueAndSlope found{};
  int place = 0;
#define FASTCL_AT(name, F, constants) \
  if (t.pair == place++) found = {F::value(z, k), F::slope(z, k)};
  FASTCL_FOR_EACH_PAIR(FASTCL_AT)
#undef FASTCL_AT
  return found;
}

// Of the references of one side: where they lie, and the largest of their factors.
struct Spread {
  float low = INFINITY, high = -INFINITY, largest = 0.f;

  __device__ __forceinline__ void add(float log, float factor) {
    if (isfinite(log)) low = fminf(low, log), high = fmaxf(high, log);
    largest = larger(largest, fabsf(factor));
  }
  __device__ __forceinline__ void gather(float* meeting) {
    low = over_block(low, INFINITY, meeting, [](float a, float b) { return fminf(a, b); });
    high = over_block(high, -INFINITY, meeting, [](float a, float b) { return fmaxf(a, b); });
    largest = over_block(largest, 0.f, meeting, [](float a, float b) { return larger(a, b); });
  }
  __device__ __forceinline__ Spread with(const Spread& other) const {
    Spread all;
    all.low = fminf(low, other.low), all.high = fmaxf(high, other.high);
    return all;
  }
  // One exponential serves both terms of a weight where every r and c lies within 28 of `middle`, unless they are large.
  __device__ __forceinline__ bool close() const { return high - low < 56.f && fabsf(middle()) < fused_large; }
  __device__ __forceinline__ bool large() const { return high >= low && larger(fabsf(high), fabsf(low)) >= fused_large; }
  __device__ __forceinline__ bool single(bool both) const { return both ? close() : !large(); }
  __device__ __forceinline__ float middle() const { return high >= low ? 0.5f * (high + low) : 0.f; }
};

// (g, r) of a row, kept where its factor will be.
__device__ __forceinline__ void keep(const AlignedReduction& of, int64_t k, float factor, float log) {
  if (of.factors != nullptr) reinterpret_cast<float2*>(of.factors)[k] = make_float2(factor, log);
}

// w softplus(t) of t = r - z_ii, and what its slope adds to the gradients of r and of z_ii.
__device__ __forceinline__ double contrast(const AlignedReduction& of, int64_t k, float log, float z, float weight, float& of_z, Spread& spread) {
  const float t = log - z, slope = weight * pairs::Softplus::slope(t, static_cast<const float*>(nullptr));
  keep(of, k, slope, log);
  of_z -= slope, spread.add(log, slope);
  return double{weight} * pairs::Softplus::value(t, static_cast<const float*>(nullptr));
}

template <class Part>
__device__ __forceinline__ double contrasts(const AlignedFinish& p, Spread& rows, Spread& others) {
  const float weight = static_cast<float>(p.columns ? 0.5 * p.weight : p.weight);
  double value = 0;
  for (int64_t i = threadIdx.x; i < p.n; i += blockDim.x) {
    const float z = fmaf(p.matching[i], p.numbers->scale, p.numbers->shift);
    float of_z = 0.f;
    for (int64_t view = 0; view < p.views; view++) {
      const int64_t k = view * p.n + i;
      value += contrast(p.rows, k, fused_merged<Part>(p.rows.parts, k), z, weight, of_z, rows);
    }
    if (p.columns) value += contrast(p.others, i, fused_merged<Part>(p.others.parts, i), z, weight, of_z, others);
    if (p.of_matching != nullptr) p.of_matching[i] = of_z;
  }
  return value;
}

template <class Part>
__device__ __forceinline__ double sums(const AlignedFinish& p, Spread& rows, Spread& others) {
  double value = 0;
  const auto add = [&](const AlignedReduction& of, Spread& spread) {
    for (int64_t k = threadIdx.x; k < of.parts.size; k += blockDim.x) {
      const float r = fused_merged<Part>(of.parts, k), weight = static_cast<float>(p.weight);
      value += p.weight * r;
      keep(of, k, weight, r), spread.add(r, weight);
    }
  };
  add(p.rows, rows), add(p.others, others);
  const AlignedTerm& term = p.positives;
  for (int64_t i = threadIdx.x; i < p.n; i += blockDim.x) {
    const float z = fmaf(p.matching[i], p.numbers->scale, p.numbers->shift), linear = static_cast<float>(p.linear);
    value += weighed(linear, z);
    float of_z = linear;
    if (term.weight != 0) {
      const ValueAndSlope h = potential(term, static_cast<float>(term.slope * z + term.offset));
      value += term.weight * h.value, of_z += static_cast<float>(term.weight * term.slope) * h.slope;
    }
    if (p.of_matching != nullptr) p.of_matching[i] = of_z;
  }
  return value;
}

// What is kept of a side becomes its factors, as fused.h has them.
template <bool logsumexp>
__device__ __forceinline__ void write_factors(const AlignedReduction& of, bool close, float middle, float inverse) {
  if (of.factors == nullptr) return;
  float2* const factors = reinterpret_cast<float2*>(of.factors);
  const int64_t padded = (of.parts.size + fused_tile - 1) / fused_tile * fused_tile;
  for (int64_t k = threadIdx.x; k < padded; k += blockDim.x) {
    float2 found = make_float2(0.f, 0.f);
    if (k < of.parts.size) {
      const float2 kept = factors[k];
      const float own = kept.x * inverse, reference[2] = {middle, 1.f};
      found = factor(&own, logsumexp ? &kept.y : nullptr, reference, close, 0, 1);
    }
    factors[k] = found;
  }
}

template <class Part>
__global__ void __launch_bounds__(aligned_finish_threads, 1) aligned_finish_kernel(const AlignedFinish p) {
  constexpr bool logsumexp = sizeof(Part) == 8;
  __shared__ double meeting_values[32];
  __shared__ float meeting[32];
  Spread rows, others;
  double value = 0;
  if constexpr (logsumexp)
    if (p.contrast) value = contrasts<Part>(p, rows, others);
  if (!p.contrast) value = sums<Part>(p, rows, others);
  value = over_block(value, 0.0, meeting_values, [](double a, double b) { return a + b; });
  if (threadIdx.x == 0) *p.value = static_cast<float>(value + p.constant);
  if (p.of_matching == nullptr) return;

  rows.gather(meeting), others.gather(meeting);
  float unit = 1.f;
  if (p.half && logsumexp) {  // such a weight is at most max |g| + max |h|: no softmax passes 1
    const float both = p.symmetric ? 2.f * larger(rows.largest, others.largest) : rows.largest + others.largest;
    unit = both == both ? fminf(fmaxf(both * 0x1p-12f, 1e-30f), 1e30f) : 1.f;
  }
  const Spread all = rows.with(others), &of_rows = p.columns ? all : rows, &of_others = p.columns ? all : others;
  const bool both = logsumexp && (p.columns || p.symmetric);
  if (threadIdx.x == 0) {
    p.numbers->unit = unit;
    p.numbers->single[0] = !logsumexp || of_rows.single(both), p.numbers->single[1] = !logsumexp || of_others.single(both);
  }
  write_factors<logsumexp>(p.rows, both && of_rows.close(), of_rows.middle(), 1.f / unit);
  write_factors<logsumexp>(p.others, both && of_others.close(), of_others.middle(), 1.f / unit);
  for (int64_t k = threadIdx.x; k < p.empty_others; k += blockDim.x) reinterpret_cast<float2*>(p.others.factors)[k] = make_float2(0.f, 0.f);
}

}  // namespace

extern "C" int fastcl_cuda_aligned_finish(const AlignedFinish* p, void* stream) {
  if (p->positives.pair < 0 || p->positives.pair >= pair_count) return cudaErrorInvalidValue;
  return start(p->rows.parts.logsumexp ? aligned_finish_kernel<float2> : aligned_finish_kernel<float>, dim3(1), aligned_finish_threads, 0, *p, stream);
}

}  // namespace fastcl::cuda
