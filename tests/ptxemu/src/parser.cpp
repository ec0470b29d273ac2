// parser.cpp - PTX text to Module: lexer, directives, and statements handed to decode(). PTX ISA "Syntax" and
// "Directives".
#include <algorithm>
#include <cctype>
#include "decode.h"

namespace ptx {
namespace {

struct Token {
    std::string text;
    int line;
    size_t begin, end;
    bool string = false;
};

[[noreturn]] void syntax(int line, const std::string& what) {
    Fault f(FaultKind::Syntax, what);
    f.line = line;
    throw f;
}

std::vector<Token> tokenize(const std::string& t) {
    std::vector<Token> out;
    int line = 1;
    auto word = [](char c) {
        return isalnum((unsigned char)c) || c == '_' || c == '.' || c == '$' || c == '%';
    };
    for (size_t i = 0; i < t.size();) {
        char c = t[i];
        if (c == '\n') {
            line++;
            i++;
        } else if (isspace((unsigned char)c) || c == '\0') i++;
        else if (t.compare(i, 2, "//") == 0) {
            while (i < t.size() && t[i] != '\n') i++;
        } else if (t.compare(i, 2, "/*") == 0) {
            size_t e = t.find("*/", i);
            if (e == std::string::npos) syntax(line, "unterminated comment");
            line += std::count(t.begin() + i, t.begin() + e, '\n');
            i = e + 2;
        } else if (c == '"') {
            size_t e = i + 1;
            while (e < t.size() && t[e] != '"') e += t[e] == '\\' ? 2 : 1;
            out.push_back({t.substr(i + 1, e - i - 1), line, i, e + 1, true});
            i = e + 1;
        } else if (word(c)) {
            size_t e = i;
            while (e < t.size() &&
                   (word(t[e]) || (t.compare(e, 2, "::") == 0 && e + 2 < t.size() && word(t[e + 2]))))
                e += t[e] == ':' ? 2 : 1;
            if (c == '.') e = std::min(e, t.find('.', i + 1));  // ".reg.b32" is two directives
            out.push_back({t.substr(i, e - i), line, i, e});
            i = e;
        } else {
            out.push_back({std::string(1, c), line, i, i + 1});
            i++;
        }
    }
    return out;
}

struct Parser {
    const std::string& text;
    Module& m;
    std::vector<Token> tok;
    size_t p = 0;
    int file = 0, loc = 0;
    u32 shared_module = 0;

    Parser(const std::string& t, Module& m) : text(t), m(m), tok(tokenize(t)) {}
    bool done() const { return p >= tok.size(); }
    const Token& peek(size_t k = 0) const {
        static Token end{"", 0, 0, 0};
        return p + k < tok.size() ? tok[p + k] : end;
    }
    bool is(const char* s, size_t k = 0) const { return peek(k).text == s && !peek(k).string; }
    Token next() {
        if (done()) syntax(tok.empty() ? 0 : tok.back().line, "unexpected end of file");
        return tok[p++];
    }
    bool accept(const char* s) {
        if (is(s)) {
            p++;
            return true;
        }
        return false;
    }
    void expect(const char* s) {
        if (!accept(s)) syntax(peek().line, std::string("expected '") + s + "' before '" + peek().text + "'");
    }
    void skip_line() {
        int l = peek().line;
        while (!done() && peek().line == l) p++;
    }
    void skip_braces() {
        int depth = 0;
        do {
            Token t = next();
            if (t.text == "{") depth++;
            else if (t.text == "}") depth--;
        } while (depth);
    }

    static bool number(const std::string& w) { return !w.empty() && isdigit((unsigned char)w[0]); }
    void parse_number(Operand& o) {
        bool neg = accept("-");
        Token t = next();
        std::string w = t.text;
        o.kind = Operand::Imm;
        if (w.size() > 2 && w[0] == '0' && (w[1] == 'f' || w[1] == 'F')) {
            o.imm = strtoul(w.c_str() + 2, nullptr, 16);
            o.imm_is_f32 = true;
            if (neg) o.imm ^= 1u << 31;
            return;
        }
        if (w.size() > 2 && w[0] == '0' && (w[1] == 'd' || w[1] == 'D')) {
            o.imm = strtoull(w.c_str() + 2, nullptr, 16);
            o.imm_is_f64 = true;
            if (neg) o.imm ^= 1ull << 63;
            return;
        }
        if (w.find('.') != std::string::npos) {
            o.imm = as_bits(strtod(w.c_str(), nullptr));
            o.imm_is_f64 = true;
            if (neg) o.imm ^= 1ull << 63;
            return;
        }
        while (!w.empty() && (w.back() == 'U' || w.back() == 'u')) w.pop_back();
        char* e;
        bool binary = w.size() > 2 && w[0] == '0' && (w[1] == 'b' || w[1] == 'B');
        o.imm = binary ? strtoull(w.c_str() + 2, &e, 2) : strtoull(w.c_str(), &e, 0);
        if (*e) syntax(t.line, "bad number " + w);
        if (neg) o.imm = 0 - o.imm;
    }
    s64 parse_displacement() {
        s64 v = 0;
        while (is("+") || is("-")) {
            bool neg = next().text == "-";
            Operand o;
            parse_number(o);
            v += neg ? -(s64)o.imm : (s64)o.imm;
        }
        return v;
    }
    Operand parse_operand() {
        Operand o;
        if (accept("{")) {
            o.kind = Operand::Vector;
            while (!accept("}")) {
                o.elems.push_back(parse_operand());
                accept(",");
            }
            return o;
        }
        if (accept("(")) {  // call parameter list
            o.kind = Operand::Vector;
            while (!accept(")")) {
                o.elems.push_back(parse_operand());
                accept(",");
            }
            return o;
        }
        if (accept("[")) {
            o.kind = Operand::Address;
            if (number(peek().text)) {
                Operand n;
                parse_number(n);
                o.imm = n.imm;
                o.imm_base = true;
            } else o.name = next().text;
            o.offset = parse_displacement();
            while (accept(",")) o.elems.push_back(parse_operand());
            expect("]");
            return o;
        }
        if (accept("!")) {
            o = parse_operand();
            o.negated = true;
            return o;
        }
        if (is("-") || number(peek().text)) {
            parse_number(o);
            return o;
        }
        o.name = next().text;
        if (is("+") || is("-")) o.offset = parse_displacement();  // symbol+offset
        if (accept("|")) o.pair.push_back(parse_operand());
        return o;
    }

    // .global .align 4 .f32 name[10] = {...};   .extern .shared .align 16 .b8 name[];
    void parse_variable(Builder* b) {
        bool external = false;
        Space space = Space::Global;
        u64 align = 0, count = 1, vec = 1;
        Type type = Type::None;
        int line = peek().line;
        while (peek().text[0] == '.') {
            std::string d = next().text;
            if (d == ".extern") external = true;
            else if (d == ".visible" || d == ".weak" || d == ".common") {
            } else if (d == ".shared") space = Space::Shared;
            else if (d == ".local") space = Space::Local;
            else if (d == ".const") space = Space::Const;
            else if (d == ".global") space = Space::Global;
            else if (d == ".align") align = strtoull(next().text.c_str(), nullptr, 0);
            else if (d == ".v2") vec = 2;
            else if (d == ".v4") vec = 4;
            else if (d == ".attribute") {
                expect("(");
                while (!accept(")")) p++;
            } else {
                type = type_from_name(d.substr(1));
                if (type == Type::None) syntax(line, "unknown directive " + d);
            }
        }
        std::string name = next().text;
        bool unsized = false;
        while (accept("[")) {
            if (accept("]")) {
                unsized = true;
                continue;
            }
            count *= strtoull(next().text.c_str(), nullptr, 0);
            expect("]");
        }
        u64 bytes = unsized ? 0 : count * vec * size_of(type);
        if (!align) align = size_of(type);
        Symbol s{space, 0, bytes};
        auto bump = [&](u32& top) {
            top = (u32)((top + align - 1) / align * align);
            s.address = top;
            top += (u32)bytes;
        };
        if (space == Space::Shared) {
            if (external || unsized) s.address = ~0ull;  // dynamic shared memory
            else bump(b ? b->kernel.shared_static : shared_module);
        } else if (space == Space::Local) {
            if (!b) syntax(line, ".local at module scope");
            bump(b->kernel.local_bytes);
        } else {
            m.storage.emplace_back(new u8[bytes + align + 16]());
            u8* base = m.storage.back().get();
            s.address = ((u64)base + align - 1) / align * align;
            m.globals.push_back({s.address, bytes});
            if (accept("=")) initialise((u8*)s.address, bytes, size_of(type));
        }
        expect(";");
        if (b) b->scopes.back().symbols[name] = s;
        else m.symbols[name] = s;
    }
    void initialise(u8* at, u64 bytes, int size) {
        u64 i = 0;
        auto value = [&] {
            if (!(is("-") || number(peek().text)))
                syntax(peek().line, "unsupported initialiser " + peek().text);
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

    void parse_registers(Builder& b) {
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

    void parse_params(Kernel& k) {
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

    void parse_loc() {  // .loc file line column[, function_name ..., inlined_at ...]
        int l = peek().line;
        p++;
        file = atoi(next().text.c_str());
        loc = atoi(next().text.c_str());
        while (!done() && peek().line == l) p++;
    }

    void parse_body(Kernel& k) {
        Builder b{m, k, {}, {}, {}, {}};
        std::map<std::string, s32> labels;
        file = loc = 0;
        expect("{");
        b.scopes.emplace_back();
        std::string pending_label;
        while (!b.scopes.empty()) {
            const Token& t = peek();
            if (t.text.empty() && !t.string) syntax(t.line, "unexpected end of kernel");
            if (accept("{")) {
                b.scopes.emplace_back();
                continue;
            }
            if (accept("}")) {
                b.scopes.pop_back();
                continue;
            }
            if (accept(";")) continue;
            if (t.text == ".loc") {
                parse_loc();
                continue;
            }
            if (t.text == ".pragma") {
                while (!accept(";")) p++;
                continue;
            }
            if (t.text == ".reg") {
                p++;
                parse_registers(b);
                continue;
            }
            if (t.text == ".param") {  // call sequence
                while (!is(";") && !is("[")) p++;
                b.scopes.back().call_params[tok[p - 1].text] = "";
                while (!accept(";")) p++;
                continue;
            }
            if (t.text == ".branchtargets") {
                p++;
                auto& table = b.branch_tables[pending_label];
                while (!accept(";")) {
                    table.push_back(next().text);
                    accept(",");
                }
                continue;
            }
            if (t.text == ".callprototype") {
                while (!accept(";")) p++;
                continue;
            }
            if (t.text[0] == '.') {
                parse_variable(&b);
                continue;
            }
            if (is(":", 1)) {
                pending_label = t.text;
                labels[t.text] = (s32)k.code.size();
                p += 2;
                continue;
            }
            Statement s;
            s.line = t.line;
            s.file = file;
            s.loc = loc;
            size_t begin = t.begin;
            if (accept("@")) {
                s.guard_negated = accept("!");
                s.guard = next().text;
            }
            s.opcode = next().text;
            while (!is(";")) {
                s.ops.push_back(parse_operand());
                if (!accept(",")) {
                    if (is("(")) continue;
                    break;
                }
            }
            size_t end = peek().end;
            expect(";");
            s.text = text.substr(begin, end - begin);
            std::replace(s.text.begin(), s.text.end(), '\n', ' ');
            std::replace(s.text.begin(), s.text.end(), '\t', ' ');
            k.code.push_back(decode(b, s));
        }
        Inst end;  // falling off the end of a kernel is ret
        end.flow = Flow::Exit;
        end.opcode = "ret";
        end.text = "(end of kernel)";
        end.line = peek().line;
        k.code.push_back(end);
        auto find = [&](const Inst& i, const std::string& l) {
            auto it = labels.find(l);
            if (it == labels.end()) syntax(i.line, "unknown label " + l);
            return it->second;
        };
        for (Inst& i : k.code) {
            if (i.flow == Flow::Branch) i.target = find(i, i.label);
            if (i.flow == Flow::BranchIndexed)
                for (auto& l : b.branch_tables[i.label]) i.targets.push_back(find(i, l));
        }
    }

    void parse_entry() {
        while (!is(".entry")) p++;
        p++;
        std::string name = next().text;
        auto k = std::make_unique<Kernel>();
        k->name = name;
        parse_params(*k);
        while (!is("{")) {
            if (accept(";")) return;
            std::string d = next().text;
            if (d == ".reqntid") {
                u32 n = strtoul(next().text.c_str(), nullptr, 0);
                while (accept(",")) n *= strtoul(next().text.c_str(), nullptr, 0);
                k->reqntid = n;
            }
            if (d == ".reqnctapercluster") {
                u32 n = strtoul(next().text.c_str(), nullptr, 0);
                while (accept(",")) n *= strtoul(next().text.c_str(), nullptr, 0);
                if (n > 1) m.broken[name] = "thread block clusters of more than one CTA are not supported";
            }
        }
        size_t body = p;
        k->shared_static = shared_module;
        m.order.push_back(name);
        try {
            parse_body(*k);
            k->shared_static = std::max(k->shared_static, shared_module);
            if (!m.broken.count(name)) m.kernels[name] = std::move(k);
        } catch (const Fault& f) {
            // Keep the reason; the kernel cannot be launched, the rest of the module can.
            m.broken[name] = std::string(fault_name(f.kind)) + ": " + f.what() + " at PTX line " +
                             std::to_string(f.line) + ": " + f.text;
            p = body;
            skip_braces();
        }
    }

    // Shared variables may be declared after the first kernel that uses them is read only in hand-written
    // PTX; compilers emit all module-scope declarations before the kernels or between them, so a first pass
    // collects the variables.
    void run() {
        while (!done()) {
            const Token& t = peek();
            if (t.text == ".version" || t.text == ".address_size") {
                p += 2;
                continue;
            }
            if (t.text == ".target") {
                p++;
                m.target = next().text;
                if (m.target.compare(0, 3, "sm_") == 0) m.arch = atoi(m.target.c_str() + 3);
                skip_line_from(t.line);
                continue;
            }
            if (t.text == ".file") {
                p++;
                int n = atoi(next().text.c_str());
                m.files[n] = next().text;
                if (accept(",")) {
                    next();
                    expect(",");
                    next();
                }
                continue;
            }
            if (t.text == ".loc") {
                skip_line();
                continue;
            }
            if (t.text == ".section") {
                while (!is("{")) p++;
                skip_braces();
                continue;
            }
            if (t.text == ".pragma" || t.text == ".alias") {
                while (!accept(";")) p++;
                continue;
            }
            if (t.text == ";" || t.text == "}") {
                p++;
                continue;
            }
            size_t q = p;  // what kind of declaration is this?
            bool entry = false, func = false;
            while (q < tok.size() && tok[q].text != ";" && tok[q].text != "(" && tok[q].text != "{" &&
                   tok[q].text != "=" && tok[q].text != "[") {
                if (tok[q].text == ".entry") entry = true;
                if (tok[q].text == ".func") func = true;
                q++;
            }
            if (entry) {
                parse_entry();
                continue;
            }
            if (func) {
                while (!is(";") && !is("{")) p++;
                if (is("{")) skip_braces();
                else p++;
                continue;
            }
            if (t.text[0] == '.') {
                parse_variable(nullptr);
                continue;
            }
            syntax(t.line, "unexpected '" + t.text + "' at module scope");
        }
    }
    void skip_line_from(int line) {
        while (!done() && peek().line == line) p++;
    }
};

}  // namespace

std::unique_ptr<Module> parse_module(const std::string& text) {
    auto m = std::make_unique<Module>();
    Parser(text, *m).run();
    return m;
}

}  // namespace ptx
