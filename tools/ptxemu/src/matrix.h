// matrix.h - the tensor-core arithmetic shared by mma.sync and wgmma.
#pragma once
#include "types.h"

namespace ptx {

void matrix_multiply(const float* A, int lda, const float* B, int ldb, float* C, int ldc, int rows, int K,
                     int block, bool nearest);
void unpack_elements(u32 v, Type t, float* out);
int mma_block(int arch, Type t);  // products added before one rounding

}  // namespace ptx
