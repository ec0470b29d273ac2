// lexer.cpp - PTX text as tokens (PTX ISA "Syntax").
#include "lexer.h"
#include <algorithm>
#include <cctype>

namespace ptx {

void syntax(int line, const std::string& what) {
    Fault f(FaultKind::Syntax, what);
    f.line = line;
    throw f;
}

static std::vector<Token> tokenize(const std::string& t) {
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

Tokens::Tokens(const std::string& t) : text(t), tok(tokenize(t)) {}

const Token& Tokens::peek(size_t k) const {
    static Token end{"", 0, 0, 0};
    return p + k < tok.size() ? tok[p + k] : end;
}
Token Tokens::next() {
    if (done()) syntax(tok.empty() ? 0 : tok.back().line, "unexpected end of file");
    return tok[p++];
}
bool Tokens::accept(const char* s) {
    if (is(s)) {
        p++;
        return true;
    }
    return false;
}
void Tokens::expect(const char* s) {
    if (!accept(s)) syntax(peek().line, std::string("expected '") + s + "' before '" + peek().text + "'");
}
void Tokens::skip_line(int line) {
    while (!done() && peek().line == line) p++;
}
void Tokens::skip_past(const char* s) {
    while (!accept(s)) next();
}
void Tokens::skip_braces() {
    int depth = 0;
    do {
        Token t = next();
        if (t.text == "{") depth++;
        else if (t.text == "}") depth--;
    } while (depth);
}

}  // namespace ptx
