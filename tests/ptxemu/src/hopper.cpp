// hopper.cpp - sm_90a: wgmma with shared-memory descriptors, the proxy fences around it, the small change of
// that architecture (griddepcontrol, setmaxnreg), mbarrier objects, and one-dimensional bulk copies into
// shared memory. Tensor maps are not implemented.
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
void load_operand(Warp& w, const Inst& i, u64 desc, Type t, u32 row0, u32 rows, u32 K, bool mn_major,
                  float* out, u32 row_stride, u32 k_stride) {
    Descriptor d(desc);
    SharedMemory& s = w.cta->shared;
    if (d.start & 15) w.fail(FaultKind::Misaligned, "matrix descriptor address");
    const u32 e = t == Type::TF32 ? 1 : 2;
    auto chunk = [&](u32 a, u32* words) {
        s.check(w, i, -1, a, 16, 16);
        s.async_read(w, i, a, 16);
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
void wgmma(Warp& w, const Inst& i, u32) {
    const u32 N = (u32)i.offset, K = i.vec, e = i.type2 == Type::TF32 ? 1 : 2;
    const Type t = i.type2;
    float A[16][16];
    static thread_local std::vector<float> B, C;
    B.assign(K * N, 0);
    C.assign(16 * N, 0);
    if (!i.s.empty()) {
        for (int r = 0; r < 4; r++)
            for (int l = 0; l < 32; l++) {
                float v[2];
                unpack_elements(w.r32(i.s[r])[l], t, v);
                for (u32 k = 0; k < e; k++)
                    A[(l >> 2) + 8 * (r & 1)][(l & 3) * e + 4 * e * (r >> 1) + k] = v[k];
            }
    } else load_operand(w, i, w.r64(i.s0)[0], t, 16 * (w.id % 4), 16, K, i.sub2 & 1, &A[0][0], 16, 1);
    load_operand(w, i, w.r64(i.s1)[0], t, 0, N, K, i.sub2 & 2, B.data(), 1, N);
    for (u64* d = i.s.empty() ? w.r64(i.s0) : w.r64(i.s1); d; d = d == w.r64(i.s1) ? nullptr : w.r64(i.s1))
        for (int l = 1; l < 32; l++)
            if (d[l] != d[0])
                w.fail(FaultKind::Divergence, "the matrix descriptor differs between threads of the warp", l);
    if (i.sub2 & 4)
        for (auto& r : A)
            for (float& x : r) x = -x;
    if (i.sub2 & 8)
        for (float& x : B) x = -x;
    u32 p = w.pred(i.s2);
    if (p != 0 && p != ~0u) w.fail(FaultKind::Divergence, "scale-d differs between threads of the warp");
    auto place = [&](u32 r, int l) -> float& {
        return C[((l >> 2) + 8 * ((r >> 1) & 1)) * N + 8 * (r >> 2) + 2 * (l & 3) + (r & 1)];
    };
    if (p)
        for (u32 r = 0; r < i.d.size(); r++) {
            if (w.cta->launch->options.registers && w.defined[i.d[r] / 4] != ~0u)
                w.fail(FaultKind::UninitializedRegister, "an accumulator was never written");
            u32* v = w.r32(i.d[r]);
            for (int l = 0; l < 32; l++) place(r, l) = as_f32(v[l]);
        }
    int block = std::min<int>((int)K, mma_block(90, t));
    for (u32 n = 0; n < N; n += 8)
        matrix_multiply(&A[0][0], 16, B.data() + n, (int)N, C.data() + n, (int)N, 16, (int)K, block,
                        w.cta->launch->options.rounding_nearest);
    w.busy.resize(w.defined.size(), 0);
    for (u32 r = 0; r < i.d.size(); r++) {
        u32* v = w.r32(i.d[r]);
        for (int l = 0; l < 32; l++) v[l] = as_bits(place(r, l));
        w.busy[i.d[r] / 4] |= 1;
        w.wgmma.push_back({w.wgmma_group, false, i.d[r] / 4, 1});
    }
    for (u32 s : i.s) {
        w.busy[s / 4] |= 2;
        w.wgmma.push_back({w.wgmma_group, false, s / 4, 2});
    }
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
// --- mbarrier (PTX ISA "mbarrier"): the object's state lives beside shared memory; its 8 bytes are checked
// like any others ---
u32 mbarrier_address(Warp& w, const Inst& i, int l) {
    u64 a = (i.flag2 ? (u64)w.r32(i.base)[l] : w.r64(i.base)[l]) + i.offset;
    if ((a & kWindowMask) == kSharedWindow) a &= ~kWindowMask;
    w.cta->shared.check(w, i, l, a, 8, 8);
    return (u32)a;
}
Mbarrier& mbarrier_at(Warp& w, const Inst& i, int l, u32 a) {
    auto it = w.cta->mbarriers.find(a);
    if (it == w.cta->mbarriers.end())
        w.fail(FaultKind::Uninitialized, "no mbarrier has been initialised here", l, true, a);
    w.cta->shared.read(w, i, l, a, 8);  // its initialisation must be ordered before its use
    return it->second;
}
void settle(Cta& c, Mbarrier& m) {
    while (m.pending <= 0 && m.tx == 0) {
        m.phase++;
        m.pending += m.expected;
        m.clock = m.next_clock;
        m.next_clock.clear();
        m.landed.insert(m.landed.end(), m.copies.begin(), m.copies.end());
        m.copies.clear();
        c.events++;
        if (!m.expected) break;
    }
}
void mbarrier_init(Warp& w, const Inst& i, u32 m) {
    for_lanes(m, [&](int l) {
        u32 a = mbarrier_address(w, i, l), n = w.r32(i.s0)[l];
        if (!n) w.fail(FaultKind::Launch, "mbarrier count of 0", l, true, a);
        w.cta->shared.write(w, i, l, a, 8, nullptr);
        Mbarrier b;
        b.expected = n;
        b.pending = n;
        w.cta->mbarriers[a] = b;
    });
}
void mbarrier_inval(Warp& w, const Inst& i, u32 m) {
    for_lanes(m, [&](int l) {
        u32 a = mbarrier_address(w, i, l);
        mbarrier_at(w, i, l, a);
        w.cta->shared.write(w, i, l, a, 8, nullptr);
        w.cta->mbarriers.erase(a);
    });
}
void mbarrier_arrive(
    Warp& w, const Inst& i,
    u32 m) {  // sub: 1 expect_tx, 2 expect_tx without arrival; flag: count in s0; sub2: state to d0
    for_lanes(m, [&](int l) {
        u32 a = mbarrier_address(w, i, l);
        Mbarrier& b = mbarrier_at(w, i, l, a);
        if (i.sub2) w.r64(i.d0)[l] = b.phase;
        w.cta->shared.release_into(w.id, b.next_clock);
        if (i.sub) b.tx += w.r32(i.s0)[l];
        if (i.sub != 2) {
            s64 n = i.flag ? w.r32(i.s0)[l] : 1;
            if (n > b.pending)
                w.fail(FaultKind::Divergence, "more arrivals at an mbarrier than its count", l, true, a);
            b.pending -= n;
        }
        w.cta->events++;
        settle(*w.cta, b);
    });
}
void mbarrier_wait(Warp& w, const Inst& i, u32 m) {  // flag: parity in s0 (32 bits), else state (64 bits)
    u32 done = 0;
    for_lanes(m, [&](int l) {
        Mbarrier& b = mbarrier_at(w, i, l, mbarrier_address(w, i, l));
        bool ready = i.flag ? (b.phase & 1) != (w.r32(i.s0)[l] & 1) : b.phase != w.r64(i.s0)[l];
        if (!ready) return;
        done |= 1u << l;
        w.cta->shared.acquire_from(w.id, b.clock);
        for (auto& c : b.landed) w.cta->shared.complete_bulk(c.first, c.second);
        b.landed.clear();
    });
    u32& p = w.pred(i.d0);
    p = (p & ~m) | done;
    if (!done) w.stalled = true;
}
// cp.async.bulk.shared.global: the bytes are visible to whoever has waited on the mbarrier.
void bulk_copy(Warp& w, const Inst& i,
               u32 m) {  // base: destination, s0: source, s1: size, s2: mbarrier (width in sub)
    for_lanes(m, [&](int l) {
        u64 dst = ((i.flag2 ? (u64)w.r32(i.base)[l] : w.r64(i.base)[l]) + i.offset) & ~kWindowMask,
            src = w.r64(i.s0)[l] + (u64)i.target;
        u32 n = w.r32(i.s1)[l], bar = (u32)(i.sub == 8 ? w.r64(i.s2)[l] & ~kWindowMask : w.r32(i.s2)[l]);
        if (n % 16 || dst % 16 || src % 16)
            w.fail(FaultKind::Misaligned, "cp.async.bulk needs 16-byte aligned addresses and size", l, true,
                   src);
        w.cta->shared.check(w, i, l, dst, n, 16);
        w.cta->shared.check(w, i, l, bar, 8, 8);
        Mbarrier& b = mbarrier_at(w, i, l, bar);
        u64 lines[32];
        for (u32 k = 0; k < n; k += 16) {
            global_block(w, i, l, src + k, 16, 16);
            global_read(w, i, l, src + k, 16);
            w.cta->shared.write(w, i, l, (u32)dst + k, 16, nullptr, kPendingBulk);
            memcpy(w.cta->shared.data() + dst + k, (void*)(src + k), 16);
            lines[0] = src + k;
            count_global(w, 1, lines, 16);
        }
        b.copies.push_back({(u32)dst, n});
        w.cta->shared.release_into(w.id, b.next_clock);
        b.tx -= n;
        settle(*w.cta, b);
    });
}
void proxy_fence(Warp& w, const Inst&, u32) { w.cta->shared.proxy_fence(w.id); }
void nothing(Warp&, const Inst&, u32) {}

}  // namespace

bool decode_hopper(Decoder& d) {
    const std::string& op = d.op();
    Inst& i = d.inst;
    if (op == "wgmma") {
        if (d.take("mma_async")) {
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
            const Operand& acc = d.operand(0);
            for (auto& e : acc.elems) { i.d.push_back(d.dst(e, Type::F32)); }
            if ((int)i.d.size() != N / 2) d.unsupported("accumulator registers");
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
            if (at != Type::TF32) {
                if (!regs && d.immediate(d.operand(k++))) i.sub2 |= 1;
                if (d.immediate(d.operand(k++))) i.sub2 |= 2;
            }
            d.expect(k);
            i.flops = 2ull * 16 * N * K;  // the share of one warp
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
    if (op == "mbarrier") {
        d.b.kernel.named_barriers = true;
        bool no_complete = d.peek("noComplete");
        int kind = d.take_one({"init", "inval", "arrive", "expect_tx", "test_wait", "try_wait"});
        bool tx = kind == 2 && d.take("expect_tx"), parity = d.take("parity");
        if (kind < 0 || no_complete) d.unsupported("mbarrier form");
        d.take("release");
        d.take("acquire");
        d.take("relaxed");
        d.take("cta");
        if (!(d.take("shared") || d.take("shared::cta"))) d.unsupported("mbarrier outside shared::cta");
        if (d.need_type() != Type::B64) d.unsupported("type");
        i.cls = Cls::Sync;
        size_t k = 0;
        if (kind >= 4) {
            i.d0 = d.dst(k++, Type::Pred);
            d.address(d.operand(k++), Space::Shared);
            i.flag = parity;
            i.s0 = parity ? d.src(k, Type::B32) : d.src(k, Type::B64);
            k++;
            if (k < d.count()) d.src(k++, Type::U32);  // time limit of try_wait
            i.flow = Flow::Poll;
            i.run = mbarrier_wait;
        } else {
            if (kind == 2 && d.operand(0).kind != Operand::Address) {
                if (!d.is_sink(d.operand(0))) {
                    i.sub2 = 1;
                    i.d0 = d.dst(0, Type::B64);
                }
                k++;
            }
            d.address(d.operand(k++), Space::Shared);
            i.sub = kind == 3 ? 2 : tx ? 1 : 0;
            if (kind == 0 || i.sub) i.s0 = d.src(k++, Type::U32);
            else if (kind == 2 && k < d.count()) {
                i.flag = true;
                i.s0 = d.src(k++, Type::U32);
            }
            i.run = kind == 0 ? mbarrier_init : kind == 1 ? mbarrier_inval : mbarrier_arrive;
        }
        d.expect(k);
        return true;
    }
    if (op == "cp" && d.peek("bulk")) {
        for (auto x : {"async", "bulk", "shared::cluster", "global", "mbarrier::complete_tx::bytes"})
            if (!d.take(x) && std::string(x) != "shared::cluster") d.unsupported("bulk copy form");
        d.take("shared::cta");
        d.take("L2::cache_hint");
        d.b.kernel.named_barriers = true;
        d.address(d.operand(1), Space::Global);
        if (i.flag2) d.unsupported("32-bit source address");
        i.s0 = i.base;
        i.target = (s32)i.offset;
        d.address(d.operand(3), Space::Shared);
        if (i.offset) d.unsupported("mbarrier displacement");
        i.s2 = i.base;
        i.sub = i.flag2 ? 4 : 8;
        i.s1 = d.src(2, Type::U32);
        d.address(d.operand(0), Space::Shared);
        if (d.count() == 5) d.src(4, Type::B64);
        else d.expect(4);
        i.run = bulk_copy;
        i.cls = Cls::Global;
        return true;
    }
    if (op == "fence" && d.take("mbarrier_init")) {
        d.take("release");
        d.take("cluster");
        i.run = nothing;
        i.cls = Cls::Sync;
        return true;
    }
    if (op == "fence" && d.take("proxy")) {
        if (!d.take("async") && !d.take("async::generic")) {
            if (d.take("alias")) {
                i.run = nothing;
                i.cls = Cls::Sync;
                return true;
            }
            d.unsupported("proxy");
        }
        d.take("shared::cta") || d.take("global") || d.take("shared");
        i.run = proxy_fence;
        i.cls = Cls::Sync;
        return true;
    }
    if (op == "griddepcontrol") {
        if (!d.take("wait") && !d.take("launch_dependents")) d.unsupported("griddepcontrol");
        i.run = nothing;
        i.cls = Cls::Sync;
        return true;
    }
    if (op == "setmaxnreg") {
        if (!(d.take("inc") || d.take("dec")) || !d.take("sync") || !d.take("aligned"))
            d.unsupported("setmaxnreg");
        d.take_type();
        i.run = nothing;
        i.flow = Flow::Aligned;
        i.cls = Cls::Other;
        return true;
    }
    return false;
}

}  // namespace ptx
