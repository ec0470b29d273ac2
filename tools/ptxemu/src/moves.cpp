// moves.cpp - mov in its forms.
#include "alu_dispatch.h"

namespace ptx {
using namespace alu;
namespace {

void pred_mov(Warp& w, const Inst& i, u32 m) {
    u32 v = w.pred(i.s0);
    u32& d = w.pred(i.d0);
    d = (d & ~m) | (v & m);
}
template <class R>
void mov(Warp& w, const Inst& i, u32 m) {
    R *d = w.reg<R>(i.d0), *a = w.reg<R>(i.s0);
    for_lanes(m, [=](int l) { d[l] = a[l]; });
}
// mov.b32 {a,b}, c and its inverse; widths in inst.sub (element) and inst.sub2 (whole), in bytes.
void unpack(Warp& w, const Inst& i, u32 m) {
    for_lanes(m, [&](int l) {
        u64 v = i.sub2 == 8 ? w.r64(i.s0)[l] : w.r32(i.s0)[l];
        for (size_t k = 0; k < i.d.size(); k++)
            if (i.d[k] != ~0u) {
                u64 e = v >> (8 * i.sub * k);
                if (i.sub == 8) w.r64(i.d[k])[l] = e;
                else w.r32(i.d[k])[l] = (u32)(e & (i.sub == 4 ? 0xffffffffull : (1ull << (8 * i.sub)) - 1));
            }
    });
}
void pack(Warp& w, const Inst& i, u32 m) {
    for_lanes(m, [&](int l) {
        u64 v = 0;
        for (size_t k = 0; k < i.s.size(); k++) {
            u64 e = w.r32(i.s[k])[l];
            if (i.sub < 4) e &= (1ull << (8 * i.sub)) - 1;
            v |= e << (8 * i.sub * k);
        }
        if (i.sub2 == 8) w.r64(i.d0)[l] = v;
        else w.r32(i.d0)[l] = (u32)v;
    });
}
void clock_read(Warp& w, const Inst& i,
                u32 m) {  // %clock and friends: the number of instructions executed, monotone
    u64 t = w.cta->counters->instructions;
    for_lanes(m, [&](int l) {
        if (i.sub == 8) w.r64(i.d0)[l] = t;
        else w.r32(i.d0)[l] = (u32)t;
    });
}

}  // namespace

bool decode_moves(Decoder& d) {
    const std::string& op = d.op();
    Inst& i = d.inst;

    if (op == "mov") {
        Type t = d.need_type();
        d.expect(2);
        const Operand &to = d.operand(0), &from = d.operand(1);
        i.type = t;
        i.sub2 = (u8)size_of(t);
        if (t == Type::Pred) {
            i.d0 = d.dst(to, t);
            i.s0 = d.src(from, t);
            finish(d, pred_mov, Cls::Int);
            return true;
        }
        if (t == Type::B128) d.unsupported("mov.b128");
        auto element = [&](size_t n) {
            int e = size_of(t) / (int)n;
            if (e < 1 || e * (int)n != size_of(t)) d.unsupported("vector size");
            i.sub = (u8)e;
            return e == 1 ? Type::B8 : e == 2 ? Type::B16 : e == 4 ? Type::B32 : Type::B64;
        };
        if (to.kind == Operand::Vector) {
            Type e = element(to.elems.size());
            for (auto& o : to.elems) i.d.push_back(d.is_sink(o) ? ~0u : d.dst(o, e));
            i.s0 = d.src(from, t);
            finish(d, unpack, Cls::Int);
        } else if (from.kind == Operand::Vector) {
            Type e = element(from.elems.size());
            for (auto& o : from.elems) i.s.push_back(d.src(o, e));
            i.d0 = d.dst(to, t);
            finish(d, pack, Cls::Int);
        } else if (from.name == "%clock" || from.name == "%clock_hi" || from.name == "%clock64" ||
                   from.name == "%globaltimer" || from.name == "%globaltimer_lo") {
            i.d0 = d.dst(to, t);
            i.sub = (u8)size_of(t);
            finish(d, clock_read, Cls::Other);
        } else {
            i.d0 = d.dst(to, t);
            i.s0 = d.src(from, t);
            finish(d, size_of(t) == 8 ? &mov<u64> : &mov<u32>, Cls::Int);
        }
        return true;
    }
    return false;
}

}  // namespace ptx
