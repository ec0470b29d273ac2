// decode.h - from one parsed statement to one Inst. Each family of opcodes has its own decode_* function; a
// modifier that no one took is an error, so that no variant of an instruction is ever executed as if it were
// another one.
#pragma once
#include <functional>
#include <map>
#include <unordered_map>
#include "isa.h"

namespace ptx {

struct Operand {
    enum Kind : u8 { Name, Imm, Vector, Address } kind = Name;
    std::string name;  // register, symbol or label
    u64 imm = 0;
    bool imm_is_f32 = false, imm_is_f64 = false;
    bool negated = false;  // !%p
    s64 offset = 0;        // Address: base name (or imm) + offset
    bool imm_base = false;
    std::vector<Operand> elems;  // Vector; Address: tensor coordinates
    std::vector<Operand> pair;   // second half of a|b
};

struct Statement {
    int line = 0, file = 0, loc = 0;
    std::string guard;
    bool guard_negated = false;
    std::string opcode, text;
    std::vector<Operand> ops;
};

// Names visible while a kernel body is read. Registers get their place in the register file on first use.
struct Scope {
    std::unordered_map<std::string, Type> regs;      // .reg .b32 a, b;
    std::unordered_map<std::string, Type> prefixes;  // .reg .b32 %r<100>;
    std::unordered_map<std::string, Register> placed;
    std::unordered_map<std::string, Symbol> symbols;
    std::unordered_map<std::string, std::string> call_params;  // .param declared in a call sequence
};

struct Builder {
    Module& module;
    Kernel& kernel;
    std::vector<Scope> scopes;
    std::map<std::string, u32> constants, specials;
    std::map<std::string, std::vector<std::string>> branch_tables;
    Register place(Type t);
    const Register* find_register(const std::string& name);
    const Symbol* find_symbol(const std::string& name);
};

class Decoder {
  public:
    Decoder(Builder& b, const Statement& s);
    Builder& b;
    const Statement& st;
    Inst inst;
    const std::string& op() const { return mods_[0]; }

    bool take(const std::string& mod);  // consume a modifier if present
    Type take_type();                   // consume the next type modifier; Type::None if none is left
    Type need_type() {
        Type t = take_type();
        if (t == Type::None) unsupported("missing type");
        return t;
    }
    int take_one(std::initializer_list<const char*> choices, int missing = -1);  // which of these is present
    bool peek(const std::string& mod) const;
    std::vector<std::string> rest() const;  // modifiers nobody took yet
    void finish();                          // all modifiers must have been taken

    size_t count() const { return st.ops.size(); }
    const Operand& operand(size_t i) const {
        if (i >= st.ops.size()) unsupported("missing operand");
        return st.ops[i];
    }
    void expect(size_t n) const {
        if (st.ops.size() != n) unsupported("operand count");
    }
    u32 src(const Operand& o, Type t);  // the register must have exactly the width class of t
    u32 dst(const Operand& o, Type t);
    u32 src(size_t i, Type t) { return src(operand(i), t); }
    u32 dst(size_t i, Type t) { return dst(operand(i), t); }
    Register src_wide(const Operand& o, Type t);  // ld/st/cvt: the register may be wider than t
    Register dst_wide(const Operand& o, Type t);
    bool is_sink(const Operand& o) const { return o.kind == Operand::Name && o.name == "_"; }
    void address(const Operand& o, Space space);  // fills inst.base, inst.offset
    u64 immediate(const Operand& o) const;
    u32 constant(u64 value, int width);
    u32 special(Special s, int width);
    Space take_space();
    [[noreturn]] void unsupported(const std::string& why) const;

  private:
    std::vector<std::string> mods_;
    std::vector<bool> used_;
    Register resolve(const Operand& o, Type t, bool wide, bool write);
};

// A family's opcodes, each with the function that reads its operands and modifiers.
using Family = std::unordered_map<std::string, void (*)(Decoder&)>;
inline bool decode_of(const Family& family, Decoder& d) {
    auto found = family.find(d.op());
    if (found == family.end()) return false;
    found->second(d);
    return true;
}

// The families. Each returns false when the opcode is not its own.
bool decode_arithmetic(Decoder& d);
bool decode_special(Decoder& d);
bool decode_bits(Decoder& d);
bool decode_compare(Decoder& d);
bool decode_moves(Decoder& d);
bool decode_convert(Decoder& d);
bool decode_load_store(Decoder& d);
bool decode_atomics(Decoder& d);
bool decode_spaces(Decoder& d);
bool decode_cp_async(Decoder& d);
bool decode_control(Decoder& d);
bool decode_matrix(Decoder& d);
bool decode_wgmma(Decoder& d);
bool decode_mbarrier(Decoder& d);
bool decode_bulk(Decoder& d);
bool decode_bulk_copy(Decoder& d);
bool decode_cluster(Decoder& d);
bool decode_hopper(Decoder& d);
Inst decode(Builder& b, const Statement& s);

}  // namespace ptx
