// operands.cpp - numbers, registers, vectors and addresses as a statement writes them.
#include <cctype>
#include "parser.h"

namespace ptx {

bool Parser::at_number() const {
    const std::string& w = peek().text;
    return !w.empty() && isdigit((unsigned char)w[0]);
}
void Parser::parse_number(Operand& o) {
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
s64 Parser::parse_displacement() {
    s64 v = 0;
    while (is("+") || is("-")) {
        bool neg = next().text == "-";
        Operand o;
        parse_number(o);
        v += neg ? -(s64)o.imm : (s64)o.imm;
    }
    return v;
}
std::vector<Operand> Parser::parse_list(const char* close) {
    std::vector<Operand> list;
    while (!accept(close)) {
        list.push_back(parse_operand());
        accept(",");
    }
    return list;
}
Operand Parser::parse_operand() {
    Operand o;
    if (accept("{")) {
        o.kind = Operand::Vector;
        o.elems = parse_list("}");
        return o;
    }
    if (accept("(")) {  // call parameter list
        o.kind = Operand::Vector;
        o.elems = parse_list(")");
        return o;
    }
    if (accept("[")) {
        o.kind = Operand::Address;
        if (at_number()) {
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
    if (is("-") || at_number()) {
        parse_number(o);
        return o;
    }
    o.name = next().text;
    if (is("+") || is("-")) o.offset = parse_displacement();  // symbol+offset
    if (accept("|")) o.pair.push_back(parse_operand());
    return o;
}

}  // namespace ptx
