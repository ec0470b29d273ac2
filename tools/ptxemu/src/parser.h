// parser.h - PTX text to Module: the module (parser.cpp), declarations (declarations.cpp), kernel bodies (body.cpp) and
// operands (operands.cpp); statements are handed to decode().
#pragma once
#include "decode.h"
#include "lexer.h"

namespace ptx {

struct Body {  // of one kernel, while it is read
    Builder b;
    struct Labels {  // of one { }: inline assembly may define a label in each of its braces
        std::map<std::string, s32> places;
        std::vector<size_t> branches;  // instructions whose label has not been found yet
    };
    std::vector<Labels> labels;  // one for each open scope
    std::map<std::string, s32> every_label;
    std::string last_label;
};

struct Parser : Tokens {
    Module& m;
    int file = 0, loc = 0;
    u32 shared_module = 0;

    Parser(const std::string& t, Module& m) : Tokens(t), m(m) {}
    void run();

  private:
    bool parse_module_directive();
    void parse_definition();
    void parse_entry();
    bool parse_attributes(Kernel& k);
    u32 parse_product();
    void parse_loc();

    void parse_body(Kernel& k);
    bool parse_directive(Body& body);
    Statement parse_statement();
    void open_scope(Body& body);
    void close_scope(Body& body);
    void resolve_tables(Body& body);

    struct Declaration;
    Declaration parse_declaration();
    void parse_variable(Builder* b);
    void initialise(u8* at, u64 bytes, int size);
    void parse_registers(Builder& b);
    void parse_params(Kernel& k);

    bool at_number() const;
    void parse_number(Operand& o);
    s64 parse_displacement();
    std::vector<Operand> parse_list(const char* close);
    Operand parse_operand();
};

}  // namespace ptx
