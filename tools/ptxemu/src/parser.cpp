// parser.cpp - the module: its directives, its variables, and its kernels in file order (PTX ISA "Directives").
#include "parser.h"
#include <algorithm>

namespace ptx {

// What is no definition of a variable or of a kernel; false at a definition.
bool Parser::parse_module_directive() {
    const Token& t = peek();
    if (t.text == ".version" || t.text == ".address_size") {
        p += 2;
    } else if (t.text == ".target") {
        p++;
        m.target = next().text;
        if (m.target.compare(0, 3, "sm_") == 0) m.arch = atoi(m.target.c_str() + 3);
        skip_line(t.line);
    } else if (t.text == ".file") {
        p++;
        int n = atoi(next().text.c_str());
        m.files[n] = next().text;
        if (accept(",")) {
            next();
            expect(",");
            next();
        }
    } else if (t.text == ".loc") {
        skip_line(t.line);
    } else if (t.text == ".section") {
        while (!is("{")) next();
        skip_braces();
    } else if (t.text == ".pragma" || t.text == ".alias") {
        skip_past(";");
    } else if (t.text == ";" || t.text == "}") {
        p++;
    } else return false;
    return true;
}

void Parser::parse_definition() {
    size_t q = p;  // of what?
    bool entry = false, func = false;
    while (q < tok.size() && tok[q].text != ";" && tok[q].text != "(" && tok[q].text != "{" &&
           tok[q].text != "=" && tok[q].text != "[") {
        if (tok[q].text == ".entry") entry = true;
        if (tok[q].text == ".func") func = true;
        q++;
    }
    if (entry) parse_entry();
    else if (func) {
        while (!is(";") && !is("{")) next();
        if (is("{")) skip_braces();
        else p++;
    } else if (peek().text[0] == '.') parse_variable(nullptr);
    else syntax(peek().line, "unexpected '" + peek().text + "' at module scope");
}

u32 Parser::parse_product() {
    u32 n = strtoul(next().text.c_str(), nullptr, 0);
    while (accept(",")) n *= strtoul(next().text.c_str(), nullptr, 0);
    return n;
}

// What stands between a kernel's parameters and its body; false for a declaration without a body.
bool Parser::parse_attributes(Kernel& k) {
    while (!is("{")) {
        if (accept(";")) return false;
        std::string d = next().text;
        if (d == ".reqntid") k.reqntid = parse_product();
        if (d == ".reqnctapercluster")
            for (int n = 0; n < 3; n++)
                k.cluster[n] = n == 0 || accept(",") ? (u32)strtoul(next().text.c_str(), nullptr, 0) : 1;
    }
    return true;
}

void Parser::parse_entry() {
    while (!is(".entry")) p++;
    p++;
    auto k = std::make_unique<Kernel>();
    const std::string name = k->name = next().text;
    parse_params(*k);
    if (!parse_attributes(*k)) return;
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

void Parser::run() {
    while (!done())
        if (!parse_module_directive()) parse_definition();
}

std::unique_ptr<Module> parse_module(const std::string& text) {
    auto m = std::make_unique<Module>();
    Parser(text, *m).run();
    return m;
}

}  // namespace ptx
