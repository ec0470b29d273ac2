// declarations.cpp - variables, registers and parameters (PTX ISA "State Spaces, Types, and Variables").
#include <algorithm>
#include "parser.h"

namespace ptx {

struct Parser::Declaration {
    std::string name;
    Space space = Space::Global;
    Type type = Type::None;
    u64 align = 0, count = 1, vec = 1;
    bool external = false, unsized = false;
};

// .global .align 4 .f32 name[10]   .extern .shared .align 16 .b8 name[]
Parser::Declaration Parser::parse_declaration() {
    Declaration v;
    int line = peek().line;
    while (peek().text[0] == '.') {
        std::string d = next().text;
        if (d == ".extern") v.external = true;
        else if (d == ".visible" || d == ".weak" || d == ".common") {
        } else if (d == ".shared") v.space = Space::Shared;
        else if (d == ".local") v.space = Space::Local;
        else if (d == ".const") v.space = Space::Const;
        else if (d == ".global") v.space = Space::Global;
        else if (d == ".align") v.align = strtoull(next().text.c_str(), nullptr, 0);
        else if (d == ".v2") v.vec = 2;
        else if (d == ".v4") v.vec = 4;
        else if (d == ".attribute") {
            skip_past(")");
        } else {
            v.type = type_from_name(d.substr(1));
            if (v.type == Type::None) syntax(line, "unknown directive " + d);
        }
    }
    v.name = next().text;
    while (accept("[")) {
        if (accept("]")) {
            v.unsized = true;
            continue;
        }
        v.count *= strtoull(next().text.c_str(), nullptr, 0);
        expect("]");
    }
    return v;
}

// A declaration, then "= {...}" or nothing, then ";"
void Parser::parse_variable(Builder* b) {
    const int line = peek().line;
    const Declaration v = parse_declaration();
    u64 bytes = v.unsized ? 0 : v.count * v.vec * size_of(v.type);
    const u64 align = v.align ? v.align : size_of(v.type);
    Symbol s{v.space, 0, bytes};
    auto bump = [&](u32& top) {
        top = (u32)((top + align - 1) / align * align);
        s.address = top;
        top += (u32)bytes;
    };
    if (v.space == Space::Shared) {
        if (v.external || v.unsized) s.address = ~0ull;  // dynamic shared memory
        else bump(b ? b->kernel.shared_static : shared_module);
    } else if (v.space == Space::Local) {
        if (!b) syntax(line, ".local at module scope");
        bump(b->kernel.local_bytes);
    } else {
        m.storage.emplace_back(new u8[bytes + align + 16]());
        u8* base = m.storage.back().get();
        s.address = ((u64)base + align - 1) / align * align;
        m.globals.push_back({s.address, bytes});
        if (accept("=")) initialise((u8*)s.address, bytes, size_of(v.type));
    }
    expect(";");
    if (b) b->scopes.back().symbols[v.name] = s;
    else m.symbols[v.name] = s;
}
void Parser::initialise(u8* at, u64 bytes, int size) {
    u64 i = 0;
    auto value = [&] {
        if (!(is("-") || at_number())) syntax(peek().line, "unsupported initialiser " + peek().text);
        Operand o;
        parse_number(o);
        if (o.imm_is_f64 && size == 4) o.imm = as_bits((float)as_f64(o.imm));
        if (i + size > bytes) syntax(peek().line, "too many initialisers");
        memcpy(at + i, &o.imm, size);
        i += size;
    };
    int depth = 0;
    do {
        if (accept("{")) depth++;
        else if (accept("}")) depth--;
        else if (accept(",")) {
        } else value();
    } while (depth);
}

void Parser::parse_registers(Builder& b) {
    Type type = Type::None;
    while (peek().text[0] == '.') {
        Token t = next();
        type = type_from_name(t.text.substr(1));
        if (type == Type::None) syntax(t.line, "register type " + t.text);
    }
    do {
        std::string n = next().text;
        Scope& s = b.scopes.back();
        if (accept("<")) {
            next();
            expect(">");
            s.prefixes[n] = type;
        } else s.regs[n] = type;
    } while (accept(","));
    expect(";");
}

void Parser::parse_params(Kernel& k) {
    if (!accept("(")) return;
    while (!accept(")")) {
        Param a{"", Type::None, 0, 0, 0};
        while (peek().text[0] == '.') {
            std::string d = next().text;
            if (d == ".param" || d == ".ptr" || d == ".global" || d == ".shared" || d == ".const" ||
                d == ".local")
                continue;
            if (d == ".align") {
                a.align = std::max(a.align, (u32)strtoul(next().text.c_str(), nullptr, 0));
                continue;
            }
            a.type = type_from_name(d.substr(1));
            if (a.type == Type::None) syntax(peek().line, "parameter type " + d);
        }
        a.name = next().text;
        a.size = size_of(a.type);
        bool pointer_align = true;  // ".ptr .align 16" describes the pointee, not the parameter
        if (accept("[")) {
            a.size *= strtoul(next().text.c_str(), nullptr, 0);
            expect("]");
            pointer_align = false;
        }
        u32 align = pointer_align || !a.align ? (u32)size_of(a.type) : a.align;
        a.align = align;
        a.offset = (k.param_bytes + align - 1) / align * align;
        k.param_bytes = a.offset + a.size;
        k.params.push_back(a);
        accept(",");
    }
}

}  // namespace ptx
