// What a tile of S becomes in a gradient: weights in the rows' dtype, through shared memory to the strip, and their sums.
//
//     log-sum-exp   w_ij = (factor_i + factor_j) 2^(z - reference_i - reference_j)                  one exponential, or two:
//                   w_ij = factor_i 2^(z - reference_i) + factor_j 2^(z - reference_j)
//     sum           w_ij = f'(z_ij) (factor_i + factor_j) / unit
#pragma once

#include <cfloat>

#include "rows.cuh"

namespace fastcl::cuda::hopper {

struct Softmax {};  // the weights of a log-sum-exp; any other Slope is a pair function

template <class T, int NX, class Slope, bool GENERAL, int BOXES>
struct Weights {
  static constexpr int boxes = BOXES;
  static constexpr bool logsumexp = __is_same(Slope, Softmax), scaled = __is_same(T, f16) && !logsumexp;
  enum How { one_reference, one_exponential, two_exponentials };

  Pairs<NX, logsumexp, true, GENERAL> pairs;
  Sums<GENERAL ? NX : 0> sums;
  float peak = 0.f, inverse = 1.f;  // float16 sums: the largest |w|, 1 / unit

  __device__ __forceinline__ explicit Weights(const Task& p) : pairs(p) {
    if (scaled && p.unit != nullptr) inverse = 1.f / *static_cast<const float*>(p.unit);
  }
  static __host__ __device__ __forceinline__ bool has_sums(const HopperTiles& p) { return GENERAL && p.row_parts != nullptr; }

  __device__ __forceinline__ void begin(const Task& p, int x0, bool first) {
    sums.clear();
    if (!first) meet(3, 256);  // nobody reads the last block's lines any more
    pairs.stage(p, x0);
    meet(3, 256);
  }

  template <How HOW>
  __device__ __forceinline__ float weight(const Task& p, float dot, const Brought& x, int q, const Brought& y, int h, float& value) const {
    const float factor = x.factor[q] + y.factor[h];
    if constexpr (!logsumexp) {
      const Fast k[2] = {Fast(p.equation.constants[0]), Fast(p.equation.constants[1])}, z = Fast::of(HOW == one_reference ? pairs.plain(dot) : pairs.form(p, dot, x, q, y, h));
      value = Slope::value(z, k).v;
      return Slope::slope(z, k).v * factor * (scaled ? inverse : 1.f);
    } else if constexpr (HOW == one_reference) {
      return factor * ex2(pairs.plain(dot));
    } else if constexpr (HOW == one_exponential) {
      return factor * ex2(pairs.form(p, dot, x, q, y, h));
    } else {
      const float z = pairs.form(p, dot, x, q, y, h);
      return x.factor[q] * ex2(smaller(z - x.reference[q], 0.f)) + y.factor[h] * ex2(smaller(z - y.reference[h], 0.f));
    }
  }

  template <bool MASKED, How HOW>
  __device__ __forceinline__ void weigh(const Task& p, const float (&acc)[NX / 2], int x0, int y0, bool first, uint32_t staging, const CUtensorMap* w_map) {
    const Place at;
    const int y = y0 + at.warp * 16 + at.g;
    const Visited visited = MASKED ? pairs.visited(p, x0, y, at) : Visited{};
    Brought of_y = pairs.of_y(p, y);
    const bool stored = !scaled || p.weights != nullptr, leads = threadIdx.x % 128 == 0;
    const bool rounds = p.equation.operand == Operand::sqdist;  // diag(W 1) X - W Y cancels: both terms take the same rounded weights
    if constexpr (logsumexp && HOW == one_exponential)
#pragma unroll
      for (int h = 0; h < 2; h++) of_y.bias[h] -= of_y.reference[h];
    if constexpr (logsumexp && HOW == two_exponentials)  // as in fused_weights.cuh
      if (fabsf(pairs.shift) >= fused_large)
        of_y.bias[0] += fabsf(pairs.shift) * 0x1p-22f, of_y.bias[1] += fabsf(pairs.shift) * 0x1p-22f;
    const uint32_t row = staging + (at.warp * 16 + (at.lane & 15)) * 128;
    float down[2] = {0.f, 0.f}, values[2] = {0.f, 0.f};
#pragma unroll
    for (int box = 0; box < NX / 64; box += BOXES) {
      if (stored) {
        if (leads) stores_read();
        meet(4 + at.me, 128);
      }
#pragma unroll
      for (int c = box * 8; c < (box + BOXES) * 8; c += 2) {
        uint32_t packed[4];
#pragma unroll
        for (int k = 0; k < 2; k++) {
          Brought x = pairs.of_x(p, c + k, at);
          if constexpr (logsumexp && HOW == one_exponential)
#pragma unroll
            for (int q = 0; q < 2; q++) x.bias[q] -= x.reference[q];
          float w[4];
#pragma unroll
          for (int q = 0; q < 4; q++) {
            float value = 0.f;
            w[q] = weight<HOW>(p, acc[4 * (c + k) + q], x, q % 2, of_y, q / 2, value);
            if (MASKED && !pairs.visits(p, visited, 8 * (c + k) + q % 2, q / 2, x.group[q % 2], of_y.group[q / 2])) w[q] = value = 0.f;
            if (scaled) peak = fmaxf(peak, fabsf(w[q]));
            if constexpr (GENERAL) {
              const float counted = rounds ? rounded<T>(w[q]) : w[q];
              down[q / 2] += counted, sums.across[2 * (c + k) + q % 2] += counted;
              values[q / 2] += value;
            }
          }
          packed[2 * k] = pack<T>(w[0], w[1]), packed[2 * k + 1] = pack<T>(w[2], w[3]);
        }
        if (stored) store_matrices(row + (c / 8 - box) * box_bytes + ((c % 8 + (at.lane >> 4) ^ (at.lane & 7)) << 4), packed);
      }
      if (!stored) continue;
      stores_before_engine();
      meet(4 + at.me, 128);
      if (leads) {
#pragma unroll
        for (int k = 0; k < BOXES; k++) store_box(w_map, x0 + 64 * (box + k), y0, staging + k * box_bytes);
        stores_commit();
      }
    }
    if constexpr (GENERAL) {
      const int64_t line = int64_t(blockIdx.x) * p.m;
      if (p.col_parts != nullptr) Sums<NX>::put(down, static_cast<float*>(p.col_parts) + line, y, p.m, first, at);
      if (!logsumexp && p.value_parts != nullptr) Sums<NX>::put(values, static_cast<float*>(p.value_parts) + line, y, p.m, first, at);
    }
  }

  __device__ __forceinline__ void tile(const Task& p, const float (&acc)[NX / 2], int x0, int y0, bool first, bool, uint32_t staging,
                                       const CUtensorMap* w_map) {
    const bool whole = pairs.whole(p, x0, y0);
    if constexpr (!logsumexp) {
      if (whole && !p.terms) weigh<false, one_reference>(p, acc, x0, y0, first, staging, w_map);
      else weigh<true, one_exponential>(p, acc, x0, y0, first, staging, w_map);
    } else {
      const bool single = *static_cast<const int*>(p.single) != 0 && fabsf(pairs.shift) < fused_large;
      if constexpr (!GENERAL) {
        if (whole && single && p.both) {  // all references are half of rho, the first of Weighting::reference
          Weights all = *this;
          all.pairs.shift -= *static_cast<const float*>(p.reference) * log2_e;
          return all.template weigh<false, one_reference>(p, acc, x0, y0, first, staging, w_map);
        }
        if (whole && single) return weigh<false, one_exponential>(p, acc, x0, y0, first, staging, w_map);
      }
      if (single) weigh<true, one_exponential>(p, acc, x0, y0, first, staging, w_map);
      else weigh<true, two_exponentials>(p, acc, x0, y0, first, staging, w_map);
    }
  }
  __device__ __forceinline__ void finish(const Task& p, int x0, float* scratch) const {
    if constexpr (GENERAL) sums.finish(static_cast<float*>(p.row_parts) + int64_t(blockIdx.y) * p.n, x0, p.n, scratch);
  }
  // After the last block.
  __device__ __forceinline__ void end(const Task& p) const {
    if (threadIdx.x % 128 == 0) stores_read();
    if (!scaled || p.peaks == nullptr) return;
    float top = peak;
#pragma unroll
    for (int o = 16; o > 0; o /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
    const Place at;
    if (at.lane == 0) static_cast<float*>(p.peaks)[(blockIdx.y * 8 + at.me * 4 + at.warp) * gridDim.x + blockIdx.x] = top;
  }
};

}  // namespace fastcl::cuda::hopper
