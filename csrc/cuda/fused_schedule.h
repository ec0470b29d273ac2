// The fused form: no workspace beyond O(n + m) for each CTA, the same bits in every run.
//
//     fused_rows       r and c: 1 product of 2 n m d flops, half with x itself
//     fused_gradient   W Y: 2, and with the sides exchanged W^T X: 2
//
// so that rows and columns take 5 products where the strip form takes 4, and write nothing of size n x m.
#pragma once

#include "problem.h"

namespace fastcl::cuda::fused {

// r, and c when asked (undefined otherwise), in one sweep.
std::tuple<Tensor, Tensor> rows(const Problem& p);

// The gradients of <g, r> + <h, c>, dx and dy in the dtype of x: a sweep for each side. Without columns c and h are undefined.
Gradients gradients(const Problem& p, const Tensor& r, const Tensor& c, const Tensor& g, const Tensor& h, const Wanted& wanted);

// Value and gradients of the total form, all in the accumulation dtype.
Total total(const Problem& p, const Tensor& positive, Outer outer, const Wanted& wanted);

// Whether the kernels hold the problem at all: its dtype (float32 as tf32, where torch's setting allows that) and, for the
// gradients, d.
bool holds_rows(const Problem& p, const DeviceFacts& facts);
bool holds_gradients(const Problem& p, const DeviceFacts& facts);

}  // namespace fastcl::cuda::fused
