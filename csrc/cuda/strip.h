// The strip form: torch's matrix products on tiles in a bounded workspace, and kernels between them. Deterministic.
//
//     dot = x[tile] y[tile]^T   ->  strip_reduce   ->  r, c
//     dot = x[tile] y[tile]^T   ->  strip_weights  ->  W Y, W^T X, W 1, W^T 1
//
// A sum knows its weights at once, and a tile as wide as the matrix knows its rows' normalisers: there value and gradients
// come from one sweep, 3 products of 2 n m d flops instead of 4. With x itself only tiles on and right of the diagonal are
// formed: half of each.
#pragma once

#include "problem.h"

namespace fastcl::cuda::strip {

// r, and c when asked (undefined otherwise), in one sweep.
std::tuple<Tensor, Tensor> rows(const Problem& p);

// The gradients of <g, r> + <h, c>, dx and dy in the dtype of x, in one sweep that forms the dot products again. Without
// columns c and h are undefined.
Gradients gradients(const Problem& p, const Tensor& r, const Tensor& c, const Tensor& g, const Tensor& h, const Wanted& wanted);

// Value and gradients of the total form, all in the accumulation dtype.
Total total(const Problem& p, const Tensor& positive, Outer outer, const Wanted& wanted);

// What a workspace may take: by FASTCL_WORKSPACE_MB, or by the size of the gradients.
int64_t workspace_bytes(const Problem& p);

// out += unit a b in the accumulation dtype, unit being one number, or undefined for 1.
void add_product(Tensor out, const Tensor& a, const Tensor& b, const Tensor& unit);

}  // namespace fastcl::cuda::strip
