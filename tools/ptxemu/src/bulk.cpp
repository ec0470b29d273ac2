// bulk.cpp - copies by the copy engine other than mbarrier.cpp's: boxes of tensor maps in both directions, stores and
// additions from shared memory, bulk groups (PTX ISA "cp.async.bulk.tensor", "cp.reduce.async.bulk", "wait_group").
//
// Data moves when the instruction is issued. What a kernel may not do before the copy has completed is checked: reading
// a loaded box before its mbarrier's phase, writing a stored one before wait_group, ending before that.
#include <algorithm>
#include "cluster.h"
#include "decode.h"
#include "machine.h"
#include "mbarrier.h"
#include "memory_access.h"
#include "tensor_map.h"

namespace ptx {
namespace {

constexpr u32 kUnit = 16;

u64 shared_operand(Warp& w, const Inst& i, int l) {
    return ((i.flag2 ? (u64)w.r32(i.base)[l] : w.r64(i.base)[l]) + (u64)i.offset) & ~kWindowMask;
}

TensorMap tensor_map(Warp& w, const Inst& i, int l) {
    u64 a = w.r64(i.s0)[l] + (u64)i.target;
    TensorMap t;
    if (a & 63) w.fail(FaultKind::Misaligned, "a tensor map is aligned to 64 bytes", l, true, a);
    if (classify(a) == Space::Param) {
        auto& p = w.cta->launch->params;
        if (a + sizeof t > p.size()) w.fail(FaultKind::OutOfBounds, "tensor map beyond the kernel's parameters", l, true, a);
        memcpy(&t, &p[a], sizeof t);
    } else {
        global_read(w, l, a, sizeof t, 64);
        memcpy(&t, (void*)a, sizeof t);
    }
    if (t.magic != TensorMap::kMagic)
        w.fail(FaultKind::Launch, "this is no tensor map: encode it by cuTensorMapEncodeTiled", l, true, a);
    if (t.rank != i.vec)
        w.fail(FaultKind::Launch,
               "the tensor map has " + std::to_string(t.rank) + " dimensions, the instruction " + std::to_string(i.vec), l);
    return t;
}

// One row of a box: its place in shared memory, and the elements that lie inside the tensor.
struct Row {
    u32 shared, first, count;  // bytes: where the row begins; the first that is inside, how many are
    u64 global;                // of the first that is inside
};
template <class F>
void for_rows(Warp& w, const Inst& i, int l, const TensorMap& t, u32 shared, F f) {
    s64 c[5] = {};
    for (u32 k = 0; k < t.rank; k++) c[k] = (s32)w.r32(i.s[k])[l];
    for (u32 row = 0; row < t.rows(); row++) {
        u32 rest = row;
        bool inside = true;
        u64 a = t.address;
        for (u32 k = 1; k < 5; k++) {
            s64 x = c[k] + (s64)(rest % t.box[k]);
            rest /= t.box[k];
            inside &= x >= 0 && (u64)x < t.dim[k];
            a += (u64)x * t.stride[k];
        }
        s64 lo = std::max<s64>(c[0], 0), hi = std::min<s64>(c[0] + t.box[0], (s64)t.dim[0]);
        if (!inside || hi <= lo) lo = hi = c[0];
        f(Row{shared + row * t.row_bytes(), (u32)(lo - c[0]) * t.element, (u32)(hi - lo) * t.element, a + (u64)lo * t.element});
    }
}
// The ranges of shared memory that a box covers.
std::vector<std::pair<u32, u32>> ranges(const TensorMap& t, u32 shared) {
    if (!t.swizzle || t.row_bytes() == kUnit << t.swizzle) return {{shared, t.bytes()}};
    std::vector<std::pair<u32, u32>> out;
    for (u32 k = 0; k < t.bytes(); k += kUnit) out.push_back({t.swizzled(shared + k), kUnit});
    return out;
}
void check_box(Warp& w, Cta& c, int l, const TensorMap& t, u64 a) {
    c.shared.check(w, l, a, t.bytes(), 128);
    for (auto& r : ranges(t, (u32)a)) c.shared.check(w, l, r.first, r.second, kUnit);
}

void count_rows(Warp& w, int l, u64 a, u32 n) {
    u64 at[32];
    for (u32 k = 0; k < n; k += 1024) {
        at[l] = a + k;
        count_global(w, 1u << l, at, std::min<u32>(1024, n - k));
    }
}

// s2: mbarrier, of width sub; s3: with flag, the CTAs that it goes to. What several take is read once.
void tensor_load(Warp& w, const Inst& i, u32 m) {
    for_lanes(m, [&](int l) {
        const TensorMap t = tensor_map(w, i, l);
        u64 dst = shared_operand(w, i, l), bar = i.sub == 8 ? w.r64(i.s2)[l] & ~kWindowMask : w.r32(i.s2)[l];
        const auto to = w.cta->cluster->copied_to(w, l, dst, bar, i.flag, i.flag ? w.r32(i.s3)[l] & 0xffff : 0);
        for (Cta* c : to) {
            check_box(w, *c, l, t, dst);
            mbarrier_at(w, *c, l, bar);
        }
        std::vector<u8> row(t.row_bytes());
        for_rows(w, i, l, t, (u32)dst, [&](const Row& r) {
            for (u32 k = 0; k < row.size(); k++)
                row[k] = !t.nan_fill ? 0 : (k + 1) % t.element ? 0xff : 0x7f;
            if (r.count) {
                global_read(w, l, r.global, r.count, 1);
                memcpy(&row[r.first], (void*)r.global, r.count);
                count_rows(w, l, r.global, r.count);
            }
            for (Cta* c : to)
                for (u32 k = 0; k < row.size(); k += kUnit) {
                    const u32 a = t.swizzled(r.shared + k);
                    c->shared.write(w, l, a, kUnit, nullptr, kPendingBulk);
                    memcpy(c->shared.data() + a, &row[k], kUnit);
                }
        });
        for (Cta* c : to) expect_copy(w, *c, mbarrier_at(w, *c, l, bar), ranges(t, (u32)dst), t.bytes());
    });
}

void hold(Warp& w, int l, std::vector<std::pair<u32, u32>> r) { w.bulk.push_back({w.bulk_group[l], l, std::move(r)}); }

// The copy engine reads n bytes of shared memory; they may be written again after wait_group.
void engine_reads(Warp& w, u32 a, u32 n) { w.cta->shared.async_read(w, a, n); }

template <class T> void add_integer(u8* to, const u8* from) {
    T a, b;
    memcpy(&a, to, sizeof a);
    memcpy(&b, from, sizeof b);
    a = (T)(a + b);
    memcpy(to, &a, sizeof a);
}
float half_value(Type t, u16 bits) { return t == Type::F16 ? half_to_float(bits) : bf16_to_float(bits); }
void add_element(Warp& w, Type t, u8* to, const u8* from) {
    switch (t) {
        case Type::F32: {
            float a, b;
            memcpy(&a, to, 4);
            memcpy(&b, from, 4);
            a += b;
            memcpy(to, &a, 4);
            return;
        }
        case Type::F16:
        case Type::BF16: {
            u16 a, b;
            memcpy(&a, to, 2);
            memcpy(&b, from, 2);
            const float sum = half_value(t, a) + half_value(t, b);
            a = (u16)(t == Type::F16 ? float_to_half(sum) : float_to_bf16(sum));
            memcpy(to, &a, 2);
            return;
        }
        case Type::U32:
        case Type::S32: add_integer<u32>(to, from); return;
        case Type::U64:
        case Type::S64: add_integer<u64>(to, from); return;
        default: w.fail(FaultKind::Unsupported, "type of a bulk reduction");
    }
}
Type element_type(const TensorMap& t) {
    static const Type types[] = {Type::U8,  Type::U16, Type::U32,  Type::S32, Type::U64,  Type::S64, Type::F16,
                                 Type::F32, Type::F64, Type::BF16, Type::F32, Type::TF32, Type::TF32};
    return types[t.type];
}
// n bytes from 'from' to global memory at a: stored, or added element by element.
void deliver(Warp& w, int l, u64 a, const u8* from, u32 n, bool add, Type t) {
    if (!add) {
        global_write(w, l, a, n, 1, from);
        memcpy((void*)a, from, n);
    } else {
        const u32 e = size_of(t);
        global_atomic(w, l, a, n, e);
        for (u32 k = 0; k < n; k += e) add_element(w, t, (u8*)a + k, from + k);
    }
    count_rows(w, l, a, n);
}

void tensor_store(Warp& w, const Inst& i, u32 m) {  // sub2: add
    for_lanes(m, [&](int l) {
        const TensorMap t = tensor_map(w, i, l);
        const u64 src = shared_operand(w, i, l);
        check_box(w, *w.cta, l, t, src);
        std::vector<u8> row(t.row_bytes());
        for_rows(w, i, l, t, (u32)src, [&](const Row& r) {
            for (u32 k = 0; k < row.size(); k += kUnit) {
                const u32 a = t.swizzled(r.shared + k);
                engine_reads(w, a, kUnit);
                memcpy(&row[k], w.cta->shared.data() + a, kUnit);
            }
            if (r.count) deliver(w, l, r.global, &row[r.first], r.count, i.sub2, element_type(t));
        });
        hold(w, l, ranges(t, (u32)src));
    });
}

void bulk_store(Warp& w, const Inst& i, u32 m) {  // s0 + target: destination; s1: bytes; sub2: add, of i.type
    for_lanes(m, [&](int l) {
        const u64 src = shared_operand(w, i, l), dst = w.r64(i.s0)[l] + (u64)i.target;
        const u32 n = w.r32(i.s1)[l];
        if (n % 16 || dst % 16 || src % 16)
            w.fail(FaultKind::Misaligned, "cp.async.bulk needs 16-byte aligned addresses and size", l, true, dst);
        w.cta->shared.check(w, l, src, n, 16);
        engine_reads(w, (u32)src, n);
        deliver(w, l, dst, w.cta->shared.data() + src, n, i.sub2, i.type);
        hold(w, l, {{(u32)src, n}});
    });
}

void bulk_commit(Warp& w, const Inst&, u32 m) {
    for_lanes(m, [&](int l) { w.bulk_group[l]++; });
}
void bulk_wait(Warp& w, const Inst& i, u32 m) {
    auto done = [&](const Warp::BulkStore& b) {
        return m >> b.lane & 1 && b.group + (u64)i.offset < w.bulk_group[b.lane];
    };
    for (auto& b : w.bulk)
        if (done(b))
            for (auto& r : b.ranges) w.cta->shared.async_read_done(r.first, r.second);
    w.bulk.erase(std::remove_if(w.bulk.begin(), w.bulk.end(), done), w.bulk.end());
}

// [map, {coordinates}]
void take_tensor(Decoder& d, const Operand& o) {
    Inst& i = d.inst;
    d.address(o, Space::Generic);
    if (i.flag2) d.unsupported("32-bit tensor map address");
    i.s0 = i.base;
    i.target = (s32)i.offset;
    if (o.elems.size() != 1 || o.elems[0].kind != Operand::Vector || o.elems[0].elems.size() != i.vec)
        d.unsupported("tensor coordinates");
    for (auto& c : o.elems[0].elems) i.s.push_back(d.src(c, Type::B32));
}

void decode_tensor_load(Decoder& d) {
    Inst& i = d.inst;
    if (!(d.take("shared::cluster") || d.take("shared::cta")) || !d.take("global")) d.unsupported("tensor copy form");
    d.take("tile");
    i.flag = d.take("multicast::cluster");
    d.take("L2::cache_hint");
    take_tensor(d, d.operand(1));
    d.address(d.operand(2), Space::Shared);
    if (i.offset) d.unsupported("mbarrier displacement");
    i.s2 = i.base;
    i.sub = i.flag2 ? 4 : 8;
    d.address(d.operand(0), Space::Shared);
    size_t k = 3;
    if (i.flag) i.s3 = d.src(k++, Type::B16);
    if (d.count() == k + 1) d.src(k, Type::B64);
    else d.expect(k);
    i.run = tensor_load;
}

bool take_add(Decoder& d, bool reduce) {
    if (!reduce) return false;
    if (!d.take("add")) d.unsupported("bulk reduction other than add");
    d.b.kernel.order_sensitive = true;
    return true;
}

void decode_store(Decoder& d, bool tensor, bool reduce) {
    Inst& i = d.inst;
    if (!d.take("global") || !d.take("shared::cta") || !d.take("bulk_group")) d.unsupported("bulk store form");
    i.sub2 = take_add(d, reduce);
    d.take("L2::cache_hint");
    size_t k = 2;
    if (tensor) {
        d.take("tile");
        take_tensor(d, d.operand(0));
    } else {
        if (reduce) {
            d.take("noftz");
            i.type = d.need_type();
            if (i.type == Type::F64 || size_of(i.type) < 2) d.unsupported("type of a bulk reduction");
        }
        d.address(d.operand(0), Space::Global);
        if (i.flag2) d.unsupported("32-bit destination address");
        i.s0 = i.base;
        i.target = (s32)i.offset;
        i.s1 = d.src(k++, Type::U32);
    }
    d.address(d.operand(1), Space::Shared);
    if (d.count() == k + 1) d.src(k, Type::B64);
    else d.expect(k);
    i.run = tensor ? tensor_store : bulk_store;
}

bool decode_groups(Decoder& d) {
    Inst& i = d.inst;
    if (d.take("commit_group")) {
        d.expect(0);
        i.run = bulk_commit;
    } else if (d.take("wait_group")) {
        d.take("read");
        d.expect(1);
        i.offset = (s64)d.immediate(d.operand(0));
        i.run = bulk_wait;
    } else return false;
    i.cls = Cls::Sync;
    return true;
}

}  // namespace

bool decode_bulk(Decoder& d) {
    if (d.op() != "cp" || !d.peek("bulk")) return false;
    const bool tensor = d.peek("tensor"), stores = d.peek("bulk_group");
    if (!tensor && !stores && !d.peek("commit_group") && !d.peek("wait_group")) return false;
    Inst& i = d.inst;
    const bool reduce = d.take("reduce");
    d.take("async");
    d.take("bulk");
    if (decode_groups(d)) return true;
    i.cls = Cls::Global;
    if (tensor) {
        d.take("tensor");
        const int rank = d.take_one({"1d", "2d", "3d", "4d", "5d"});
        if (rank < 0) d.unsupported("dimensions of a tensor copy");
        i.vec = (u8)(rank + 1);
    }
    if (d.peek("prefetch")) d.unsupported("modifier");
    d.b.kernel.named_barriers = true;
    if (stores) decode_store(d, tensor, reduce);
    else {
        if (!d.take("mbarrier::complete_tx::bytes")) d.unsupported("tensor copy form");
        decode_tensor_load(d);
    }
    return true;
}

}  // namespace ptx
