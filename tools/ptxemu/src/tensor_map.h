// tensor_map.h - a tensor map (CUtensorMap) as this machine holds it: the driver's 128 bytes are opaque, these are not.
#pragma once
#include "types.h"

namespace ptx {

struct TensorMap {
    static constexpr u64 kMagic = 0x70616d5f65747470ull;
    u64 magic, address;
    u64 dim[5], stride[5];  // elements; bytes, stride[0] being an element's
    u16 box[5];
    u8 rank, type, swizzle, nan_fill, element, integer, pad[10];
    u32 row_bytes() const { return (u32)box[0] * element; }
    u32 rows() const { return (u32)box[1] * box[2] * box[3] * box[4]; }
    u32 bytes() const { return row_bytes() * rows(); }
    // The 16-byte unit at a lies elsewhere: address bits 4 to 6, combined with bits 7 to 9 (PTX ISA "Swizzling Modes").
    u32 swizzled(u32 a) const {
        static const u32 masks[] = {0, 1, 3, 7};
        return a ^ (a >> 7 & masks[swizzle]) << 4;
    }
};
static_assert(sizeof(TensorMap) == 128, "as large as the driver's");

enum : int { kTensorOk = 0, kTensorInvalid = 1, kTensorUnsupported = 801 };  // CUresult

// cuTensorMapEncodeTiled, with its conditions.
int encode_tensor_map(TensorMap& m, int type, u32 rank, u64 address, const u64* dim, const u64* stride,
                      const u32* box, const u32* step, int interleave, int swizzle, int promotion, int fill);

}  // namespace ptx
