// decode.cpp - operand resolution and the dispatch to the opcode families.
#include "decode.h"
#include <algorithm>
#include <cstdlib>

namespace ptx {

static const std::pair<const char*, Type> kTypes[] = {
    {"pred", Type::Pred},    {"b8", Type::B8},     {"b16", Type::B16},     {"b32", Type::B32},
    {"b64", Type::B64},      {"b128", Type::B128}, {"u8", Type::U8},       {"u16", Type::U16},
    {"u32", Type::U32},      {"u64", Type::U64},   {"s8", Type::S8},       {"s16", Type::S16},
    {"s32", Type::S32},      {"s64", Type::S64},   {"f16", Type::F16},     {"bf16", Type::BF16},
    {"f32", Type::F32},      {"f64", Type::F64},   {"f16x2", Type::F16x2}, {"bf16x2", Type::BF16x2},
    {"tf32", Type::TF32},    {"e4m3", Type::E4M3}, {"e5m2", Type::E5M2},   {"e4m3x2", Type::E4M3x2},
    {"e5m2x2", Type::E5M2x2}};

Type type_from_name(const std::string& name) {
    for (auto& [n, t] : kTypes)
        if (name == n) return t;
    return Type::None;
}
const char* type_name(Type t) {
    for (auto& [n, x] : kTypes)
        if (x == t) return n;
    return "none";
}

static int width_of(Type t) { return t == Type::Pred ? 1 : size_of(t) <= 4 ? 4 : size_of(t); }

Register Builder::place(Type t) {
    int w = width_of(t);
    u32 bytes = w == 1 ? 4 : w == 16 ? 512 : w * 32, align = w == 1 ? 4 : 64;
    kernel.register_bytes = (kernel.register_bytes + align - 1) / align * align;
    Register r{t, kernel.register_bytes, w};
    kernel.register_bytes += bytes;
    return r;
}

const Register* Builder::find_register(const std::string& name) {
    for (size_t i = scopes.size(); i--;) {
        Scope& s = scopes[i];
        auto it = s.placed.find(name);
        if (it != s.placed.end()) return &it->second;
        auto r = s.regs.find(name);
        Type t = Type::None;
        if (r != s.regs.end()) t = r->second;
        else {
            size_t k = name.size();
            while (k && isdigit((unsigned char)name[k - 1])) k--;
            if (k < name.size()) {
                auto p = s.prefixes.find(name.substr(0, k));
                if (p != s.prefixes.end()) t = p->second;
            }
        }
        if (t != Type::None) return &(s.placed[name] = place(t));
    }
    return nullptr;
}

const Symbol* Builder::find_symbol(const std::string& name) {
    for (size_t i = scopes.size(); i--;) {
        auto it = scopes[i].symbols.find(name);
        if (it != scopes[i].symbols.end()) return &it->second;
    }
    auto it = module.symbols.find(name);
    return it == module.symbols.end() ? nullptr : &it->second;
}

Decoder::Decoder(Builder& b, const Statement& s) : b(b), st(s) {
    std::string cur;
    for (char c : s.opcode + ".")
        if (c == '.') {
            mods_.push_back(cur);
            cur.clear();
        } else cur += c;
    used_.assign(mods_.size(), false);
    used_[0] = true;
    inst.line = s.line;
    inst.file = s.file;
    inst.loc = s.loc;
    inst.text = s.text;
    inst.opcode = s.opcode;
    if (!s.guard.empty()) {
        Operand o;
        o.name = s.guard;
        inst.guard = (s32)src(o, Type::Pred);
        inst.guard_xor = s.guard_negated ? ~0u : 0;
    }
}

bool Decoder::take(const std::string& m) {
    for (size_t i = 1; i < mods_.size(); i++)
        if (!used_[i] && mods_[i] == m) {
            used_[i] = true;
            return true;
        }
    return false;
}
bool Decoder::peek(const std::string& m) const {
    for (size_t i = 1; i < mods_.size(); i++)
        if (mods_[i] == m) return true;
    return false;
}
int Decoder::take_one(std::initializer_list<const char*> choices, int missing) {
    int i = 0;
    for (auto c : choices) {
        if (take(c)) return i;
        i++;
    }
    return missing;
}
Type Decoder::take_type() {
    for (size_t i = 1; i < mods_.size(); i++)
        if (!used_[i]) {
            Type t = type_from_name(mods_[i]);
            if (t != Type::None) {
                used_[i] = true;
                return t;
            }
        }
    return Type::None;
}
std::vector<std::string> Decoder::rest() const {
    std::vector<std::string> r;
    for (size_t i = 1; i < mods_.size(); i++)
        if (!used_[i]) r.push_back(mods_[i]);
    return r;
}
void Decoder::finish() {
    auto r = rest();
    if (!r.empty()) unsupported("modifier ." + r[0]);
}

void Decoder::unsupported(const std::string& why) const {
    Fault f(FaultKind::Unsupported, "unsupported instruction (" + why + ")");
    f.line = st.line;
    f.text = st.text;
    throw f;
}

u32 Decoder::constant(u64 v, int width) {
    std::string key = std::to_string(v) + "/" + std::to_string(width);
    auto it = b.constants.find(key);
    if (it != b.constants.end()) return it->second;
    Register r = b.place(width == 1 ? Type::Pred : width == 8 ? Type::B64 : Type::B32);
    b.kernel.constants.push_back({r.offset, width, v});
    return b.constants[key] = r.offset;
}
u32 Decoder::special(Special s, int width) {
    std::string key = std::to_string((int)s) + "/" + std::to_string(width);
    auto it = b.specials.find(key);
    if (it != b.specials.end()) return it->second;
    Register r = b.place(width == 8 ? Type::B64 : Type::B32);
    b.kernel.specials.push_back({r.offset, s, width});
    return b.specials[key] = r.offset;
}

static bool special_from_name(const std::string& n, Special& s) {
    static const std::map<std::string, Special> t = {{"%tid.x", Special::TidX},
                                                     {"%tid.y", Special::TidY},
                                                     {"%tid.z", Special::TidZ},
                                                     {"%ntid.x", Special::NtidX},
                                                     {"%ntid.y", Special::NtidY},
                                                     {"%ntid.z", Special::NtidZ},
                                                     {"%ctaid.x", Special::CtaidX},
                                                     {"%ctaid.y", Special::CtaidY},
                                                     {"%ctaid.z", Special::CtaidZ},
                                                     {"%nctaid.x", Special::NctaidX},
                                                     {"%nctaid.y", Special::NctaidY},
                                                     {"%nctaid.z", Special::NctaidZ},
                                                     {"%laneid", Special::LaneId},
                                                     {"%warpid", Special::WarpId},
                                                     {"%nwarpid", Special::NWarpId},
                                                     {"%smid", Special::SmId},
                                                     {"%nsmid", Special::NSmId},
                                                     {"%lanemask_eq", Special::LaneMaskEq},
                                                     {"%lanemask_lt", Special::LaneMaskLt},
                                                     {"%lanemask_le", Special::LaneMaskLe},
                                                     {"%lanemask_gt", Special::LaneMaskGt},
                                                     {"%lanemask_ge", Special::LaneMaskGe},
                                                     {"%dynamic_smem_size", Special::DynSmem},
                                                     {"%total_smem_size", Special::TotalSmem},
                                                     {"%gridid", Special::GridId},
                                                     {"%cluster_ctaid.x", Special::ClusterCtaidX},
                                                     {"%cluster_ctaid.y", Special::ClusterCtaidY},
                                                     {"%cluster_ctaid.z", Special::ClusterCtaidZ},
                                                     {"%cluster_nctaid.x", Special::ClusterNctaidX},
                                                     {"%cluster_nctaid.y", Special::ClusterNctaidY},
                                                     {"%cluster_nctaid.z", Special::ClusterNctaidZ},
                                                     {"%cluster_ctarank", Special::ClusterCtaRank},
                                                     {"%cluster_nctarank", Special::ClusterNctaRank},
                                                     {"%is_explicit_cluster", Special::IsExplicitCluster},
                                                     {"%clusterid.x", Special::ClusterIdX},
                                                     {"%clusterid.y", Special::ClusterIdY},
                                                     {"%clusterid.z", Special::ClusterIdZ},
                                                     {"%nclusterid.x", Special::NclusterIdX},
                                                     {"%nclusterid.y", Special::NclusterIdY},
                                                     {"%nclusterid.z", Special::NclusterIdZ}};
    auto it = t.find(n);
    if (it == t.end()) return false;
    s = it->second;
    return true;
}

// The bits of an immediate as seen by an instruction of type t.
static u64 immediate_bits(const Operand& o, Type t) {
    bool f64 = t == Type::F64;
    if (o.imm_is_f32) return f64 ? as_bits((double)as_f32((u32)o.imm)) : o.imm;
    if (o.imm_is_f64) return f64 || size_of(t) == 8 ? o.imm : as_bits((float)as_f64(o.imm));
    if (t == Type::F32) return as_bits((float)(s64)o.imm);
    if (f64) return as_bits((double)(s64)o.imm);
    return size_of(t) >= 8 ? o.imm : o.imm & ((1ull << (8 * size_of(t))) - 1);
}

Register Decoder::resolve(const Operand& o, Type t, bool wide, bool write) {
    int w = width_of(t);
    if (o.kind == Operand::Imm) {
        if (write) unsupported("immediate destination");
        if (w == 1) return {t, constant(o.imm ? ~0u : 0, 1), 1};
        return {t, constant(immediate_bits(o, t), w), w};
    }
    if (o.kind != Operand::Name) unsupported("operand form");
    if (o.name == "_") {
        if (!write) unsupported("'_' read");
        return b.place(t);
    }
    if (const Register* r = b.find_register(o.name)) {
        if (r->width != w && !(wide && r->width > w && r->width != 16 && w != 1))
            unsupported("operand width of " + o.name);
        u32 slot = r->offset / 4;
        (write ? inst.writes : inst.reads).push_back(slot);
        return *r;
    }
    if (write) unsupported("destination " + o.name);
    Special s;
    if (special_from_name(o.name, s)) return {t, special(s, w), w};
    if (o.name == "WARP_SZ") return {t, constant(32, w), w};
    if (const Symbol* y = b.find_symbol(o.name)) {
        if (w < 4) unsupported("symbol as predicate");
        if (y->space == Space::Shared && y->address == ~0ull) return {t, special(Special::DynBase, w), w};
        return {t, constant(y->address + o.offset, w), w};
    }
    // The address of a kernel parameter in the parameter space: what ld.param takes from a register.
    for (auto& p : b.kernel.params)
        if (p.name == o.name && w == 8) return {t, constant(p.offset + o.offset, w), w};
    unsupported("unknown name " + o.name);
}

u32 Decoder::src(const Operand& o, Type t) {
    if (o.negated) unsupported("negated operand");
    return resolve(o, t, false, false).offset;
}
u32 Decoder::dst(const Operand& o, Type t) { return resolve(o, t, false, true).offset; }
Register Decoder::src_wide(const Operand& o, Type t) { return resolve(o, t, true, false); }
Register Decoder::dst_wide(const Operand& o, Type t) { return resolve(o, t, true, true); }

void Decoder::address(const Operand& o, Space space) {
    if (o.kind != Operand::Address) unsupported("address operand expected");
    inst.space = space;
    inst.offset = o.offset;
    if (o.imm_base) {
        inst.base = constant(o.imm, 8);
        return;
    }
    if (const Register* r = b.find_register(o.name)) {
        inst.reads.push_back(r->offset / 4);
        if (r->width == 8) {
            inst.base = r->offset;
            inst.flag2 = false;
        } else if (r->width == 4) {
            inst.base = r->offset;
            inst.flag2 = true;
        }  // 32-bit address register
        else
            unsupported("address register");
        return;
    }
    const Symbol* y = b.find_symbol(o.name);
    if (!y) unsupported("unknown address " + o.name);
    if (y->space == Space::Shared && y->address == ~0ull) inst.base = special(Special::DynBase, 8);
    else inst.base = constant(y->address, 8);
}

u64 Decoder::immediate(const Operand& o) const {
    if (o.kind != Operand::Imm) unsupported("immediate expected");
    return o.imm;
}

Space Decoder::take_space() {
    if (take("global")) return Space::Global;
    if (take("shared") || take("shared::cta")) return Space::Shared;
    if (take("local")) return Space::Local;
    if (take("param") || take("param::entry")) return Space::Param;
    if (take("const")) return Space::Const;
    return Space::Generic;
}

Inst decode(Builder& b, const Statement& s) {
    Decoder d(b, s);
    d.inst.unread = Unread::Passes;
    const bool in_registers = decode_arithmetic(d) || decode_special(d) || decode_bits(d) || decode_compare(d) ||
                              decode_moves(d) || decode_convert(d);
    if (!in_registers) d.inst.unread = Unread::Refuses;
    if (!(in_registers || decode_load_store(d) || decode_atomics(d) || decode_spaces(d) || decode_cp_async(d) ||
          decode_control(d) || decode_matrix(d) || decode_wgmma(d) || decode_mbarrier(d) || decode_bulk(d) ||
          decode_bulk_copy(d) || decode_cluster(d) || decode_hopper(d)))
        d.unsupported("opcode");
    d.finish();
    return std::move(d.inst);
}

}  // namespace ptx
