// lexer.h - PTX text as tokens, and a place in them.
#pragma once
#include <string>
#include <vector>
#include "isa.h"

namespace ptx {

struct Token {
    std::string text;
    int line;
    size_t begin, end;
    bool string = false;
};

[[noreturn]] void syntax(int line, const std::string& what);

struct Tokens {
    const std::string& text;
    std::vector<Token> tok;
    size_t p = 0;

    explicit Tokens(const std::string& t);
    bool done() const { return p >= tok.size(); }
    const Token& peek(size_t k = 0) const;
    bool is(const char* s, size_t k = 0) const { return peek(k).text == s && !peek(k).string; }
    Token next();
    bool accept(const char* s);
    void expect(const char* s);
    void skip_line(int line);  // the rest of that line
    void skip_past(const char* s);
    void skip_braces();
};

}  // namespace ptx
