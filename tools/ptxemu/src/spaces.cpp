// spaces.cpp - cvta and isspacep, and what this model of memory need not do: prefetches, cache policies, fences
// (a kernel that has fences orders its CTAs: see global_races.cpp).
#include "cluster.h"
#include "memory_access.h"

namespace ptx {
namespace {

void cvta(Warp& w, const Inst& i, u32 m) {  // sub: window tag in the top byte; flag: .to; sub2: widths
    u64 window = (u64)i.sub << 56;
    for_lanes(m, [&](int l) {
        u64 a = (i.sub2 & 15) == 8 ? w.r64(i.s0)[l] : w.r32(i.s0)[l];
        a = i.flag ? (window ? a & ~kWindowMask : a) : a | window;
        if (i.sub2 >> 4 == 8) w.r64(i.d0)[l] = a;
        else w.r32(i.d0)[l] = (u32)a;
    });
}
void isspacep(Warp& w, const Inst& i, u32 m) {
    u32 r = 0;
    for_lanes(m, [&](int l) {
        u64 a = w.r64(i.s0)[l];
        r |= (u32)(classify(a) == i.space) << l;
    });
    u32& d = w.pred(i.d0);
    d = (d & ~m) | r;
}

void decode_cvta(Decoder& d) {
    Inst& i = d.inst;
    i.flag = d.take("to");
    Space s = d.take_space();
    Type t = d.need_type();
    d.expect(2);
    Register dr = d.dst_wide(d.operand(0), t), sr = d.src_wide(d.operand(1), t);
    i.d0 = dr.offset;
    i.s0 = sr.offset;
    i.sub2 = (u8)(sr.width | dr.width << 4);
    i.sub = s == Space::Shared ? 1 : s == Space::Local ? 2 : s == Space::Param ? 3 : 0;
    if (s == Space::Generic) d.unsupported("cvta space");
    if (size_of(t) != 8) d.unsupported("32-bit cvta");
    i.run = cvta;
    i.cls = Cls::Int;
}

void decode_isspacep(Decoder& d) {
    Inst& i = d.inst;
    i.space = d.take_space();
    if (i.space == Space::Const) d.unsupported("isspacep.const");
    d.expect(2);
    i.d0 = d.dst(0, Type::Pred);
    i.s0 = d.src(1, Type::B64);
    i.run = isspacep;
    i.cls = Cls::Int;
}

void decode_prefetch(Decoder& d) {
    if (d.op() == "discard") d.unsupported("modifier");
    d.take("tensormap");
    d.take_space();
    take_cache_hints(d);
    for (auto level : {"L1", "L2", "L2::evict_normal"}) d.take(level);
    d.inst.run = nothing;
}

void decode_createpolicy(Decoder& d) {
    for (auto& r : d.rest()) d.take(r);
    d.inst.d0 = d.dst(0, Type::B64);
    d.inst.run = [](Warp& w, const Inst& i, u32 m) { for_lanes(m, [&](int l) { w.r64(i.d0)[l] = 0; }); };
}

void decode_fence(Decoder& d) {
    bool local = d.take("cta");
    for (auto order : {"sc", "acq_rel", "acquire", "release"}) d.take(order);
    if (d.take("gl") || d.take("gpu") || d.take("sys") || d.take("cluster") || !local)
        d.b.kernel.gpu_fences = true;
    d.inst.run = local ? nothing : fence_cluster;
    d.inst.cls = Cls::Sync;
}

}  // namespace

bool decode_spaces(Decoder& d) {
    const std::string& op = d.op();
    if (op == "cvta") decode_cvta(d);
    else if (op == "isspacep") decode_isspacep(d);
    else if (op == "prefetch" || op == "prefetchu" || op == "applypriority" || op == "discard") decode_prefetch(d);
    else if (op == "createpolicy") decode_createpolicy(d);
    // The proxy fences and that of mbarrier.init are hopper.cpp's.
    else if ((op == "membar" || op == "fence") && !d.peek("proxy") && !d.peek("mbarrier_init")) decode_fence(d);
    else return false;
    return true;
}

}  // namespace ptx
