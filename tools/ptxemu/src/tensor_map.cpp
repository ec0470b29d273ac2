// tensor_map.cpp - what cuTensorMapEncodeTiled accepts (CUDA driver API "Tensor Map Object Management").
#include "tensor_map.h"
#include <cstring>

namespace ptx {

int encode_tensor_map(TensorMap& m, int type, u32 rank, u64 address, const u64* dim, const u64* stride,
                      const u32* box, const u32* step, int interleave, int swizzle, int promotion, int fill) {
    // u8 u16 u32 s32 u64 s64 f16 f32 f64 bf16 f32-ftz tf32 tf32-ftz
    static const u8 sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    if (type < 0 || type > 15 || rank < 1 || rank > 5 || interleave < 0 || interleave > 2 || swizzle < 0 ||
        swizzle > 6 || promotion < 0 || promotion > 3 || fill < 0 || fill > 1)
        return kTensorInvalid;
    if (type > 12 || interleave || swizzle > 3) return kTensorUnsupported;
    const bool integer = type < 6;
    if (address % 16 || (fill && integer)) return kTensorInvalid;
    m = TensorMap{};
    for (u32 k = 0; k < 5; k++) m.dim[k] = m.box[k] = 1;
    m.magic = TensorMap::kMagic;
    m.address = address;
    m.rank = (u8)rank;
    m.type = (u8)type;
    m.swizzle = (u8)swizzle;
    m.nan_fill = (u8)fill;
    m.element = sizes[type];
    m.integer = integer;
    m.stride[0] = m.element;
    for (u32 k = 0; k < rank; k++) {
        if (!dim[k] || dim[k] > 1ull << 32 || !box[k] || box[k] > 256) return kTensorInvalid;
        if (step && !(step[k] >= 1 && step[k] <= 8)) return kTensorInvalid;
        if (step && step[k] != 1) return kTensorUnsupported;
        m.dim[k] = dim[k];
        m.box[k] = (u16)box[k];
        if (!k) continue;
        if (stride[k - 1] % 16 || stride[k - 1] >= 1ull << 40) return kTensorInvalid;
        m.stride[k] = stride[k - 1];
    }
    if (m.row_bytes() % 16) return kTensorInvalid;
    if (swizzle && m.row_bytes() > 16u << swizzle) return kTensorInvalid;
    return kTensorOk;
}

}  // namespace ptx

extern "C" int ptxemu_tensor_map_encode(void* map, int type, unsigned rank, uint64_t address, const uint64_t* dim,
                                        const uint64_t* stride, const uint32_t* box, const uint32_t* step,
                                        int interleave, int swizzle, int promotion, int fill) {
    ptx::TensorMap m;
    const int bad = ptx::encode_tensor_map(m, type, rank, address, (const ptx::u64*)dim, (const ptx::u64*)stride, box, step,
                                           interleave, swizzle, promotion, fill);
    if (!bad) memcpy(map, &m, sizeof m);
    return bad;
}
