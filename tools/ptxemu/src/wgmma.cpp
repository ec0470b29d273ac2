// wgmma.cpp - sm_90a's matrix instruction with shared-memory descriptors.
//
// wgmma.mma_async (PTX ISA "Asynchronous warpgroup level matrix instructions"): a warpgroup is four warps;
// warp k of it owns rows 16k..16k+15 of the 64 x N result, in the accumulator layout of mma.m16n8: register i
// of D is element (lane/4 + 8*((i/2)%2), 8*(i/4) + 2*(lane%4) + i%2). Each warp computes its own rows when
// the instruction is issued; until wgmma.wait_group the registers may not be touched and the shared memory it
// reads may not be written, both are checked.
#include <algorithm>
#include "decode.h"
#include "machine.h"
#include "matrix.h"

namespace ptx {

void Warp::check_wgmma(const Inst& i) const {
    if (i.sub == 255 && i.flow == Flow::Aligned) return;  // wgmma instructions manage their own operands
    auto hit = [&](u32 slot, u8 kinds) { return slot < busy.size() && (busy[slot] & kinds); };
    for (u32 s : i.reads)
        if (hit(s, 1))
            fail(FaultKind::MissingWait, "an accumulator register of wgmma is read before wgmma.wait_group");
    for (u32 s : i.writes)
        if (hit(s, 3))
            fail(FaultKind::MissingWait,
                 "a register of a wgmma in flight is written before wgmma.wait_group");
}

namespace {

// Matrix descriptor (PTX ISA "Matrix-descriptor format"): address, leading and stride byte offsets in units
// of 16 bytes, swizzle.
struct Descriptor {
    u32 start, leading, stride, width, mask;  // width: bytes of a swizzled row
    explicit Descriptor(u64 d) {
        start = (u32)(d & 0x3fff) << 4;
        leading = (u32)(d >> 16 & 0x3fff) << 4;
        stride = (u32)(d >> 32 & 0x3fff) << 4;
        static const u32 widths[] = {16, 128, 64, 32}, masks[] = {0, 7, 3, 1};
        width = widths[d >> 62];
        mask = masks[d >> 62];
    }
    // Address of the 16-byte chunk that holds bytes [16c, 16c+16) of row r (K-major), or elements [8c, 8c+8)
    // of row k (MN-major).
    u32 k_major(u32 row, u32 c) const {
        u32 a = start + (row / 8) * stride + (row % 8) * width + (width == 16 ? c * leading : c * 16);
        return swizzle(a);
    }
    u32 mn_major(u32 c, u32 k) const {  // 16-bit elements only
        u32 per = width / 16;
        u32 a = width == 16
                    ? start + c * stride + (k % 8) * 16 + (k / 8) * leading
                    : start + (c / per) * leading + (c % per) * 16 + (k % 8) * width + (k / 8) * stride;
        return swizzle(a);
    }
    u32 swizzle(u32 a) const { return a ^ (a >> 7 & mask) << 4; }
};

// Reads 'rows' rows of K elements starting at row0 into out[row * ld + k] (or out[k * ld + row] if
// by_column).
void load_operand(Warp& w, u64 desc, Type t, u32 row0, u32 rows, u32 K, bool mn_major, float* out,
                  u32 row_stride, u32 k_stride) {
    Descriptor d(desc);
    SharedMemory& s = w.cta->shared;
    if (d.start & 15) w.fail(FaultKind::Misaligned, "matrix descriptor address");
    const u32 e = t == Type::TF32 ? 1 : 2;
    auto chunk = [&](u32 a, u32* words) {
        s.check(w, -1, a, 16, 16);
        s.async_read(w, a, 16);
        w.wgmma.push_back({w.wgmma_group, true, a, 16});
        memcpy(words, s.data() + a, 16);
    };
    u32 words[4];
    if (!mn_major) {
        u32 per = 4 * e;  // elements of a chunk
        for (u32 r = 0; r < rows; r++)
            for (u32 c = 0; c < K / per; c++) {
                chunk(d.k_major(row0 + r, c), words);
                for (u32 j = 0; j < 4; j++) {
                    float v[2];
                    unpack_elements(words[j], t, v);
                    for (u32 k = 0; k < e; k++) out[r * row_stride + (c * per + j * e + k) * k_stride] = v[k];
                }
            }
    } else {
        for (u32 c = 0; c < rows / 8; c++)
            for (u32 k = 0; k < K; k++) {
                chunk(d.mn_major(row0 / 8 + c, k), words);
                for (u32 j = 0; j < 4; j++) {
                    float v[2];
                    unpack_elements(words[j], t, v);
                    for (u32 x = 0; x < 2; x++) out[(c * 8 + j * 2 + x) * row_stride + k * k_stride] = v[x];
                }
            }
    }
}

// inst: d accumulators, s: A registers (4) or s0: A descriptor; s1: B descriptor; s2: scale-d predicate;
// offset: N; sub2: bit 0/1 transpose A/B, bit 2/3 negate A/B; vec: K.

// The 16 rows of A that this warp owns.
void load_a(Warp& w, const Inst& i, float (*A)[16]) {
    const u32 K = i.vec, e = i.type2 == Type::TF32 ? 1 : 2;
    if (i.s.empty()) {
        load_operand(w, w.r64(i.s0)[0], i.type2, 16 * (w.id % 4), 16, K, i.sub2 & 1, A[0], 16, 1);
        return;
    }
    for (int r = 0; r < 4; r++)
        for (int l = 0; l < 32; l++) {
            float v[2];
            unpack_elements(w.r32(i.s[r])[l], i.type2, v);
            for (u32 k = 0; k < e; k++) A[(l >> 2) + 8 * (r & 1)][(l & 3) * e + 4 * e * (r >> 1) + k] = v[k];
        }
}

void check_uniform(Warp& w, const Inst& i) {
    for (u32 s : {i.s.empty() ? i.s0 : i.s1, i.s1}) {
        const u64* d = w.r64(s);
        for (int l = 1; l < 32; l++)
            if (d[l] != d[0])
                w.fail(FaultKind::Divergence, "the matrix descriptor differs between threads of the warp", l);
    }
    u32 p = w.pred(i.s2);
    if (p != 0 && p != ~0u) w.fail(FaultKind::Divergence, "scale-d differs between threads of the warp");
}

// Accumulator register r of lane l in the 16 x N rows of C.
inline float& accumulator(std::vector<float>& C, u32 N, u32 r, int l) {
    return C[((l >> 2) + 8 * ((r >> 1) & 1)) * N + 8 * (r >> 2) + 2 * (l & 3) + (r & 1)];
}

void mark_in_flight(Warp& w, const Inst& i) {
    w.busy.resize(w.defined.size(), 0);
    for (u32 d : i.d) {
        w.busy[d / 4] |= 1;
        w.wgmma.push_back({w.wgmma_group, false, d / 4, 1});
    }
    for (u32 s : i.s) {
        w.busy[s / 4] |= 2;
        w.wgmma.push_back({w.wgmma_group, false, s / 4, 2});
    }
}

void wgmma(Warp& w, const Inst& i, u32) {
    const u32 N = (u32)i.offset, K = i.vec;
    float A[16][16];
    static thread_local std::vector<float> B, C;
    B.assign(K * N, 0);
    C.assign(16 * N, 0);
    load_a(w, i, A);
    load_operand(w, w.r64(i.s1)[0], i.type2, 0, N, K, i.sub2 & 2, B.data(), 1, N);
    check_uniform(w, i);
    if (i.sub2 & 4)
        for (auto& r : A)
            for (float& x : r) x = -x;
    if (i.sub2 & 8)
        for (float& x : B) x = -x;
    if (w.pred(i.s2))
        for (u32 r = 0; r < i.d.size(); r++) {
            if (w.cta->launch->options.registers && w.defined[i.d[r] / 4] != ~0u)
                w.fail(FaultKind::UninitializedRegister, "an accumulator was never written");
            u32* v = w.r32(i.d[r]);
            for (int l = 0; l < 32; l++) accumulator(C, N, r, l) = as_f32(v[l]);
        }
    int block = std::min<int>((int)K, mma_block(90, i.type2));
    for (u32 n = 0; n < N; n += 8)
        matrix_multiply(&A[0][0], 16, B.data() + n, (int)N, C.data() + n, (int)N, 16, (int)K, block,
                        w.cta->launch->options.rounding_nearest);
    for (u32 r = 0; r < i.d.size(); r++) {
        u32* v = w.r32(i.d[r]);
        for (int l = 0; l < 32; l++) v[l] = as_bits(accumulator(C, N, r, l));
    }
    mark_in_flight(w, i);
}
void wgmma_fence(Warp&, const Inst&, u32) {}
void wgmma_commit(Warp& w, const Inst&, u32) { w.wgmma_group++; }
void wgmma_wait(Warp& w, const Inst& i, u32) {
    auto done = [&](const Warp::InFlight& f) { return f.group + (u64)i.offset < w.wgmma_group; };
    for (auto& f : w.wgmma)
        if (done(f)) {
            if (f.shared) w.cta->shared.async_read_done(f.where, f.bytes);
            else w.busy[f.where] = 0;
        }
    w.wgmma.erase(std::remove_if(w.wgmma.begin(), w.wgmma.end(), done), w.wgmma.end());
    for (auto& f : w.wgmma)
        if (!f.shared) w.busy[f.where] |= (u8)f.bytes;
}

// Shape and types: 64 x N x K in f32 from f16, bf16 or tf32.
void take_shape(Decoder& d) {
    Inst& i = d.inst;
    if (!d.take("sync") || !d.take("aligned")) d.unsupported("wgmma form");
    std::string shape = d.rest().empty() ? "" : d.rest()[0];
    int M = 0, N = 0, K = 0;
    if (sscanf(shape.c_str(), "m%dn%dk%d", &M, &N, &K) != 3 || M != 64 || N % 8 || N < 8 || N > 256)
        d.unsupported("wgmma shape");
    d.take(shape);
    Type dt = d.need_type(), at = d.need_type();
    auto left = d.rest();
    if (left.size() != 1 || left[0] != type_name(at) || dt != Type::F32)
        d.unsupported("wgmma type combination");
    d.take(left[0]);
    if (!((at == Type::F16 || at == Type::BF16) && K == 16) && !(at == Type::TF32 && K == 8))
        d.unsupported("wgmma type combination");
    i.type = dt;
    i.type2 = at;
    i.offset = N;
    i.vec = (u8)K;
    i.sub = 255;
}

// Accumulators, A (registers or a descriptor), B, scale-d, then the immediates that negate and transpose.
void take_operands(Decoder& d) {
    Inst& i = d.inst;
    const Operand& acc = d.operand(0);
    for (auto& e : acc.elems) { i.d.push_back(d.dst(e, Type::F32)); }
    if ((int)i.d.size() != i.offset / 2) d.unsupported("accumulator registers");
    const Operand& a = d.operand(1);
    bool regs = a.kind == Operand::Vector;
    if (regs) {
        for (auto& e : a.elems) i.s.push_back(d.src(e, Type::B32));
        if (i.s.size() != 4) d.unsupported("A registers");
    } else i.s0 = d.src(a, Type::B64);
    i.s1 = d.src(2, Type::B64);
    i.s2 = d.src(3, Type::Pred);
    size_t k = 4;
    for (u8 bit : {(u8)4, (u8)8}) {
        u64 v = d.immediate(d.operand(k++));
        if (v != 1 && v != ~0ull && v != 0xffffffffull) d.unsupported("imm-scale");
        if (v != 1) i.sub2 |= bit;
    }
    if (i.type2 != Type::TF32) {
        if (!regs && d.immediate(d.operand(k++))) i.sub2 |= 1;
        if (d.immediate(d.operand(k++))) i.sub2 |= 2;
    }
    d.expect(k);
}

}  // namespace

bool decode_wgmma(Decoder& d) {
    if (d.op() != "wgmma") return false;
    Inst& i = d.inst;
    if (d.take("mma_async")) {
        take_shape(d);
        take_operands(d);
        i.flops = 2ull * 16 * i.offset * i.vec;  // the share of one warp
        i.run = wgmma;
        i.flow = Flow::Aligned;
        i.cls = Cls::Tensor;
        return true;
    }
    int kind = d.take_one({"fence", "commit_group", "wait_group"});
    if (kind < 0 || !d.take("sync") || !d.take("aligned")) d.unsupported("wgmma form");
    if (kind == 2) {
        d.expect(1);
        i.offset = (s64)d.immediate(d.operand(0));
    }
    i.run = kind == 0 ? wgmma_fence : kind == 1 ? wgmma_commit : wgmma_wait;
    i.flow = Flow::Aligned;
    i.cls = Cls::Sync;
    i.sub = 255;
    return true;
}

}  // namespace ptx
