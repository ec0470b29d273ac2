// The Hopper form: tiles by wgmma, weights in strips of a bounded workspace, torch's products for the gradients.
//
//     hopper_rows      r and c                                    1 product of 2 n m d flops, half with x itself
//     hopper_weights   the weights of a strip, W 1 and W^T 1      1, and one more for the unit of a float16 sum
//     hopper_sweep     the weights of a strip, and W Y            2, in place of one of torch's: a plain log-sum-exp to d = 256
//     torch.mm         W Y, W^T X                                 2
//
// so that rows and columns take the 4 products that they count, and a sum's total form 3, its value coming with its weights.
#pragma once

#include "../problem.h"

namespace fastcl::cuda::hopper {

// As strip.h and fused_schedule.h have them.
std::tuple<Tensor, Tensor> rows(const Problem& p);
Gradients gradients(const Problem& p, const Tensor& r, const Tensor& c, const Tensor& g, const Tensor& h, const Wanted& wanted);
Total total(const Problem& p, const Tensor& positive, Outer outer, const Wanted& wanted);

// Whether the kernels were built and hold the problem: rows of two bytes, on compute capability 9.0.
bool holds(const Problem& p, const DeviceFacts& facts);

}  // namespace fastcl::cuda::hopper
